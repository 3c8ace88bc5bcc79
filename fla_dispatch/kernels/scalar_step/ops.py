"""The contracts of decoding: linear_attn_step, retention_step, lightning_attn_step, simple_gla_step and mamba2_step.

One token of every row of a batch, as the op without `_step` computes it, against states that are updated in place. Shared by all
(what single docstrings do not repeat): q, k: [B, H, K]; v: [B, HV, V] with HV a multiple of H, value head j using query head
j // (HV / H); one dtype of bfloat16, float16, float32 (float64 in torch variants alone), which o [B, HV, V] gets too; under
autocast cast to its dtype. They may be slices of one projection: with contiguous last dimensions nothing is copied. scale
defaults to K^(-1/2).

state: a pool [S, HV, K, V], float32 or bfloat16 (rounded at every step), whose slots are contiguous; the pool itself may be a slice
of a larger one. It is UPDATED IN PLACE. slots: [B], int32 or int64, the row of the pool that each row of the batch has; None: row b,
and S = B. A negative slot is padding: nothing is read or written for that row, and its output is zero. Slots that stand twice
race with each other, and slots past the pool write anywhere: neither is checked, since their values are on the device.

qk_l2norm: q and k are divided by sqrt(|x|^2 + 1e-6) first. There is no gradient: a tensor that requires one raises unless gradients
are off. A wrong call raises CallError (a ValueError) that names what was expected, what came and what to do.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...errors import bad_call
from ...registry import Lowering, Op
from .._shared.contract import Names, check_companion, check_flag, check_limits, check_scale, shown
from .._shared.steps import check_no_grad, check_pool, check_slots, check_token
from .cases import example
from .recurrence import Options, Tensors

_STATE = "[S, HV, K, V]"
_new = tuple.__new__  # makes a NamedTuple in half the time of its constructor, which is Python
_WIDE, _NARROW = (torch.float64,), (torch.float32, torch.bfloat16)


def _output(outputs: tuple[Any, ...]) -> torch.Tensor:
    """A step returns its output alone."""
    return outputs[0]


def _lower(
    where: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor,
    z: torch.Tensor | None,
    decay: str,
    rate: float,
    normalize: bool,
    slots: torch.Tensor | None,
    scale: float | None,
    qk_l2norm: bool,
) -> Lowering:
    """The contract that all but mamba2_step share."""
    q, k, v, B, K, HV, V, dtype, device = check_token(where, q, k, v)
    if g is not None:
        g = check_companion(where, "g", g, (B, HV), "[B, HV]", dtype, device, "q")
    if slots is not None:
        check_slots(where, slots, B, device, "q")
    rows = B if slots is None else None
    exact = dtype is torch.float64
    name = "state.S" if normalize else "state"
    check_pool(where, name, state, (HV, K, V), _STATE, _WIDE if exact else _NARROW, device, "q", rows)
    if normalize:
        check_pool(where, "state.z", z, (HV, K), "[S, HV, K]", _WIDE if exact else _NARROW[:1], device, "q", rows)
        if z.shape[0] != state.shape[0]:
            fix = "pass both pools with the same number of slots"
            bad_call(where, "rows of state.z", expected=f"S = {state.shape[0]} as in state.S", got=f"S = {z.shape[0]}", fix=fix)
    check_no_grad(where, (("q", q), ("k", k), ("v", v), ("g", g), ("state", state), ("state.z", z)))
    scale = K**-0.5 if scale is None else check_scale(where, scale)
    tensors = _new(Tensors, (q, k, v, state, z, slots, g, None, None, None, None))
    check_flag(where, "qk_l2norm", qk_l2norm)
    options = _new(Options, (scale, decay, rate, normalize, qk_l2norm, False, 0.0, math.inf))
    return _new(Lowering, ("scalar_step", tensors, options, None, _output))


def linear_attn_step(
    q: torch.Tensor,  # [B, H, K]
    k: torch.Tensor,  # [B, H, K]
    v: torch.Tensor,  # [B, HV, V]
    state: torch.Tensor | tuple[torch.Tensor, torch.Tensor],  # [S, HV, K, V], or (S, z [S, HV, K]); updated in place
    *,
    slots: torch.Tensor | None = None,
    normalize: bool = False,
    scale: float | None = None,
    qk_l2norm: bool = False,
) -> Lowering:
    """One token of linear attention without decay; updates the state in place.

        S <- S + k v^T,   o = scale * q S
        normalize:  z <- z + k,   o = scale * q S / (scale * q z + 1e-10)

    With normalize the state is the pair (S, z) that linear_attn returns (LinearState), z a pool [S, HV, K] that is always
    float32: it is a long sum. Returns o [B, HV, V].

    Paper: Katharopoulos et al. 2020, arXiv 2006.16236.
    """
    check_flag("linear_attn_step", "normalize", normalize)
    if not normalize:
        if isinstance(state, tuple):
            fix = "pass state.S, or set normalize=True"
            bad_call("linear_attn_step", "state", expected="one tensor with normalize=False", got=shown(state), fix=fix)
        return _lower("linear_attn_step", q, k, v, None, state, None, "none", 0.0, False, slots, scale, qk_l2norm)
    if not isinstance(state, tuple) or len(state) != 2:
        fix = "pass the LinearState that linear_attn(normalize=True) returned, or a pair of pools (S, z)"
        bad_call("linear_attn_step", "state", expected="a LinearState(S, z) with normalize=True", got=shown(state), fix=fix)
    return _lower("linear_attn_step", q, k, v, None, *state, "none", 0.0, True, slots, scale, qk_l2norm)


def retention_step(
    q: torch.Tensor,  # [B, H, K]
    k: torch.Tensor,  # [B, H, K]
    v: torch.Tensor,  # [B, HV, V]
    state: torch.Tensor,  # [S, HV, K, V], updated in place
    *,
    slots: torch.Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
) -> Lowering:
    """One token of retention; updates the state in place.

        S <- a_h S + k v^T,   o = scale * q S,   a_h = 1 - 2^(-5-h),   h = 0 ... HV - 1

    Returns o [B, HV, V].

    Paper: Sun et al. 2023 (RetNet), arXiv 2307.08621.
    """
    return _lower("retention_step", q, k, v, None, state, None, "retention", 0.0, False, slots, scale, qk_l2norm)


def lightning_attn_step(
    q: torch.Tensor,  # [B, H, K]
    k: torch.Tensor,  # [B, H, K]
    v: torch.Tensor,  # [B, HV, V]
    state: torch.Tensor,  # [S, HV, K, V], updated in place
    *,
    layer_idx: int,
    num_layers: int,
    slots: torch.Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
) -> Lowering:
    """One token of lightning attention; updates the state in place.

        S <- exp(-s_h) S + k v^T,   o = scale * q S,   s_h = (8 / HV) (1 - layer_idx / num_layers) h

    layer_idx counts from 0 and is below num_layers. Returns o [B, HV, V].

    Paper: Qin et al. 2024 (Lightning Attention-2), arXiv 2401.04658.
    """
    if not isinstance(layer_idx, int) or not isinstance(num_layers, int) or not 0 <= layer_idx < num_layers:
        got = f"layer_idx = {layer_idx!r}, num_layers = {num_layers!r}"
        fix = "count layers from 0 and pass the model's number of layers"
        bad_call("lightning_attn_step", "layer_idx", expected="integers with 0 <= layer_idx < num_layers", got=got, fix=fix)
    rate = 1.0 - layer_idx / num_layers
    return _lower("lightning_attn_step", q, k, v, None, state, None, "lightning", rate, False, slots, scale, qk_l2norm)


def simple_gla_step(
    q: torch.Tensor,  # [B, H, K]
    k: torch.Tensor,  # [B, H, K]
    v: torch.Tensor,  # [B, HV, V]
    g: torch.Tensor,  # [B, HV]
    state: torch.Tensor,  # [S, HV, K, V], updated in place
    *,
    slots: torch.Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
) -> Lowering:
    """One token of gated linear attention with a gate per value head; updates the state in place.

        S <- exp(g) S + k v^T,   o = scale * q S

    g: [B, HV] natural-log decays <= 0, float32 or q's dtype; gates above zero are not checked; -inf resets the state.
    Returns o [B, HV, V].

    Paper: Yang et al. 2023 (GLA), arXiv 2312.06635.
    """
    if g is None:
        fix = "pass g [B, HV], or call linear_attn_step for no decay"
        bad_call("simple_gla_step", "g", expected="a tensor [B, HV]", got="None", fix=fix)
    return _lower("simple_gla_step", q, k, v, g, state, None, "token", 0.0, False, slots, scale, qk_l2norm)


SSD = Names(q="C", k="B", v="x", H="G", HV="H", K="N", V="P")


def mamba2_step(
    x: torch.Tensor,  # [B, H, P]
    dt: torch.Tensor,  # [B, H]
    A: torch.Tensor,  # [H]
    B: torch.Tensor,  # [B, G, N]
    C: torch.Tensor,  # [B, G, N]
    state: torch.Tensor,  # [S, H, N, P], updated in place
    *,
    slots: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Lowering:
    """One token of the state-space scan of Mamba-2; updates the state in place.

        d = clamp(softplus(dt + dt_bias), dt_limit)      (softplus only with dt_softplus)
        S <- exp(d A_h) S + d B x^T,   y = C S + D_h x,   y <- y silu(z)

    x: [B, H, P], dt: [B, H], A: [H] negative, B, C: [B, G, N] with H a multiple of G (head j uses group j // (H / G)), D: [H] or
    [H, P], z: [B, H, P], dt_bias: [H]. B, C, x have one dtype; the others are float32 or x's dtype. All of it is one kernel, in
    float32. state: pool [S, H, N, P]. There is no scale. Returns y [B, H, P].

    Paper: Dao and Gu 2024, arXiv 2405.21060.
    """
    where = "mamba2_step"
    C, B, x, rows, K, H, P, dtype, device = check_token(where, C, B, x, SSD)
    dt = check_companion(where, "dt", dt, (rows, H), "[B, H]", dtype, device, "x")
    A = check_companion(where, "A", A, (H,), "[H]", dtype, device, "x")
    if dt_bias is not None:
        dt_bias = check_companion(where, "dt_bias", dt_bias, (H,), "[H]", dtype, device, "x")
    if D is not None:
        channel = isinstance(D, torch.Tensor) and D.dim() == 2
        D = check_companion(where, "D", D, (H, P) if channel else (H,), "[H, P]" if channel else "[H] (or [H, P])", dtype, device, "x")
    if z is not None:
        z = check_companion(where, "z", z, (rows, H, P), "[B, H, P]", dtype, device, "x")
    low, high = check_limits(where, "dt_limit", dt_limit)
    check_flag(where, "dt_softplus", dt_softplus)
    if slots is not None:
        check_slots(where, slots, rows, device, "x")
    pools = _WIDE if dtype is torch.float64 else _NARROW
    check_pool(where, "state", state, (H, K, P), "[S, H, N, P]", pools, device, "x", rows if slots is None else None)
    check_no_grad(
        where, (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C), ("state", state), ("D", D), ("z", z), ("dt_bias", dt_bias)),
    )  # fmt: skip
    return Lowering(
        "scalar_step",
        Tensors(C, B, x, state, None, slots, dt, A, dt_bias, D, z),
        Options(1.0, "ssd", 0.0, False, False, dt_softplus, float(low), float(high)),
        None,
        _output,
    )


_SIZES = {"B": 256, "H": 32, "HV": 0, "K": 128, "V": 128}  # HV = 0 stands for HV = H

OPS: tuple[Op, ...] = (
    Op("linear_attn_step", "scalar_step", linear_attn_step, _SIZES, example("linear_attn_step")),
    Op("retention_step", "scalar_step", retention_step, _SIZES, example("retention_step")),
    Op("lightning_attn_step", "scalar_step", lightning_attn_step, _SIZES, example("lightning_attn_step")),
    Op("simple_gla_step", "scalar_step", simple_gla_step, _SIZES, example("simple_gla_step")),
    Op("mamba2_step", "scalar_step", mamba2_step, {"B": 256, "H": 64, "G": 1, "P": 64, "N": 128}, example("mamba2_step")),
)
