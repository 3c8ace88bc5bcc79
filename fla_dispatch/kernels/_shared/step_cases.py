"""What the cases of steps share: sizes, cases and calls, pools and slots, the rows that every step gets, and the tolerances."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

from ...errors import bad_call


class Sizes(NamedTuple):
    """B rows, H query heads, HV value heads, K and V head dims."""

    B: int
    H: int
    HV: int
    K: int
    V: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of one op.

    generate: the room's make_inputs; state_dtype: of the pool; pool: none (one slot a row), slots (a larger pool, in any order) or
    padded (rows of padding among them); regime: gates are mild, strong, none or reset; fused: q, k, v are slices of one projection,
    and the pool of a larger one; tags: small (any CPU), interpreter, gpu, bench; source: the model whose sizes these are.
    """

    generate: Callable[..., Inputs]
    name: str
    op: str
    sizes: Sizes
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    pool: str = "none"
    regime: str = "mild"
    fused: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    tags: frozenset[str] = frozenset()
    source: str = ""

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def make(self, device: torch.device | str = "cpu", *, seed: int = 0) -> Inputs:
        """This case's inputs."""
        return self.generate(
            self.op, self.sizes, self.dtype, device, seed=seed, state_dtype=self.state_dtype, pool=self.pool, regime=self.regime,
            fused=self.fused, options=self.options,
        )  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of a call; the state (for normalize a pair) is the last positional one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fresh(self) -> Inputs:
        """The same call on pools of their own, laid out as these."""

        def copied(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(copied, x))
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

        return Inputs((*self.args[:-1], copied(self.args[-1])), self.kwargs)

    def wide(self) -> Inputs:
        """The same call in float64, on pools of their own."""

        def cast(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(cast, x))
            return x.to(torch.float64, copy=True) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        return Inputs(tuple(map(cast, self.args)), {name: cast(x) for name, x in self.kwargs.items()})

    def states(self) -> dict[str, torch.Tensor]:
        """The pools by name."""
        state = self.args[-1]
        return dict(zip(("state", "z"), state if isinstance(state, tuple) else (state,), strict=False))


def make_slots(B: int, padded: bool, device: torch.device) -> tuple[torch.Tensor, int]:
    """Slots of B rows in a pool twice as large and their number, in no order; padded: every third row has none."""
    S = 2 * B + 3
    order = torch.randperm(S, generator=torch.Generator().manual_seed(B))[:B]
    if padded:
        order[1::3] = -1
        order[4::6] = -7
    return order.to(torch.int32).to(device), S


def make_pool(whole: torch.Tensor, dtype: torch.dtype, sliced: bool) -> torch.Tensor:
    """A pool of these values; sliced: every other slot of one twice as large, as layers share one."""
    if not sliced:
        return whole.to(dtype)
    shared = torch.empty(whole.shape[0], 2, *whole.shape[1:], dtype=dtype, device=whole.device)
    shared.copy_(whole[:, None])
    return shared[:, 1]


def as_slices(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tensors [B, ...] as slices of one projection."""
    widths = [math.prod(x.shape[1:]) for x in parts]
    pieces = torch.cat([x.reshape(x.shape[0], width) for x, width in zip(parts, widths, strict=True)], -1).split(widths, -1)
    return tuple(piece.unflatten(-1, x.shape[1:]) for piece, x in zip(pieces, parts, strict=True))


def one_token_alone(op: str, got: str) -> NoReturn:
    """What an example of a step cannot be."""
    fix = f"leave it out, or call {op.removesuffix('_step')}"
    bad_call(op, "call", expected="one token of each row, without gradients", got=got, fix=fix)


def pool_dtype(op: str, name: object) -> torch.dtype:
    """The dtype of a pool from its name."""
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        bad_call(op, "state_dtype", expected="float32 or bfloat16", got=repr(name), fix="name one of these")
    return found


def tolerance(dtype: torch.dtype, what: str = "o") -> float:
    """Largest error |x - reference| / |reference| (Frobenius norms, reference in float64 from the same rounded inputs).

    dtype: of q, k, v for o, of the pool for a state. All is float32 but the last conversion: rounding errs by at most u = 2^-8
    (bf16) or 2^-11 (fp16), truncating (bf16 in Triton's interpreter) by 2 u. In float32 the errors of exp and of sums of some
    hundred terms remain.
    """
    return {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}.get(dtype, 1e-11)


_BF16, _FP16 = torch.bfloat16, torch.float16

#: A case before it has an op: name, sizes, tags and further fields.
Row = tuple[str, Sizes, frozenset[str], dict[str, Any]]


def row(
    name: str,
    *sizes: int,
    tags: str = "small interpreter",
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    pool: str = "none",
    regime: str = "mild",
    fused: bool = False,
    options: tuple[tuple[str, Any], ...] = (),
    source: str = "",
) -> Row:
    """A row of a table of cases."""
    fields = {
        "dtype": dtype, "state_dtype": state_dtype, "pool": pool, "regime": regime, "fused": fused, "options": options, "source": source,
    }  # fmt: skip
    return name, Sizes(*sizes), frozenset(tags.split()), fields


#: Rows that every op gets. B, H, HV, K, V.
ROWS = (
    row("plain", 3, 2, 2, 16, 32),
    row("no_rows", 0, 1, 1, 16, 16),
    row("one_row", 1, 1, 1, 32, 16, fused=True),
    row("tiny", 2, 1, 2, 1, 3),
    row("slots", 4, 2, 2, 32, 32, pool="slots"),
    row("padded", 7, 1, 2, 16, 20, pool="padded", fused=True),
    row("group4", 2, 2, 8, 32, 16, pool="slots"),
    row("d80", 2, 1, 1, 80, 80),
    row("d100_d64", 2, 1, 2, 100, 64, pool="slots"),
    row("d64_d128", 2, 1, 1, 64, 128, fused=True),
    row("d129_d17", 2, 1, 1, 129, 17),
    row("d256", 2, 1, 1, 256, 256, pool="slots", source="RetNet 1.3B, GLA 1.3B"),
    row("bf16", 3, 2, 4, 32, 32, dtype=_BF16, pool="padded"),
    row("bf16_both", 3, 2, 2, 64, 32, dtype=_BF16, state_dtype=_BF16, pool="padded", fused=True),
    row("fp16", 3, 2, 2, 32, 48, dtype=_FP16, fused=True),
    row("narrow_state", 3, 2, 2, 32, 48, state_dtype=_BF16),
    row("gpu", 65, 4, 8, 128, 128, tags="gpu", dtype=_BF16, pool="padded", fused=True),
    row("gpu_narrow", 200, 4, 4, 128, 64, tags="gpu", dtype=_BF16, state_dtype=_BF16, pool="padded"),
    row("gpu_wide", 9, 4, 4, 256, 256, tags="gpu", dtype=_FP16, pool="slots"),
    row("gpu_float32", 40, 4, 8, 64, 128, tags="gpu", pool="padded", fused=True),
    row("bench_256", 256, 32, 32, 128, 128, tags="bench", dtype=_BF16, source="4096-wide models, batch 256"),
    row("bench_1", 1, 32, 32, 128, 128, tags="bench", dtype=_BF16, source="4096-wide models, batch 1"),
)

#: Further rows of gated ops.
GATE_ROWS = tuple(row(regime, 5, 1, 2, 16, 32, pool="padded", regime=regime) for regime in ("strong", "none", "reset"))
