"""What a model will call: the finite set of calls, and so of Keys, of training or serving it, from options or a workload file.

A file is TOML; op, dtype, heads, head_dim and batch may be lists, and each table stands for all combinations:

    [[call]]
    op = "retention"
    dtype = "bfloat16"
    heads = 16
    head_dim = 128              # also value_heads, value_dim, state_dim, and sizes = {G = 2} for any size of the op
    use = "train"               # or "serve"
    state_dtype = "float32"     # of the pools of steps, also bfloat16
    options = {raw = true}      # of the op and its step, as in the key files of tune
    batch = [1, 8]              # sequences of a call
    length = "64:4096"          # tokens of each: a number, a list, or a range, which stands for all its buckets
    packed = "both"             # dense (default), packed or both

Training is a call with gradients and without states. Serving is prefill, which returns states and may be given them (a prompt in
pieces), for each length, and decode of one token for each batch: as a call, and where the op has a step also as one, with a slot
for each row and with slots (int32).
"""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import registry
from ..device import DeviceProfile
from ..errors import CallError, UnknownNameError, nearest
from ..problem import Problem, length_bucket
from .keys import key_of

USES = ("train", "serve")
LAYOUTS = ("dense", "packed", "both")

#: What is taken where nothing is said: (batch, lengths).
DEFAULTS: dict[str, tuple[tuple[int, ...], str]] = {"train": ((8,), "4096"), "serve": ((1, 8), "64:4096")}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op: its sizes, and what it is given and asked for; options as for the op's example."""

    op: str
    sizes: tuple[tuple[str, int], ...]
    dtype: str = "bfloat16"
    packed: bool = False
    grad: bool = False
    initial_state: bool = False
    final_state: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def recurrence(self) -> str:
        return registry.get_op(self.op).recurrence

    def size(self, name: str) -> int:
        return dict(self.sizes)[name]

    def key(self, device: DeviceProfile) -> Problem:
        """The Key that this call has on a device."""
        return key_of(
            self.op, dict(self.sizes), device, dtype=self.dtype, packed=self.packed, grad=self.grad, initial_state=self.initial_state,
            final_state=self.final_state, options=dict(self.options),
        )  # fmt: skip

    def shorter(self) -> Call | None:
        """The same call one token shorter where that has the same Key: whatever a length may change shows there."""
        T = dict(self.sizes).get("T", 1)
        if T < 3 or length_bucket(T) != length_bucket(T - 1):
            return None
        return dataclasses.replace(self, sizes=tuple((n, v - (n == "T")) for n, v in self.sizes))

    def text(self) -> str:
        """`retention bfloat16 B=8 T=4096 H=16 K=128 V=128 grad`."""
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes)
        switches = "".join(f" {s}" for s in ("packed", "grad", "initial_state", "final_state") if getattr(self, s))
        options = "".join(f" {name}={value}" for name, value in self.options)
        return f"{self.op} {self.dtype} {sizes}{switches}{options}"


def parse_numbers(text: str | int | Iterable[int], where: str) -> tuple[int, ...]:
    """`4096`, `"64,4096"`, `[64, 4096]`, or `"64:4096"` as all tops of length buckets from one to the other. Raises CallError."""
    if isinstance(text, int) and not isinstance(text, bool):
        return (text,)
    if not isinstance(text, str):
        numbers = tuple(text) if isinstance(text, (list, tuple)) else ()
        if numbers and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers):
            return numbers
    elif ":" in text:
        low, _, high = text.partition(":")
        if low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high):
            top, found = length_bucket(int(low)), []
            while top < length_bucket(int(high)):
                found.append(top)
                top = length_bucket(top + 1)
            return (*found, int(high))
    elif all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        return tuple(int(part) for part in text.split(","))
    raise CallError(
        f'{where}: expected a number, numbers or a range, got {text!r}. To fix: write for example 4096, "64,4096" or "64:4096".'
    )


def _sizes(op: str, given: Mapping[str, int | None], extra: Mapping[str, int]) -> dict[str, int]:
    """The op's own sizes from a model's words."""
    whole = dict(registry.get_op(op).sizes)
    roles = {"heads": ("H",), "value_heads": ("HV",), "head_dim": ("K", "V", "P"), "value_dim": ("V",), "state_dim": ("N",)}
    for word, names in roles.items():
        value = given.get(word)
        if value is not None:
            fitting = [n for n in names if n in whole]
            if not fitting:
                raise UnknownNameError(f"{op} has no {word}; its sizes are {', '.join(whole)}")
            whole.update(dict.fromkeys(fitting, value))
    for name, value in extra.items():
        if name not in whole:
            raise UnknownNameError(f"{op}: no size named {name!r}; {nearest(name, list(whole))}.")
        whole[name] = value
    return whole


def model_calls(
    op: str,
    use: str,
    *,
    dtype: str = "bfloat16",
    heads: int | None = None,
    value_heads: int | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    state_dim: int | None = None,
    state_dtype: str = "float32",
    sizes: Mapping[str, int] | None = None,
    batch: Iterable[int] | None = None,
    lengths: Iterable[int] | None = None,
    layout: str = "dense",
    options: Mapping[str, Any] | None = None,
) -> list[Call]:
    """The calls of training (`train`) or serving (`serve`) one op of a model; of a step, its calls alone. options: as for the op's example.

    Raises UnknownNameError for a wrong name.
    """
    if use not in USES or layout not in LAYOUTS:
        raise UnknownNameError(f"expected a use out of {', '.join(USES)} and a layout out of {', '.join(LAYOUTS)}, got {use!r}, {layout!r}")
    given = {"heads": heads, "value_heads": value_heads, "head_dim": head_dim, "value_dim": value_dim, "state_dim": state_dim}
    whole = _sizes(op, given, sizes or {})
    batches, default = DEFAULTS[use]
    batches = tuple(batch) if batch is not None else batches
    tokens = tuple(lengths) if lengths is not None else parse_numbers(default, "length")
    found: dict[Call, None] = {}
    own = tuple((options or {}).items())

    def add(B: int, T: int, packed: bool, grad: bool, initial: bool, final: bool) -> None:
        found[Call(op, tuple({**whole, "B": B, "T": T}.items()), dtype, packed, grad, initial, final, own)] = None

    step = op if "T" not in whole else f"{op}_step"
    if use == "train" and step == op:
        raise UnknownNameError(f"{op} has no gradients: expected the use serve, got train")
    for B, T in itertools.product(batches, tokens) if step != op else ():
        for packed in {"dense": (False,), "packed": (True,), "both": (False, True)}[layout]:
            if use == "train":
                add(B, T, packed, True, False, False)
            else:
                add(B, T, packed, False, False, True)
                add(B, T, packed, False, True, True)
    if use == "serve":
        for B in batches:
            if step != op:
                add(B, 1, False, False, True, True)
            if step in registry.op_names():
                named = {name: B if name == "B" else whole[name] for name in registry.get_op(step).sizes}
                for pool in ("none", "slots"):
                    found[Call(step, tuple(named.items()), dtype, options=(*own, ("pool", pool), ("state_dtype", state_dtype)))] = None
    return list(found)


_WORDS = (
    "op",
    "dtype",
    "heads",
    "value_heads",
    "head_dim",
    "value_dim",
    "state_dim",
    "state_dtype",
    "sizes",
    "use",
    "batch",
    "length",
    "packed",
    "options",
)
_LISTS = ("op", "dtype", "heads", "value_heads", "head_dim", "value_dim", "state_dim", "state_dtype", "use")


def read_workload(path: Path) -> list[Call]:
    """The calls of a workload file, without repetition. Raises CallError for a file that is none."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("call")
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise CallError(f"{path}: {error}. To fix: see docs/tuning.md for the form of a workload.") from error
    if not isinstance(rows, list) or not rows:
        raise CallError(f"{path}: expected [[call]] tables, got none. To fix: begin each table with [[call]].")
    found: dict[Call, None] = {}
    for row in rows:
        unknown = sorted(set(row) - set(_WORDS))
        if unknown or "op" not in row:
            raise CallError(f"{path}: {f'unknown {unknown}' if unknown else 'a table without op'}; known: {', '.join(_WORDS)}")
        for call in _expand(row, str(path)):
            found[call] = None
    return list(found)


def _expand(row: dict[str, Any], where: str) -> list[Call]:
    if not isinstance(row.get("options", {}), dict):
        raise CallError(
            f"{where}: options: expected a table, got {row['options']!r}. To fix: write for example options = {{normalize = true}}."
        )
    choices = {name: row[name] if isinstance(row[name], list) else [row[name]] for name in _LISTS if name in row}
    batch = parse_numbers(row["batch"], f"{where}: batch") if "batch" in row else None
    lengths = parse_numbers(row["length"], f"{where}: length") if "length" in row else None
    layout = row.get("packed", "dense")
    layout = {True: "packed", False: "dense"}.get(layout, layout) if isinstance(layout, bool) else layout
    calls = []
    for values in itertools.product(*choices.values()):
        named = dict(zip(choices, values, strict=True))
        op, use = named.pop("op"), named.pop("use", "train")
        calls += model_calls(
            op, use, sizes=row.get("sizes"), batch=batch, lengths=lengths, layout=layout, options=row.get("options"), **named
        )
    return calls
