"""Named cases and the input generator of a step; sizes in the recurrence's letters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import bad_call
from .._shared.inputs import Draw, make_gates, make_raw_gate
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

OP_NAMES = ("delta_step", "gated_delta_step", "kda_step", "comba_step", "delta_product_step")
GATED = ("gated_delta_step", "kda_step", "comba_step", "delta_product_step")
ARGUMENTS = {
    "delta_step": ("q", "k", "v", "beta"),
    "gated_delta_step": ("q", "k", "v", "g", "beta"),
    "kda_step": ("q", "k", "v", "g", "beta"),
    "comba_step": ("q", "k", "v", "p", "g", "beta"),
    "delta_product_step": ("q", "k", "v", "g", "beta"),
}


def make_qkv(draw: Draw, s: Sizes, dtype: torch.dtype, fused: bool, raw: bool, updates: tuple[int, ...] = ()) -> tuple[torch.Tensor, ...]:
    """q and v of unit variance, k of unit length (raw: of unit variance); updates: (n,) where k and v have that dimension."""
    q = draw.normal(s.B, s.H, s.K)
    k, v = draw.normal(s.B, *updates, s.H, s.K), draw.normal(s.B, *updates, s.HV, s.V)
    q, k, v = q.to(dtype), (k if raw else F.normalize(k, dim=-1)).to(dtype), v.to(dtype)
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
    """Inputs of one call, the same for one seed and device; no zeros stand in for data.

    options: keyword arguments of the op, and raw (logits and gates as layers project them, with every transform inside), ungated.
    """
    device = torch.device(device)
    draw, s, chosen = Draw(device, seed), sizes, dict(options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    raw, ungated = chosen.pop("raw", False), chosen.pop("ungated", False)
    kwargs: dict[str, Any] = {}
    updates: tuple[int, ...] = ()
    if op == "delta_product_step":
        kwargs["num_householder"] = chosen.pop("num_householder", 2)
        updates = (kwargs["num_householder"],)
    found: dict[str, torch.Tensor | None] = dict(zip("qkv", make_qkv(draw, s, dtype, fused, raw, updates), strict=True))
    logits, p = draw.normal(s.B, *updates, s.HV), draw.uniform(0.5, 1.0, s.H, 1)
    found["beta"] = logits.to(dtype) if raw else torch.sigmoid(logits).to(wide)
    if op in GATED and not ungated:
        shape = (s.B, s.HV, s.K) if op == "kda_step" else (s.B, s.HV)
        found["g"] = draw.normal(*shape).to(dtype) if raw else make_gates(draw, regime, *shape).to(wide)
        if fused:
            found["g"], found["beta"] = as_slices(found["g"].to(dtype), found["beta"].to(dtype))
    if op == "comba_step":
        found["p"] = (found["k"].to(torch.float32) * p).to(dtype)
    if raw:
        kwargs |= {"use_qk_l2norm": True, "use_beta_sigmoid": True}
        kwargs |= make_raw_gate(draw, wide, s.HV, s.K if op == "kda_step" else 0) if found.get("g") is not None else {}
    kwargs |= chosen
    slots, S = (None, s.B) if pool == "none" else make_slots(s.B, pool == "padded", device)
    if slots is not None:
        kwargs["slots"] = slots
    state = make_pool(0.5 * draw.normal(S, s.HV, s.K, s.V), torch.float64 if dtype == torch.float64 else state_dtype, fused)
    return Inputs((*(found.get(name) for name in ARGUMENTS[op]), state), kwargs)


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

    options: those of make_inputs, and `state_dtype` (a name) and `pool` (of a Case).
    """
    if lengths is not None or requires_grad:
        one_token_alone(op, "a pack" if lengths is not None else "a gradient")
    s = Sizes(sizes["B"], sizes["H"], sizes.get("HV", 0) or sizes["H"], sizes["K"], sizes["V"])
    if s.HV % s.H:
        bad_call(op, "sizes", expected="HV a multiple of H", got=f"{s.HV} and {s.H}", fix="choose HV % H == 0")
    chosen = dict(options)
    name, pool = chosen.pop("state_dtype", "float32"), chosen.pop("pool", "none")
    made = make_inputs(op, s, dtype, device, seed=seed, state_dtype=pool_dtype(op, name), pool=pool, options=tuple(chosen.items()))
    return made.args, made.kwargs


def example(op: str) -> functools.partial[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example function of one op: (sizes, dtype, device, ...) -> (args, kwargs)."""
    return functools.partial(_example, op)


_BF16, _RAW = torch.bfloat16, (("raw", True),)

_ROWS = (
    *ROWS,
    row("raw", 7, 2, 4, 20, 36, pool="padded", fused=True, options=(*_RAW, ("scale", 0.3))),
    row("raw_doubled", 3, 1, 2, 32, 16, options=(*_RAW, ("allow_neg_eigval", True))),
    row("raw_bf16", 4, 2, 4, 32, 32, dtype=_BF16, pool="padded", fused=True, options=_RAW),
    row("gpu_raw", 65, 4, 8, 128, 128, tags="gpu", dtype=_BF16, pool="padded", fused=True, options=_RAW),
)

_GATE_ROWS = (
    *GATE_ROWS,
    row("bounded", 3, 1, 2, 32, 16, pool="padded", options=(*_RAW, ("lower_bound", -5.0))),
    row("bounded_alone", 3, 1, 2, 20, 16, options=(*_RAW, ("lower_bound", -5.0), ("A_log", None), ("dt_bias", None))),
    row("without_bias", 3, 1, 2, 20, 16, options=(*_RAW, ("dt_bias", None))),
)

_PRODUCT_ROWS = (
    row("one_update", 3, 1, 2, 16, 16, pool="slots", options=(("num_householder", 1),)),
    row("three_updates", 5, 1, 2, 20, 36, pool="padded", fused=True, options=(("num_householder", 3),)),
    row("ungated", 3, 1, 2, 16, 16, pool="slots", options=(("ungated", True),)),
)


def _make_cases() -> Iterator[Case]:
    for op in OP_NAMES:
        own = (*_ROWS, *(_GATE_ROWS if op in GATED else ()), *(_PRODUCT_ROWS if op == "delta_product_step" else ()))
        for name, sizes, tags, fields in own:
            yield Case(make_inputs, name, op, sizes, tags=tags | {"gpu"} if "small" in tags else tags, **fields)


CASES: tuple[Case, ...] = tuple(_make_cases())


def select(tag: str, op: str | None = None) -> tuple[Case, ...]:
    """The cases with a tag, of one op or all."""
    return tuple(c for c in CASES if tag in c.tags and op in (None, c.op))
