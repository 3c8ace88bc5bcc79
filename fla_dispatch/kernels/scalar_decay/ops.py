"""The contracts: linear_attn, retention, lightning_attn, simple_gla and mamba2, each a check of its call and a Lowering.

Shared by all (what single docstrings do not repeat): q, k: [B, T, H, K]; v: [B, T, HV, V] with HV a multiple of H, value
head j using query head j // (HV / H); one dtype of bfloat16, float16, float32 (float64 in torch variants alone), which
o gets too. Under autocast q, k, v are cast to its dtype. Non-contiguous tensors are welcome. scale defaults to K^(-1/2).
States are float32 [N, HV, K, V] with N = B, or the number of sequences of a pack. cu_seqlens packs N sequences in one row
(B = 1): cumulative lengths [N + 1], int32 or int64 on q's device, or a SeqInfo. A wrong call raises CallError (a
ValueError) that names what was expected, what came and what to do.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...errors import bad_call
from ...registry import Lowering, Op
from ...sequences import SeqInfo
from .._shared.contract import Names, check_companion, check_flag, check_limits, check_packing, check_qkv, check_scale, check_state, shown
from .._shared.pair import apply, fusable
from .cases import example
from .recurrence import Options, Tensors

_STATE = "[N, HV, K, V]"
_new = tuple.__new__  # makes a NamedTuple in half the time of its constructor, which is Python


class LinearState(NamedTuple):
    """State of linear_attn(normalize=True): S [N, HV, K, V] and the normaliser z [N, HV, K], float32."""

    S: torch.Tensor
    z: torch.Tensor


def _lower(
    where: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    decay: str,
    rate: float,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | SeqInfo | None,
) -> Lowering:
    """The contract that retention, lightning_attn, simple_gla and plain linear_attn share."""
    q, k, v, B, T, K, HV, V, dtype, device = check_qkv(where, q, k, v)
    if g is not None:
        g = check_companion(where, "g", g, (B, T, HV), "[B, T, HV]", dtype, device, "q")
    cu = host = segments = None
    N = B
    if cu_seqlens is not None:
        cu, host, segments = check_packing(where, cu_seqlens, B, device, "q")
        N = cu.shape[0] - 1
    if initial_state is not None:
        check_state(where, "initial_state", initial_state, (N, HV, K, V), _STATE, dtype, device, "q")
    scale = K**-0.5 if scale is None else check_scale(where, scale)
    check_flag(where, "output_final_state", output_final_state)
    tensors = _new(Tensors, (q, k, v, g, None, None, initial_state, None, cu, host, segments))
    return _new(Lowering, ("scalar_decay", tensors, _new(Options, (scale, decay, rate, False, output_final_state)), None, None))


def _linear_state(outputs: tuple[Any, ...]) -> tuple[torch.Tensor, LinearState]:
    o, state, z, _ = outputs
    return o, LinearState(state, z)


def linear_attn(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    *,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: torch.Tensor | LinearState | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """Linear attention without decay.

        S_t = S_{t-1} + k_t v_t^T,   o_t = scale * q_t S_t
        normalize:  z_t = z_{t-1} + k_t,   o_t = scale * q_t S_t / (scale * q_t z_t + 1e-10)

    normalize wants q and k >= 0 (after a feature map), else the denominator may vanish; this is not checked. Its state, in
    and out, is LinearState(S [N, HV, K, V], z [N, HV, K]), float32. Returns (o, final state or None).

    Paper: Katharopoulos et al. 2020, arXiv 2006.16236.
    """
    check_flag("linear_attn", "normalize", normalize)
    if not normalize:
        if isinstance(initial_state, tuple):
            fix = "pass state.S, or set normalize=True"
            bad_call("linear_attn", "initial_state", expected="one tensor with normalize=False", got=shown(initial_state), fix=fix)
        return _lower("linear_attn", q, k, v, None, "none", 0.0, scale, initial_state, output_final_state, cu_seqlens)
    S = z = None
    if initial_state is not None:
        if not isinstance(initial_state, tuple) or len(initial_state) != 2:
            fix = "pass the LinearState that a call with normalize=True returned, or LinearState(S, z)"
            bad_call("linear_attn", "initial_state", expected="a LinearState(S, z) with normalize=True", got=shown(initial_state), fix=fix)
        S, z = initial_state
        if S is None:
            bad_call(
                "linear_attn", "initial_state.S", expected="a torch.Tensor", got="None", fix="pass both S and z, or initial_state=None"
            )
    low = _lower("linear_attn", q, k, v, None, "none", 0.0, scale, S, output_final_state, cu_seqlens)
    t, o = low.tensors, low.options
    if initial_state is not None:
        check_state("linear_attn", "initial_state.z", z, S.shape[:3], "[N, HV, K]", t.q.dtype, t.q.device, "q")
        t = Tensors(t.q, t.k, t.v, None, None, None, S, z, t.cu, t.host, t.segments)
    return Lowering(
        "scalar_decay", t, Options(o.scale, "none", 0.0, True, output_final_state), None, _linear_state if output_final_state else None
    )


def retention(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """Retention: linear attention with a constant decay per value head.

        S_t = a_h S_{t-1} + k_t v_t^T,   o_t = scale * q_t S_t,   a_h = 1 - 2^(-5-h),   h = 0 ... HV - 1

    Rotary position embedding and the group norm of RetNet belong to the layer. Returns (o [B, T, HV, V], final state
    [N, HV, K, V] float32 or None).

    Paper: Sun et al. 2023 (RetNet), arXiv 2307.08621.
    """
    return _lower("retention", q, k, v, None, "retention", 0.0, scale, initial_state, output_final_state, cu_seqlens)


def lightning_attn(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    *,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """Lightning attention: a constant decay per value head that weakens with depth.

        S_t = exp(-s_h) S_{t-1} + k_t v_t^T,   o_t = scale * q_t S_t,   s_h = (8 / HV) (1 - layer_idx / num_layers) h

    layer_idx counts from 0 and is below num_layers. Returns (o [B, T, HV, V], final state [N, HV, K, V] float32 or None).

    Paper: Qin et al. 2024 (Lightning Attention-2), arXiv 2401.04658; used by TransNormerLLM and MiniMax-01.
    """
    if not isinstance(layer_idx, int) or not isinstance(num_layers, int) or not 0 <= layer_idx < num_layers:
        got = f"layer_idx = {layer_idx!r}, num_layers = {num_layers!r}"
        fix = "count layers from 0 and pass the model's number of layers"
        bad_call("lightning_attn", "layer_idx", expected="integers with 0 <= layer_idx < num_layers", got=got, fix=fix)
    rate = 1.0 - layer_idx / num_layers
    return _lower("lightning_attn", q, k, v, None, "lightning", rate, scale, initial_state, output_final_state, cu_seqlens)


def simple_gla(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    g: torch.Tensor,  # [B, T, HV]
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """Gated linear attention with one gate per token and value head.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale * q_t S_t

    g: [B, T, HV] natural-log decays <= 0, float32 or q's dtype; gates above zero are not checked and overflow; -inf resets
    the state. Returns (o [B, T, HV, V], final state [N, HV, K, V] float32 or None).

    Papers: Yang et al. 2023 (GLA), arXiv 2312.06635; Peng et al. 2021 (RFA's gate), arXiv 2103.02143.
    """
    if g is None:
        fix = "pass g [B, T, HV], or call linear_attn for no decay"
        bad_call("simple_gla", "g", expected="a tensor [B, T, HV]", got="None", fix=fix)
    return _lower("simple_gla", q, k, v, g, "token", 0.0, scale, initial_state, output_final_state, cu_seqlens)


def step_sizes(
    dt: torch.Tensor,  # [B, T, H]
    A: torch.Tensor,  # [H]
    dt_bias: torch.Tensor | None,  # [H]
    softplus: bool,
    limits: tuple[float, float] | None,
    wide: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d and d A of mamba2 in torch."""
    step = dt.to(wide)
    if dt_bias is not None:
        step = step + dt_bias.to(wide)
    if softplus:
        step = F.softplus(step)
    if limits is not None:
        step = step.clamp(*limits)
    return step, step * A.to(wide)


SSD = Names(q="C", k="B", v="x", H="G", HV="H", K="N", V="P")


def mamba2(
    x: torch.Tensor,  # [B, T, H, P]
    dt: torch.Tensor,  # [B, T, H]
    A: torch.Tensor,  # [H]
    B: torch.Tensor,  # [B, T, G, N]
    C: torch.Tensor,  # [B, T, G, N]
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """The state-space scan of Mamba-2 (SSD).

        d_t = clamp(softplus(dt_t + dt_bias), dt_limit)      (softplus only with dt_softplus)
        S_t = exp(d_t A_h) S_{t-1} + d_t B_t x_t^T,   y_t = C_t S_t + D_h x_t,   y_t <- y_t silu(z_t)

    x: [B, T, H, P], dt: [B, T, H], A: [H] negative, B, C: [B, T, G, N] with H a multiple of G (head j uses group
    j // (H / G)), D: [H] or [H, P], z: [B, T, H, P], dt_bias: [H]. B, C, x have one dtype; the others are float32 or x's
    dtype, and d_t, D and z are computed in float32. States are [batch, H, N, P] (the published code transposes the last
    two). There is no scale. Returns (y [B, T, H, P] of x's dtype, final state or None).

    Paper: Dao and Gu 2024, arXiv 2405.21060.
    """
    C, B, x, rows, T, K, H, P, dtype, device = check_qkv("mamba2", C, B, x, SSD)
    dt = check_companion("mamba2", "dt", dt, (rows, T, H), "[B, T, H]", dtype, device, "x")
    A = check_companion("mamba2", "A", A, (H,), "[H]", dtype, device, "x")
    if dt_bias is not None:
        dt_bias = check_companion("mamba2", "dt_bias", dt_bias, (H,), "[H]", dtype, device, "x")
    skip = channels = None  # D [H] is part of the recurrence, D [H, P] is added to its output
    if isinstance(D, torch.Tensor) and D.dim() == 2:
        channels = check_companion("mamba2", "D", D, (H, P), "[H, P]", dtype, device, "x")
    elif D is not None:
        skip = check_companion("mamba2", "D", D, (H,), "[H] (or [H, P])", dtype, device, "x")
    if z is not None:
        z = check_companion("mamba2", "z", z, (rows, T, H, P), "[B, T, H, P]", dtype, device, "x")
    low, high = check_limits("mamba2", "dt_limit", dt_limit)
    check_flag("mamba2", "dt_softplus", dt_softplus)
    check_flag("mamba2", "output_final_state", output_final_state)
    cu = host = segments = None
    batch = rows
    if cu_seqlens is not None:
        cu, host, segments = check_packing("mamba2", cu_seqlens, rows, device, "x")
        batch = cu.shape[0] - 1
    if initial_state is not None:
        check_state("mamba2", "initial_state", initial_state, (batch, H, K, P), "[batch, H, N, P]", dtype, device, "x")

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    limits = (low, high) if high != math.inf or low > 0.0 or not dt_softplus else None

    def prepare(t: Tensors) -> Tensors:
        """dt stands in for the gate g = d A and the weight beta = d, [B, T, H]."""
        if wide is torch.float32 and fusable(t.g, A, dt_bias):
            from .ends import pairs

            beta, g = apply(pairs.steps(dt_softplus, limits), t.g, A, dt_bias)
        else:
            beta, g = step_sizes(t.g, A, dt_bias, dt_softplus, limits, wide)
        return Tensors(t.q, t.k, t.v, g, beta, t.skip, t.h0, t.z0, t.cu, t.host, t.segments)

    def finish(outputs: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A skip per channel and the gate, in float32."""
        y, state, _, _ = outputs
        if channels is not None:
            y = y.to(wide) + x.to(wide) * channels.to(wide)
        if z is not None:
            if wide is torch.float32 and fusable(y, z):
                from .ends import pairs

                (y,) = apply(pairs.gate(dtype), y, z)
            else:
                y = y.to(wide) * F.silu(z.to(wide))
        return y.to(dtype), state if output_final_state else None

    return Lowering(
        "scalar_decay",
        Tensors(C, B, x, dt, dt, skip, initial_state, None, cu, host, segments),
        Options(1.0, "token", 0.0, False, output_final_state),
        prepare,
        finish if channels is not None or z is not None else None,
    )


_SIZES = {"B": 4, "T": 4096, "H": 16, "HV": 0, "K": 128, "V": 128}  # HV = 0 stands for HV = H

OPS: tuple[Op, ...] = (
    Op("linear_attn", "scalar_decay", linear_attn, _SIZES, example("linear_attn")),
    Op("retention", "scalar_decay", retention, _SIZES, example("retention")),
    Op("lightning_attn", "scalar_decay", lightning_attn, _SIZES, example("lightning_attn")),
    Op("simple_gla", "scalar_decay", simple_gla, _SIZES, example("simple_gla")),
    Op("mamba2", "scalar_decay", mamba2, {"B": 4, "T": 4096, "H": 32, "G": 1, "P": 64, "N": 128}, example("mamba2")),
)
