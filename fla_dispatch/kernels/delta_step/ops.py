"""The contracts of decoding: delta_step, gated_delta_step, kda_step, comba_step and delta_product_step.

One token of every row of a batch, as the op without `_step` computes it, against states that are updated in place. Shared by all
(what single docstrings do not repeat): q, k: [B, H, K]; v: [B, HV, V] with HV a multiple of H, value head j using query head
j // (HV / H); one dtype of bfloat16, float16, float32 (float64 in torch variants alone), which o [B, HV, V] gets too; under
autocast cast to its dtype (p too). beta [B, HV] and gates are float32 or q's dtype. All may be slices of one projection: with contiguous
last dimensions nothing is copied (beta and gates per head may have any strides). scale defaults to K^(-1/2).

state: a pool [S, HV, K, V], float32 or bfloat16 (rounded at every step), whose slots are contiguous; the pool itself may be a slice
of a larger one. It is UPDATED IN PLACE. slots: [B], int32 or int64, the row of the pool that each row of the batch has; None: row b,
and S = B. A negative slot is padding: nothing is read or written for that row, and its output is zero. Slots that stand twice
race with each other, and slots past the pool write anywhere: neither is checked, since their values are on the device.

    use_qk_l2norm      q, k (and p) are divided by their length: x rsqrt(sum x^2 + 1e-6)
    use_beta_sigmoid   beta holds logits: sigmoid(beta) is the weight; with allow_neg_eigval 2 sigmoid(beta)
    use_gate           g holds raw input: the log decay is -exp(A_log) softplus(g + dt_bias), or with lower_bound (below 0)
                       lower_bound sigmoid(exp(A_log) (g + dt_bias)); A_log [HV] may then be left out, dt_bias always

These are computed inside the kernel, in float32. There is no gradient: a tensor that requires one raises unless gradients are off.
A wrong call raises CallError (a ValueError) that names what was expected, what came and what to do.
"""

from __future__ import annotations

import torch

from ...errors import bad_call
from ...registry import Lowering, Op
from .._shared.contract import check_companion, check_flag, check_scale, shown
from .._shared.delta_contract import check_gate, check_removal, check_weights
from .._shared.steps import check_no_grad, check_pool, check_slots, check_token
from .cases import example
from .recurrence import Options, Tensors

_STATE = "[S, HV, K, V]"
_new = tuple.__new__  # makes a NamedTuple in half the time of its constructor, which is Python
_WIDE, _NARROW = (torch.float64,), (torch.float32, torch.bfloat16)


def _output(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A step returns its output alone."""
    return outputs[0]


def _lower(
    where: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    p: torch.Tensor | None,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    state: torch.Tensor,
    decay: str,
    early: bool,
    updates: int,
    slots: torch.Tensor | None,
    use_qk_l2norm: bool,
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
    use_gate: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    scale: float | None,
) -> Lowering:
    """The contract that all ops share; updates: of a token, in k, v and beta."""
    whole_k, whole_v = k, v
    if updates > 1:
        k, v = k[:, 0], v[:, 0]
    q, k, v, B, K, HV, V, dtype, device = check_token(where, q, k, v)
    if p is not None:
        p = check_removal(where, p, tuple(k.shape), "[B, H, K]", dtype, device)
    if g is not None:
        if decay == "channel":
            g = check_companion(where, "g", g, (B, HV, K), "[B, HV, K]", dtype, device, "q")
        else:
            g = check_companion(where, "g", g, (B, HV), "[B, HV]", dtype, device, "q")
    if updates > 1:
        k, v = whole_k.to(dtype), whole_v.to(dtype)
        beta = check_companion(where, "beta", beta, (B, updates, HV), "[B, num_householder, HV]", dtype, device, "q")
    else:
        beta = check_companion(where, "beta", beta, (B, HV), "[B, HV]", dtype, device, "q")
    kind, bound = "given", 0.0
    gate = check_gate(where, g, use_gate, A_log, dt_bias, lower_bound, HV, K if decay == "channel" else 0, dtype, device)
    if gate is not None:
        A_log, dt_bias, limit = gate
        kind, bound = ("softplus", 0.0) if limit is None else ("bounded", limit)
    check_flag(where, "use_qk_l2norm", use_qk_l2norm)
    check_weights(where, use_beta_sigmoid, allow_neg_eigval)
    weight = "doubled" if allow_neg_eigval else "sigmoid" if use_beta_sigmoid else "given"
    if slots is not None:
        check_slots(where, slots, B, device, "q")
    pools = _WIDE if dtype is torch.float64 else _NARROW
    check_pool(where, "state", state, (HV, K, V), _STATE, pools, device, "q", B if slots is None else None)
    check_no_grad(
        where,
        (
            ("q", q), ("k", k), ("v", v), ("p", p), ("g", g), ("beta", beta), ("state", state), ("A_log", A_log), ("dt_bias", dt_bias),
        ),
    )  # fmt: skip
    scale = K**-0.5 if scale is None else check_scale(where, scale)
    tensors = _new(Tensors, (q, k, v, p, state, slots, g, beta, A_log, dt_bias))
    options = _new(Options, (scale, decay, early, use_qk_l2norm, weight, kind, bound, updates))
    return _new(Lowering, ("delta_step", tensors, options, None, _output))


def _missing(where: str, name: str, dims: str, instead: str) -> None:
    bad_call(where, name, expected=f"a tensor {dims}", got="None", fix=f"pass {name} {dims}, or call {instead}")


def delta_step(
    q: torch.Tensor,  # [B, H, K]
    k: torch.Tensor,  # [B, H, K]
    v: torch.Tensor,  # [B, HV, V]
    beta: torch.Tensor,  # [B, HV]
    state: torch.Tensor,  # [S, HV, K, V], updated in place
    *,
    slots: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
) -> Lowering:
    """One token of the delta rule; updates the state in place.

        S <- S + beta k (v - k S)^T,   o = scale * q S

    The module's docstring names the options. Returns o [B, HV, V].

    Papers: Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024 (DeltaNet), arXiv 2406.06484.
    """
    return _lower(
        "delta_step", q, k, v, None, None, beta, state, "none", False, 1, slots, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, False,
        None, None, None, scale,
    )  # fmt: skip


def gated_delta_step(
    q: torch.Tensor,  # [B, H, K]
    k: torch.Tensor,  # [B, H, K]
    v: torch.Tensor,  # [B, HV, V]
    g: torch.Tensor,  # [B, HV]
    beta: torch.Tensor,  # [B, HV]
    state: torch.Tensor,  # [S, HV, K, V], updated in place
    *,
    slots: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    use_gate: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
) -> Lowering:
    """One token of the delta rule with a gate per value head; updates the state in place.

        R = exp(g) S,   S <- R + beta k (v - k R)^T,   o = scale * q S

    g: [B, HV] natural-log decays <= 0 (or raw input: use_gate); gates above zero are not checked and overflow; -inf resets the
    state. Returns o [B, HV, V].

    Paper: Yang et al. 2024 (Gated DeltaNet), arXiv 2412.06464.
    """
    if g is None:
        _missing("gated_delta_step", "g", "[B, HV]", "delta_step for no decay")
    return _lower(
        "gated_delta_step", q, k, v, None, g, beta, state, "token", False, 1, slots, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval,
        use_gate, A_log, dt_bias, lower_bound, scale,
    )  # fmt: skip


def kda_step(
    q: torch.Tensor,  # [B, H, K]
    k: torch.Tensor,  # [B, H, K]
    v: torch.Tensor,  # [B, HV, V]
    g: torch.Tensor,  # [B, HV, K]
    beta: torch.Tensor,  # [B, HV]
    state: torch.Tensor,  # [S, HV, K, V], updated in place
    *,
    slots: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    use_gate: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
) -> Lowering:
    """One token of Kimi Delta Attention, with a gate per value head and key channel; updates the state in place.

        R = Diag(exp(g)) S,   S <- R + beta k (v - k R)^T,   o = scale * q S

    g: [B, HV, K] natural-log decays <= 0 (or raw input: use_gate, with dt_bias [HV, K] or [HV * K]); gates above zero are not
    checked and overflow; -inf resets a row of the state. Returns o [B, HV, V].

    Paper: Kimi Team 2025 (Kimi Linear), arXiv 2510.26692.
    """
    if g is None:
        _missing("kda_step", "g", "[B, HV, K]", "delta_step for no decay")
    return _lower(
        "kda_step", q, k, v, None, g, beta, state, "channel", False, 1, slots, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, use_gate,
        A_log, dt_bias, lower_bound, scale,
    )  # fmt: skip


def comba_step(
    q: torch.Tensor,  # [B, H, K]
    k: torch.Tensor,  # [B, H, K]
    v: torch.Tensor,  # [B, HV, V]
    p: torch.Tensor,  # [B, H, K]
    g: torch.Tensor,  # [B, HV]
    beta: torch.Tensor,  # [B, HV]
    state: torch.Tensor,  # [S, HV, K, V], updated in place
    *,
    slots: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    use_gate: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
) -> Lowering:
    """One token of Comba, which reads what is stored with a key of its own before the state decays; updates the state in place.

        S <- exp(g) S + beta k (v - p S)^T,   o = scale * q S

    p: [B, H, K] (the layer's k times a number in (0, 1)); use_qk_l2norm normalises p too. g: [B, HV] natural-log decays <= 0 (or raw
    input: use_gate). The layer corrects q before the call. Returns o [B, HV, V].

    Paper: Hu et al. 2025 (Comba), arXiv 2506.02475.
    """
    for name, x, dims in (("p", p, "[B, H, K]"), ("g", g, "[B, HV]")):
        if x is None:
            _missing("comba_step", name, dims, "gated_delta_step, which reads the decayed state with k")
    return _lower(
        "comba_step", q, k, v, p, g, beta, state, "token", True, 1, slots, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, use_gate,
        A_log, dt_bias, lower_bound, scale,
    )  # fmt: skip


def delta_product_step(
    q: torch.Tensor,  # [B, H, K]
    k: torch.Tensor,  # [B, n, H, K]
    v: torch.Tensor,  # [B, n, HV, V]
    g: torch.Tensor | None,  # [B, HV]
    beta: torch.Tensor,  # [B, n, HV]
    state: torch.Tensor,  # [S, HV, K, V], updated in place
    *,
    num_householder: int,
    slots: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    use_gate: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
) -> Lowering:
    """One token of DeltaProduct, n = num_householder updates after one decay; updates the state in place.

        S <- exp(g) S,   then n times  S <- S + beta_i k_i (v_i - k_i S)^T,   o = scale * q S

    g: [B, HV] natural-log decays <= 0 (or raw input: use_gate), or None. The kernel is compiled for each n. Returns o [B, HV, V].

    Paper: Siems et al. 2025 (DeltaProduct), arXiv 2502.10297.
    """
    n, where = num_householder, "delta_product_step"
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        bad_call(where, "num_householder", expected="an integer >= 1", got=repr(n), fix="pass the number of updates per token")
    for name, x, dims in (("k", k, ("H", "K")), ("v", v, ("HV", "V")), ("beta", beta, ("HV",))):
        if not isinstance(x, torch.Tensor) or x.dim() != 2 + len(dims) or x.shape[1] != n:
            fix = f"put the {n} updates of the token in the second dimension of {name}"
            bad_call(where, f"shape of {name}", expected=f"a tensor [B, {n}, {', '.join(dims)}]", got=shown(x), fix=fix)
    if n == 1:
        k, v, beta = k[:, 0], v[:, 0], beta[:, 0]
    return _lower(
        where, q, k, v, None, g, beta, state, "none" if g is None else "token", False, n, slots, use_qk_l2norm, use_beta_sigmoid,
        allow_neg_eigval, use_gate, A_log, dt_bias, lower_bound, scale,
    )  # fmt: skip


_SIZES = {"B": 256, "H": 32, "HV": 0, "K": 128, "V": 128}  # HV = 0 stands for HV = H

OPS: tuple[Op, ...] = (
    Op("delta_step", "delta_step", delta_step, _SIZES, example("delta_step")),
    Op("gated_delta_step", "delta_step", gated_delta_step, _SIZES, example("gated_delta_step")),
    Op("kda_step", "delta_step", kda_step, _SIZES, example("kda_step")),
    Op("comba_step", "delta_step", comba_step, _SIZES, example("comba_step")),
    Op("delta_product_step", "delta_step", delta_product_step, _SIZES, example("delta_product_step")),
)
