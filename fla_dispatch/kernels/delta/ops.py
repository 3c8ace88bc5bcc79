"""The contracts: delta, gated_delta, kda, comba and delta_product, each a check of its call and a Lowering.

Shared by all (what single docstrings do not repeat): q, k: [B, T, H, K]; v: [B, T, HV, V] with HV a multiple of H, value
head j using query head j // (HV / H); one dtype of bfloat16, float16, float32 (float64 in torch variants alone), which
o gets too. Under autocast q, k, v (and p) are cast to its dtype. beta [B, T, HV] and gates are float32 or q's dtype.
Non-contiguous tensors are welcome. scale defaults to K^(-1/2). States are float32 [N, HV, K, V] with N = B, or the number of
sequences of a pack. cu_seqlens packs N sequences in one row (B = 1): cumulative lengths [N + 1], int32 or int64 on q's
device, or a SeqInfo. A wrong call raises CallError (a ValueError) that names what was expected, what came and what to do.

    use_qk_l2norm      q, k (and p) are divided by their length: x rsqrt(sum x^2 + 1e-6)
    use_beta_sigmoid   beta holds logits: sigmoid(beta) is the weight; with allow_neg_eigval 2 sigmoid(beta)
    use_gate           g holds raw input: the log decay is -exp(A_log) softplus(g + dt_bias), or with lower_bound (below 0)
                       lower_bound sigmoid(exp(A_log) (g + dt_bias)); A_log [HV] may then be left out, dt_bias always
"""

from __future__ import annotations

import torch

from ...errors import bad_call
from ...registry import Lowering, Op
from ...sequences import SeqInfo
from .._shared.contract import (
    check_companion,
    check_flag,
    check_packing,
    check_qkv,
    check_scale,
    check_state,
    shown,
)
from .._shared.delta_contract import check_gate, check_removal, check_weights
from .cases import example
from .recurrence import Options, Tensors
from .transforms import preparation

_STATE = "[N, HV, K, V]"
_new = tuple.__new__  # makes a NamedTuple in half the time of its constructor, which is Python


def _lower(
    where: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    p: torch.Tensor | None,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    decay: str,
    early: bool,
    updates: int,
    use_qk_l2norm: bool,
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
    use_gate: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | SeqInfo | None,
) -> Lowering:
    """The contract that all ops share; updates: per token, in k, v and beta."""
    whole_k, whole_v = k, v
    if updates > 1:
        k, v = k[:, ::updates], v[:, ::updates]
    q, k, v, B, T, K, HV, V, dtype, device = check_qkv(where, q, k, v)
    if updates > 1:
        k, v = whole_k.to(dtype), whole_v.to(dtype)
    if p is not None:
        p = check_removal(where, p, tuple(k.shape), "[B, T, H, K]", dtype, device)
    if g is not None:
        shape, dims = ((B, T, HV, K), "[B, T, HV, K]") if decay == "channel" else ((B, T, HV), "[B, T, HV]")
        g = check_companion(where, "g", g, shape, dims, dtype, device, "q")
    dims = "[B, T, HV]" if updates == 1 else "[B, T * num_householder, HV]"
    beta = check_companion(where, "beta", beta, (B, T * updates, HV), dims, dtype, device, "q")
    gate = check_gate(where, g, use_gate, A_log, dt_bias, lower_bound, HV, K if decay == "channel" else 0, dtype, device)
    check_flag(where, "use_qk_l2norm", use_qk_l2norm)
    check_weights(where, use_beta_sigmoid, allow_neg_eigval)
    cu = host = segments = None
    N = B
    if cu_seqlens is not None:
        cu, host, segments = check_packing(where, cu_seqlens, B, device, "q")
        N = cu.shape[0] - 1
    if initial_state is not None:
        check_state(where, "initial_state", initial_state, (N, HV, K, V), _STATE, dtype, device, "q")
    scale = K**-0.5 if scale is None else check_scale(where, scale)
    check_flag(where, "output_final_state", output_final_state)
    prepare = None
    if use_qk_l2norm or use_beta_sigmoid or gate is not None or updates > 1:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        prepare = preparation(norm=use_qk_l2norm, logits=use_beta_sigmoid, doubled=allow_neg_eigval, gate=gate, updates=updates, wide=wide)
    tensors = _new(Tensors, (q, k, v, p, g, beta, initial_state, cu, host, segments))
    return _new(Lowering, ("delta", tensors, _new(Options, (scale, decay, early, output_final_state)), prepare, None))


def _missing(where: str, name: str, dims: str, instead: str) -> None:
    bad_call(where, name, expected=f"a tensor {dims}", got="None", fix=f"pass {name} {dims}, or call {instead}")


def delta(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    beta: torch.Tensor,  # [B, T, HV]
    *,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """The delta rule: what a key stored is replaced, not added to.

        S_t = S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T,   o_t = scale * q_t S_t

    Keys should have unit length and beta be in (0, 1) (or (0, 2)): else states may grow without bound. The module's
    docstring names the options. Returns (o [B, T, HV, V], final state [N, HV, K, V] float32 or None).

    Papers: Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024 (DeltaNet), arXiv 2406.06484.
    """
    return _lower(
        "delta", q, k, v, None, None, beta, "none", False, 1, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, False, None, None, None,
        scale, initial_state, output_final_state, cu_seqlens,
    )  # fmt: skip


def gated_delta(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    g: torch.Tensor,  # [B, T, HV]
    beta: torch.Tensor,  # [B, T, HV]
    *,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    use_gate: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """The delta rule with one gate per token and value head.

        R_t = exp(g_t) S_{t-1},   S_t = R_t + beta_t k_t (v_t - k_t R_t)^T,   o_t = scale * q_t S_t

    g: [B, T, HV] natural-log decays <= 0 (or raw input: use_gate); gates above zero are not checked and overflow; -inf resets
    the state. Returns (o [B, T, HV, V], final state [N, HV, K, V] float32 or None).

    Paper: Yang et al. 2024 (Gated DeltaNet), arXiv 2412.06464.
    """
    if g is None:
        _missing("gated_delta", "g", "[B, T, HV]", "delta for no decay")
    return _lower(
        "gated_delta", q, k, v, None, g, beta, "token", False, 1, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, use_gate, A_log,
        dt_bias, lower_bound, scale, initial_state, output_final_state, cu_seqlens,
    )  # fmt: skip


def kda(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    g: torch.Tensor,  # [B, T, HV, K]
    beta: torch.Tensor,  # [B, T, HV]
    *,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    use_gate: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """Kimi Delta Attention: the delta rule with one gate per token, value head and key channel.

        R_t = Diag(exp(g_t)) S_{t-1},   S_t = R_t + beta_t k_t (v_t - k_t R_t)^T,   o_t = scale * q_t S_t

    g: [B, T, HV, K] natural-log decays <= 0 (or raw input: use_gate, with dt_bias [HV, K] or [HV * K]); gates above zero are
    not checked and overflow; -inf resets a row of the state. Returns (o [B, T, HV, V], final state [N, HV, K, V] float32 or None).

    Paper: Kimi Team 2025 (Kimi Linear), arXiv 2510.26692.
    """
    if g is None:
        _missing("kda", "g", "[B, T, HV, K]", "delta for no decay")
    return _lower(
        "kda", q, k, v, None, g, beta, "channel", False, 1, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, use_gate, A_log,
        dt_bias, lower_bound, scale, initial_state, output_final_state, cu_seqlens,
    )  # fmt: skip


def comba(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    p: torch.Tensor,  # [B, T, H, K]
    g: torch.Tensor,  # [B, T, HV]
    beta: torch.Tensor,  # [B, T, HV]
    *,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    use_gate: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """Comba: what is stored is read with a key of its own, before the state decays.

        S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - p_t S_{t-1})^T,   o_t = scale * q_t S_t

    p: [B, T, H, K] (the layer's k times a number in (0, 1)); use_qk_l2norm normalises p too. g: [B, T, HV] natural-log decays
    <= 0 (or raw input: use_gate). The layer corrects q before the call. Returns (o [B, T, HV, V], final state or None).

    Paper: Hu et al. 2025 (Comba), arXiv 2506.02475.
    """
    for name, x, dims in (("p", p, "[B, T, H, K]"), ("g", g, "[B, T, HV]")):
        if x is None:
            _missing("comba", name, dims, "gated_delta, which reads the decayed state with k")
    return _lower(
        "comba", q, k, v, p, g, beta, "token", True, 1, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, use_gate, A_log,
        dt_bias, lower_bound, scale, initial_state, output_final_state, cu_seqlens,
    )  # fmt: skip


def delta_product(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T * n, H, K]
    v: torch.Tensor,  # [B, T * n, HV, V]
    g: torch.Tensor | None,  # [B, T, HV]
    beta: torch.Tensor,  # [B, T * n, HV]
    *,
    num_householder: int,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    use_gate: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | SeqInfo | None = None,
) -> Lowering:
    """DeltaProduct: n = num_householder updates per token, one decay before them and one output after them.

        S <- exp(g_t) S_{t-1},   then n times  S <- S + beta_ti k_ti (v_ti - k_ti S)^T,   S_t = S,   o_t = scale * q_t S_t

    k, v, beta hold the n updates of a token one after the other. g: [B, T, HV] natural-log decays <= 0 (or raw input:
    use_gate), or None. cu_seqlens counts tokens. Returns (o [B, T, HV, V], final state [N, HV, K, V] float32 or None).

    Paper: Siems et al. 2025 (DeltaProduct), arXiv 2502.10297.
    """
    n = num_householder
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        fix = "pass the number of updates per token"
        bad_call("delta_product", "num_householder", expected="an integer >= 1", got=repr(n), fix=fix)
    for name, x in (("k", k), ("v", v)):
        if isinstance(q, torch.Tensor) and isinstance(x, torch.Tensor) and q.dim() == x.dim() == 4 and x.shape[1] != q.shape[1] * n:
            fix = f"put the {n} updates of each token one after the other in {name}"
            expected = f"[B, T * num_householder, ...] with T * num_householder = {q.shape[1] * n}"
            bad_call("delta_product", f"shape of {name}", expected=expected, got=shown(x), fix=fix)
        if n > 1 and (not isinstance(x, torch.Tensor) or x.dim() != 4):
            dims = "[B, T * num_householder, H, K]" if name == "k" else "[B, T * num_householder, HV, V]"
            fix = f"pass {name} with four dimensions {dims}"
            bad_call("delta_product", f"rank of {name}", expected=f"a tensor {dims}", got=shown(x), fix=fix)
    low = _lower(
        "delta_product", q, k, v, None, g, beta, "none" if g is None else "token", False, n, use_qk_l2norm, use_beta_sigmoid,
        allow_neg_eigval, use_gate, A_log, dt_bias, lower_bound, scale, initial_state, output_final_state, cu_seqlens,
    )  # fmt: skip
    if n == 1:
        return low

    def finish(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        o, state = outputs
        return o[:, n - 1 :: n].contiguous(), state if output_final_state else None

    return low._replace(finish=finish)


_SIZES = {"B": 4, "T": 4096, "H": 16, "HV": 0, "K": 128, "V": 128}  # HV = 0 stands for HV = H

OPS: tuple[Op, ...] = (
    Op("delta", "delta", delta, _SIZES, example("delta")),
    Op("gated_delta", "delta", gated_delta, _SIZES, example("gated_delta")),
    Op("kda", "delta", kda, _SIZES, example("kda")),
    Op("comba", "delta", comba, _SIZES, example("comba")),
    Op("delta_product", "delta", delta_product, _SIZES, example("delta_product")),
)
