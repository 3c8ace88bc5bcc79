"""One token of every row of a batch against a pool of states that is updated in place: decoding with a delta rule.

Row b has slot s_b of the pool (s_b = b without slots). For each value head, S being the state [K, V] of that slot:

    (1)  R = Diag(a) S                                                     (a = 1, one number, or one for each key channel)
    (2)  w = b (v - p R)                                                   (p = k where it is absent; early: p S)
    (3)  S <- R + k w^T
    (4)  o = scale * q S = scale * (q R + (q k) w)

    (5)  x <- x / sqrt(|x|^2 + EPS_NORM) for q, k and p                    (before all else, l2norm only)
    (6)  b = beta,   or sigmoid(beta),   or 2 sigmoid(beta)                (weight given, sigmoid, doubled)
    (7)  a = exp(g),   or with x = g + dt_bias and r = exp(A_log) from raw input
         a = exp(-r softplus(x)),   or   a = exp(lower_bound sigmoid(r x)) (gate given, softplus, bounded)

With n updates of a token (2) and (3) run n times after one (1), each with its own k, v and b; (4) follows the last.

This is one token of the recurrence `delta` with what its ops do before it. A row whose slot is negative is padding: nothing is read
or written for it, and its output is zero. Each slot stands in one row at most: two rows with one slot race, and whose update stays
is not defined. Everything is computed in float32, whatever dtype a pool is kept in; the normalised q, k and p are not rounded.

Gates of -inf reset the state; MIN_LOG_DECAY is the clamp below which exp(g) is zero to float32 for any state it can hold well.

Letters: B rows, S slots, n updates, H query heads, HV value heads, G = HV / H, K and V head dims.
"""

EPS_NORM = 1e-6
MIN_LOG_DECAY = -80.0
