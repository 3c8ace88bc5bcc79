"""States of every chunk in memory, then all chunks in parallel: heads that share q and k share their products.

With the state S before a chunk and the gradient R of the state after it, P = q k^T, D = do v^T, E = scale M * beta * P * D (all
[t, s] with s <= t inside the chunk, M decaying from s to t), and e_t = exp(G_t), f_s = exp(G_end - G_s) the decays from the chunk's
begin and to its end, beside (4) and (7):

    (9)   dq_t = scale (sum_s (M * beta * D)_ts k_s + e_t S do_t)
    (10)  dk_s = scale sum_t (M * beta * D)_ts q_t + f_s beta_s R v_s
    (11)  dv_s = beta_s u_s + skip do_s,    u_s = scale sum_t (M * P)_ts do_t + f_s R^T k_s,    dbeta_s = v_s . u_s
    (12)  dG_t = sum_s E_ts - sum_s E_st + scale e_t q_t . S do_t - y_t,    y_s = f_s beta_s k_s . R v_s
          dg_t = sum of dG over the chunk's tokens from t on + sum_s y_s + exp(G_end) <S, R>
    (13)  dskip = sum_t do_t . v_t

Sums over s and t of E come from one kernel, whose tiles of P it needs anyway, and q_t . S do_t as do_t . (q_t S) from that of dq.
Nothing of (12) is summed beyond the chunk, so rounded operands serve. Of heads that share q and k the factor M * beta * D adds up in
registers, and only then meets k or q. Every transposed product is computed as such: no accumulator is transposed.

store    kernel and launcher of the states before each chunk, or of the gradients of states after each, with their <S, R>
outputs  of the output of every chunk
queries  of dq, and q_t . S do_t for (12)
keys     of dk
values   of dv, and the gradients of beta, g and skip
"""
