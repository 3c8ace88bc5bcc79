"""Where Keys come from that no call was made for: the sizes of an op, a file of sizes, or the text of a record.

All go through the op's own example, contract and Problem builder, on the meta device, so they are the Keys that calls will have.
A file is TOML; every value may be a list, and each table stands for all combinations:

    [[keys]]
    op = ["retention", "simple_gla"]
    dtype = "bfloat16"
    B = 1
    T = [64, 4096]
    H = [4, 16]
    D = [64, 128]               # every head dim of the op: K and V, or N and P
    packed = [false, true]      # the B rows of T tokens as one pack of B sequences
    grad = true
    initial_state = false
    final_state = false
    tokens = 131072             # leaves out what has more tokens (B * T)
    options = {normalize = true}    # further keyword arguments of the op
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..device import DeviceProfile
from ..errors import CallError, UnknownNameError, nearest
from ..problem import Problem

HEAD_DIMS = ("K", "V", "N", "P")
_SWITCHES = ("packed", "grad", "initial_state", "final_state")


def key_of(
    op: str,
    sizes: Mapping[str, int],
    device: DeviceProfile,
    *,
    dtype: str = "bfloat16",
    packed: bool = False,
    grad: bool = False,
    initial_state: bool = False,
    final_state: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Problem:
    """The Key of a call of an op with these sizes (the rest as the op's defaults). Raises UnknownNameError for an unknown name."""
    found = registry.get_op(op)
    whole, real = whole_sizes(op, sizes), dtype_of(dtype)
    lengths = [whole.get("T", 1)] * whole["B"] if packed else None
    args, kwargs = found.example(
        whole,
        real,
        "meta",
        lengths=lengths,
        initial_state=initial_state,
        output_final_state=final_state,
        options=tuple((options or {}).items()),
    )
    low = found.contract(*args, **kwargs)
    tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
    problem = registry.get_recurrence(low.recurrence).problem(tensors, low.options, grad)
    return dataclasses.replace(problem, device=device, interpret=False).key()


def whole_sizes(op: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """All sizes of a call of an op; D stands for every head dim, what is not named is the op's default. Raises UnknownNameError."""
    whole = dict(registry.get_op(op).sizes)
    for name, value in sizes.items():
        if name == "D":
            whole.update({n: value for n in HEAD_DIMS if n in whole})
        elif name in whole:
            whole[name] = value
        else:
            raise UnknownNameError(f"{op}: no size named {name!r}; {nearest(name, ['D', *whole])}.")
    return whole


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name. Raises UnknownNameError."""
    real = getattr(torch, name, None)
    if not isinstance(real, torch.dtype):
        raise UnknownNameError(f"no dtype named {name!r}. To fix: name one of torch's, for example bfloat16.")
    return real


def expand(row: Mapping[str, Any], device: DeviceProfile) -> list[tuple[str, Problem]]:
    """All combinations of a row's values as (recurrence, Key), without repetition."""
    row = dict(row)
    ops = _listed(row.pop("op", []))
    most = row.pop("tokens", None)
    if not ops:
        raise CallError('keys: expected a row with an op, got none. To fix: write for example op = "retention".')
    found: dict[tuple[str, Problem], None] = {}
    for op in ops:
        for values in itertools.product(*map(_listed, row.values())):
            chosen = dict(zip(row, values, strict=True))
            switches = {name: bool(chosen.pop(name)) for name in _SWITCHES if name in chosen}
            dtype = str(chosen.pop("dtype", "bfloat16"))
            options = chosen.pop("options", None)
            whole = {**registry.get_op(op).sizes, **chosen}
            if most is None or whole["B"] * whole.get("T", 1) <= most:
                found[registry.get_op(op).recurrence, key_of(op, chosen, device, dtype=dtype, options=options, **switches)] = None
    return list(found)


def read_keys(path: Path, device: DeviceProfile) -> list[tuple[str, Problem]]:
    """(recurrence, Key) for each combination in a file, without repetition. Raises CallError for a file that is none."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("keys")
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise CallError(f"{path}: {error}. To fix: see `fla-dispatch tune --help` for the form of the file.") from error
    if not isinstance(rows, list):
        raise CallError(f"{path}: expected [[keys]] tables, got none. To fix: begin each table with [[keys]].")
    return list(dict.fromkeys(itertools.chain.from_iterable(expand(row, device) for row in rows)))


def by_recurrence(pairs: Iterable[tuple[str, Problem]]) -> dict[str, list[Problem]]:
    """Keys by the recurrence that they belong to."""
    found: dict[str, list[Problem]] = {}
    for recurrence, key in pairs:
        found.setdefault(recurrence, []).append(key)
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


_TEXT = re.compile(
    r"(?P<recurrence>\w+)@(?P<arch>\w+)\?(?P<dtypes>[^&]*)&K=(?P<K>\d+)&V=(?P<V>\d+)&group=(?P<group>\d+)&BH=(?P<BH>\d+)&T=(?P<T>\d+)"
    r"&N=(?P<N>\d+)&mean=(?P<mean_length>\d+)&(?P<flags>[^&]*)(?P<switches>(&\w+)*)"
)


def parse_key(text: str, device: DeviceProfile) -> Problem:
    """The Problem whose text this is, on a device of its architecture: `parse_key(p.text(), p.device) == p`. Raises ValueError."""
    found = _TEXT.fullmatch(text)
    if found is None or found["arch"] != device.arch:
        raise ValueError(f"not the text of a key on {device.arch}: {text}")
    numbers: dict[str, Any] = {name: int(found[name]) for name in ("K", "V", "group", "BH", "T", "N", "mean_length")}
    switches: dict[str, Any] = {f.name: False for f in dataclasses.fields(Problem) if f.type == "bool"} | dict.fromkeys(
        found["switches"].split("&")[1:], True
    )

    def pairs(part: str) -> tuple[tuple[str, str], ...]:
        return tuple((name, value) for name, _, value in (x.partition("=") for x in part.split(",") if x))

    problem = Problem(
        recurrence=found["recurrence"], device=device, dtypes=pairs(found["dtypes"]), flags=pairs(found["flags"]), **numbers, **switches
    )
    if problem.text() != text:
        raise ValueError(f"not the text of a key: {text}")
    return problem
