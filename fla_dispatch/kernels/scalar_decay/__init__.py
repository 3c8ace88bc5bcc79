"""Linear attention with a scalar decay: the recurrence under `linear_attn`, `retention`, `lightning_attn`, `simple_gla`, `mamba2`.

Per sequence and value head, with a state S of shape [K, V]:

    (1)  S_t = a_t S_{t-1} + beta_t k_t v_t^T,        a_t = exp(g_t)
    (2)  o_t = scale * q_t S_t + skip_h v_t                                        (skip: where given, never with normalize)
    (3)  z_t = a_t z_{t-1} + beta_t k_t,   r_t = 1 / (scale * q_t z_t + EPS),   o_t <- r_t o_t      (normalize only)

With G_t = g_1 + ... + g_t and the decay matrix M_ts = exp(G_t - G_s) for s <= t, else 0, the same output (but for skip) is

    (4)  o_t = scale * sum_s M_ts beta_s (q_t . k_s) v_s + scale * exp(G_t) q_t S_0

One function f(a, b, c) = (M * (a b^T)) c gives the output and every gradient, by permuting its arguments:

    (5)  o = f(q, k, v)   dq = f(do, v, k)   dk = f'(v, do, q)   dv = f'(k, q, do)         f' has M^T: time reversed
    (6)  dG_t = q_t . dq_t - k_t . dk_t,   dg_t = <S_0, dS_0> - sum_{s < t} dG_s,   beta_t dbeta_t = v_t . dv_t = k_t . dk_t
    (8)  dv_t <- dv_t + skip_h do_t,   dskip_h = sum_t do_t . v_t             (skip alone, after (6) has taken v_t . dv_t)

(the sum of all dG_t is <S_0, dS_0> - <S_T, dS_T>, so this is also the sum over s >= t plus <S_T, dS_T>; counting from the start
needs no final state and keeps its rounding out of every gate)

f is computed chunk by chunk: inside a chunk as in (4), across chunks through a state that is carried in time order,

    (7)  S <- exp(G_end) S + sum_s exp(G_end - G_s) w_s b_s c_s^T

so that no exponential of a positive number is ever taken (gates are <= 0). -inf is a legal gate and resets the state;
kernels clamp gates at MIN_LOG_DECAY = -80, below which exp(g) is zero to float32 for any state that float32 can hold well.

Letters: B rows, T tokens, N sequences, H query heads, HV value heads, G = HV / H, K and V head dims; a, b [T, D], c [T, E].

Papers: Katharopoulos et al. 2020 (linear attention, arXiv 2006.16236); Sun et al. 2023 (RetNet, arXiv 2307.08621); Qin et al.
2024 (Lightning Attention-2, arXiv 2401.04658); Yang et al. 2023 (GLA, arXiv 2312.06635); Dao and Gu 2024 (Mamba-2, arXiv 2405.21060).
"""

EPS = 1e-10
MIN_LOG_DECAY = -80.0
