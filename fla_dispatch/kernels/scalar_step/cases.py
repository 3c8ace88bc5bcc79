"""Named cases, the input generator and the tolerances of a step.

Sizes are written in the recurrence's letters (B, H, HV, K, V); for mamba2_step they stand for (B, G, H, N, P).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...errors import bad_call
from .._shared.inputs import Draw, make_gates

OP_NAMES = ("linear_attn_step", "retention_step", "lightning_attn_step", "simple_gla_step", "mamba2_step")
GATED = ("simple_gla_step", "mamba2_step")


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

    state_dtype: of the pool; pool: none (one slot a row), slots (a larger pool, in any order) or padded (rows of padding among
    them); regime: gates are mild, strong, none or reset; fused: q, k, v are slices of one projection, and the pool of a larger
    one; tags: small (any CPU), interpreter, gpu, bench; source: the model whose sizes these are.
    """

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
        return make_inputs(
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


def make_ssd(draw: Draw, s: Sizes, dtype: torch.dtype, regime: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dt, A and dt_bias with the initialisation of the published layer: A in -(1, 16), d in (0.001, 0.1)."""
    A = -draw.uniform(1.0, 16.0, s.HV)
    step = torch.exp(draw.uniform(math.log(1e-3), math.log(0.1), s.HV))
    if regime == "none":
        A = A * 1e-9
    if regime == "strong":
        step = step * 0 + 1.2
    if regime == "reset":  # one head forgets everything: d A is far below the clamp of the kernels
        A = torch.cat([A[:1] * 0 - 1e6, A[1:]])
    return (0.5 * draw.normal(s.B, s.HV)).to(dtype), A, step + torch.log(-torch.expm1(-step))


def make_qkv(draw: Draw, s: Sizes, dtype: torch.dtype, fused: bool, positive: bool) -> tuple[torch.Tensor, ...]:
    """q and v of unit variance, k of unit length; positive features on request."""
    q, k, v = draw.normal(s.B, s.H, s.K), draw.normal(s.B, s.H, s.K), draw.normal(s.B, s.HV, s.V)
    if positive:
        q, k = F.elu(q) + 1, F.elu(k) + 1
    k = F.normalize(k, dim=-1)
    if not fused:
        return q.to(dtype), k.to(dtype), v.to(dtype)
    parts = torch.cat([x.flatten(1) for x in (q, k, v)], -1).to(dtype).split([s.H * s.K, s.H * s.K, s.HV * s.V], -1)
    return tuple(x.unflatten(-1, (h, -1)) for x, h in zip(parts, (s.H, s.H, s.HV), strict=True))


def make_pool(whole: torch.Tensor, dtype: torch.dtype, sliced: bool) -> torch.Tensor:
    """A pool of these values; sliced: every other slot of one twice as large, as layers share one."""
    if not sliced:
        return whole.to(dtype)
    shared = torch.empty(whole.shape[0], 2, *whole.shape[1:], dtype=dtype, device=whole.device)
    shared.copy_(whole[:, None])
    return shared[:, 1]


def make_inputs(
    op: str,
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    state_dtype: torch.dtype = torch.float32,
    pool: str = "none",
    regime: str = "mild",
    fused: bool = False,
    options: tuple[tuple[str, Any], ...] = (),
) -> Inputs:
    """Inputs of one call, the same for one seed and device; no zeros stand in for data."""
    device = torch.device(device)
    draw, s = Draw(device, seed), sizes
    chosen = dict(options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    normalize = op == "linear_attn_step" and bool(chosen.get("normalize", False))
    q, k, v = make_qkv(draw, s, dtype, fused, normalize)
    kwargs: dict[str, Any] = {}
    args: tuple[Any, ...] = (q, k, v)
    if op == "simple_gla_step":
        args = (q, k, v, make_gates(draw, regime, s.B, s.HV).to(wide))
    elif op == "lightning_attn_step":
        kwargs |= {"layer_idx": 3, "num_layers": 12}
    elif op == "mamba2_step":
        dt, A, bias = make_ssd(draw, s, dtype, regime)
        args = (v, dt, A.to(wide), k, q)
        kwargs |= {"D": (1 + 0.1 * draw.normal(s.HV)).to(wide), "dt_bias": bias.to(wide), "dt_softplus": True}
        if chosen.pop("gated", False):
            kwargs |= {"z": draw.normal(s.B, s.HV, s.V).to(dtype), "D": (1 + 0.1 * draw.normal(s.HV, s.V)).to(wide)}
        if chosen.pop("plain", False):
            kwargs = {}
    kwargs |= chosen
    slots, S = (None, s.B) if pool == "none" else make_slots(s.B, pool == "padded", device)
    if slots is not None:
        kwargs["slots"] = slots
    pools = torch.float64 if dtype == torch.float64 else state_dtype
    state: Any = make_pool(0.5 * draw.normal(S, s.HV, s.K, s.V), pools, fused)
    if normalize:
        state = (state, make_pool(0.5 + draw.uniform(0, 1, S, s.HV, s.K), wide, fused))
    return Inputs((*args, state), kwargs)


def _example(
    op: str,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    seed: int = 0,
    lengths: list[int] | None = None,
    initial_state: bool = True,
    output_final_state: bool = True,
    requires_grad: bool = False,
    options: tuple[tuple[str, Any], ...] = (),
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a realistic call (what Op.example promises); a state is always given and updated.

    options: keyword arguments of the op, and `state_dtype` (a name) and `pool` (of a Case).
    """
    if lengths is not None or requires_grad:
        got = "a pack" if lengths is not None else "a gradient"
        fix = f"leave it out, or call {op.removesuffix('_step')}"
        bad_call(op, "call", expected="one token of each row, without gradients", got=got, fix=fix)
    group, heads = ("G", "H") if op == "mamba2_step" else ("H", "HV")
    s = Sizes(
        sizes["B"], sizes[group], sizes.get(heads, 0) or sizes[group],
        *(sizes[name] for name in (("N", "P") if op == "mamba2_step" else ("K", "V"))),
    )  # fmt: skip
    if s.HV % s.H:
        fix = f"choose {heads} % {group} == 0"
        bad_call(op, "sizes", expected=f"{heads} a multiple of {group}", got=f"{s.HV} and {s.H}", fix=fix)
    chosen = dict(options)
    name, pool = chosen.pop("state_dtype", "float32"), chosen.pop("pool", "none")
    pools = getattr(torch, str(name), None)
    if not isinstance(pools, torch.dtype):
        bad_call(op, "state_dtype", expected="float32 or bfloat16", got=repr(name), fix="name one of these")
    made = make_inputs(op, s, dtype, device, seed=seed, state_dtype=pools, pool=pool, options=tuple(chosen.items()))
    return made.args, made.kwargs


def example(op: str) -> functools.partial[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example function of one op: (sizes, dtype, device, ...) -> (args, kwargs)."""
    return functools.partial(_example, op)


def tolerance(dtype: torch.dtype, what: str = "o") -> float:
    """Largest error |x - reference| / |reference| (Frobenius norms, reference in float64 from the same rounded inputs).

    dtype: of q, k, v for o, of the pool for a state. All is float32 but the last conversion: rounding errs by at most u = 2^-8
    (bf16) or 2^-11 (fp16), truncating (bf16 in Triton's interpreter) by 2 u. In float32 the errors of exp and of sums of some
    hundred terms remain.
    """
    return {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}.get(dtype, 1e-11)


_BF16, _FP16 = torch.bfloat16, torch.float16


def _row(name: str, *sizes: int, tags: str = "small interpreter", **fields: Any) -> tuple[str, Sizes, frozenset[str], dict[str, Any]]:
    return name, Sizes(*sizes), frozenset(tags.split()), fields


#: Rows that every op gets (those about gates: every gated op). B, H, HV, K, V.
_ROWS = (
    _row("plain", 3, 2, 2, 16, 32),
    _row("no_rows", 0, 1, 1, 16, 16),
    _row("one_row", 1, 1, 1, 32, 16, fused=True),
    _row("tiny", 2, 1, 2, 1, 3),
    _row("slots", 4, 2, 2, 32, 32, pool="slots"),
    _row("padded", 7, 1, 2, 16, 20, pool="padded", fused=True),
    _row("all_options", 7, 2, 4, 20, 36, pool="padded", fused=True, options=(("qk_l2norm", True), ("scale", 0.3))),
    _row("group4", 2, 2, 8, 32, 16, pool="slots"),
    _row("d80", 2, 1, 1, 80, 80),
    _row("d100_d64", 2, 1, 2, 100, 64, pool="slots"),
    _row("d64_d128", 2, 1, 1, 64, 128, fused=True),
    _row("d129_d17", 2, 1, 1, 129, 17),
    _row("d256", 2, 1, 1, 256, 256, pool="slots", source="RetNet 1.3B, GLA 1.3B"),
    _row("bf16", 3, 2, 4, 32, 32, dtype=_BF16, pool="padded"),
    _row("bf16_both", 3, 2, 2, 64, 32, dtype=_BF16, state_dtype=_BF16, pool="padded", fused=True),
    _row("fp16", 3, 2, 2, 32, 48, dtype=_FP16, fused=True),
    _row("narrow_state", 3, 2, 2, 32, 48, state_dtype=_BF16),
    _row("gpu", 65, 4, 8, 128, 128, tags="gpu", dtype=_BF16, pool="padded", fused=True),
    _row("gpu_narrow", 200, 4, 4, 128, 64, tags="gpu", dtype=_BF16, state_dtype=_BF16, pool="padded"),
    _row("gpu_wide", 9, 4, 4, 256, 256, tags="gpu", dtype=_FP16, pool="slots"),
    _row("gpu_float32", 40, 4, 8, 64, 128, tags="gpu", pool="padded", fused=True),
    _row("bench_256", 256, 32, 32, 128, 128, tags="bench", dtype=_BF16, source="4096-wide models, batch 256"),
    _row("bench_1", 1, 32, 32, 128, 128, tags="bench", dtype=_BF16, source="4096-wide models, batch 1"),
)

_GATE_ROWS = tuple(_row(regime, 5, 1, 2, 16, 32, pool="padded", regime=regime) for regime in ("strong", "none", "reset"))

#: Options that one op alone has.
_OWN: dict[str, tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]] = {
    "linear_attn_step": (("normalized", (("normalize", True),)),),
    "mamba2_step": (("gated", (("gated", True), ("dt_limit", (0.002, 0.5)))), ("bare", (("plain", True), ("dt_limit", (0.001, 0.2))))),
}


def _make_cases() -> Iterator[Case]:
    for op in OP_NAMES:
        for name, sizes, tags, fields in _ROWS + (_GATE_ROWS if op in GATED else ()):
            tags = tags | {"gpu"} if "small" in tags else tags
            fields = dict(fields)
            options = fields.pop("options", ())
            if op == "mamba2_step":
                options = ()
            yield Case(name, op, sizes, tags=tags, options=options, **fields)
            for label, own in _OWN.get(op, ()) if "bench" not in tags else ():
                yield Case(f"{name}_{label}", op, sizes, tags=tags, options=options + own, **fields)


CASES: tuple[Case, ...] = tuple(_make_cases())


def select(tag: str, op: str | None = None) -> tuple[Case, ...]:
    """The cases with a tag, of one op or all."""
    return tuple(c for c in CASES if tag in c.tags and op in (None, c.op))
