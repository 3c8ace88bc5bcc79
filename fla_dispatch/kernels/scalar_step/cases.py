"""Named cases, the input generator and the tolerances of a step.

Sizes are written in the recurrence's letters (B, H, HV, K, V); for mamba2_step they stand for (B, G, H, N, P).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import bad_call
from .._shared.inputs import Draw, make_gates
from .._shared.step_cases import (
    GATE_ROWS,
    ROWS,
    Case,
    Inputs,
    Sizes,
    as_slices,
    make_pool,
    make_slots,
    one_token_alone,
    pool_dtype,
    row,
    tolerance,
)

__all__ = ["CASES", "GATED", "OP_NAMES", "Case", "Inputs", "Sizes", "example", "make_inputs", "select", "tolerance"]

OP_NAMES = ("linear_attn_step", "retention_step", "lightning_attn_step", "simple_gla_step", "mamba2_step")
GATED = ("simple_gla_step", "mamba2_step")


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
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return as_slices(q, k, v) if fused else (q, k, v)


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
        one_token_alone(op, "a pack" if lengths is not None else "a gradient")
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
    made = make_inputs(op, s, dtype, device, seed=seed, state_dtype=pool_dtype(op, name), pool=pool, options=tuple(chosen.items()))
    return made.args, made.kwargs


def example(op: str) -> functools.partial[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example function of one op: (sizes, dtype, device, ...) -> (args, kwargs)."""
    return functools.partial(_example, op)


_ROWS = (*ROWS, row("all_options", 7, 2, 4, 20, 36, pool="padded", fused=True, options=(("qk_l2norm", True), ("scale", 0.3))))

#: Options that one op alone has.
_OWN: dict[str, tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]] = {
    "linear_attn_step": (("normalized", (("normalize", True),)),),
    "mamba2_step": (("gated", (("gated", True), ("dt_limit", (0.002, 0.5)))), ("bare", (("plain", True), ("dt_limit", (0.001, 0.2))))),
}


def _make_cases() -> Iterator[Case]:
    for op in OP_NAMES:
        for name, sizes, tags, fields in _ROWS + (GATE_ROWS if op in GATED else ()):
            tags = tags | {"gpu"} if "small" in tags else tags
            fields = dict(fields)
            options = fields.pop("options", ())
            if op == "mamba2_step":
                options = ()
            yield Case(make_inputs, name, op, sizes, tags=tags, options=options, **fields)
            for label, own in _OWN.get(op, ()) if "bench" not in tags else ():
                yield Case(make_inputs, f"{name}_{label}", op, sizes, tags=tags, options=options + own, **fields)


CASES: tuple[Case, ...] = tuple(_make_cases())


def select(tag: str, op: str | None = None) -> tuple[Case, ...]:
    """The cases with a tag, of one op or all."""
    return tuple(c for c in CASES if tag in c.tags and op in (None, c.op))
