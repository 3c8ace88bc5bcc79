"""The delta rule with a decay: the recurrence under `delta`, `gated_delta`, `kda`, `comba` and `delta_product`.

Per sequence and value head, with a state S of shape [K, V] and a_t = exp(g_t): one number for each head (decay `token`), one for each
key channel (decay `channel`), or 1 (decay `none`):

    (1)  R_t = Diag(a_t) S_{t-1}
    (2)  e_t = v_t - p_t R_t,   w_t = beta_t e_t                                (p = k where it is absent)
    (3)  S_t = R_t + k_t w_t^T
    (4)  o_t = scale * q_t S_t

With the option `early` what is stored is read before it decays, as Comba does: e_t = v_t - p_t S_{t-1} in (2).

With G_t = g_1 + ... + g_t from a chunk's start, E_t = G_t (early: G_t - g_t), and S the state before the chunk, all of a chunk at once:

    (5)  M_ts = sum_c p_tc k_sc exp(E_tc - G_sc) for s < t,     X_ts = sum_c q_tc k_sc exp(G_tc - G_sc) for s <= t,     else 0
    (6)  w = (I + Diag(beta) M)^-1 Diag(beta) (v - (p exp(E)) S)
    (7)  o = scale * ((q exp(G)) S + X w),   S <- Diag(exp(G_end)) S + (k exp(G_end - G))^T w

Gradients, with D_t the gradient of S_t that comes from later than (4), going back in time:

    (8)  D_t <- D_t + scale q_t do_t^T,   dw_t = D_t^T k_t,   dv_t = beta_t dw_t,   dbeta_t = dw_t . e_t
    (9)  dq_t = scale S_t do_t,   dk_t = D_t w_t,   dp_t = -R_t dv_t,   D_{t-1} = Diag(a_t) (D_t - p_t dv_t^T)
    (10) dG_t = q_t dq_t + p_t dp_t - k_t dk_t,   dg_t = rowsum(S_0 dS_0) - sum_{s < t} dG_s            (summed over c for `token`)

(early: dp_t = -S_{t-1} dv_t, D_{t-1} = Diag(a_t) D_t - p_t dv_t^T, and p_t dp_t belongs to dG_{t-1}). With w stored, dk and dv need no
state, and with dv stored, dq and dp no gradient of one: forward in time for w, back in time for dk and dv, forward again for dq and dp,
and no state is ever stored. Kernels over chunks have (11) to (20) of their own (`chunks/`), those of transforms (21) to (24) (`raw/`).

Every exponent is a sum of gates between two tokens in the order of time, and so not positive (gates are <= 0). For channels, whose
exponentials are part of the products of (5), a sub-chunk's rows are anchored at the G before it (`pairs.py`). -inf is a legal gate and
resets the state; kernels clamp gates at MIN_LOG_DECAY = -80, below which exp(g) is zero to float32 for any state that it holds well.

Letters: B rows, T tokens, N sequences, H query heads, HV value heads, G = HV / H, K and V head dims, C tokens of a chunk.

Papers: Schlag et al. 2021 (fast weight programmers, arXiv 2102.11174); Yang et al. 2024 (parallel DeltaNet, arXiv 2406.06484; Gated
DeltaNet, arXiv 2412.06464); Kimi Team 2025 (Kimi Linear, arXiv 2510.26692); Hu et al. 2025 (Comba, arXiv 2506.02475); Siems et al. 2025
(DeltaProduct, arXiv 2502.10297).
"""

NORM_EPS = 1e-6
MIN_LOG_DECAY = -80.0
