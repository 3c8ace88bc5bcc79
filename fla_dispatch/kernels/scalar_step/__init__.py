"""One token of every row of a batch against a pool of states that is updated in place: decoding with a scalar decay.

Row b has slot s_b of the pool (s_b = b without slots). For each value head, S being the state [K, V] of that slot:

    (1)  S <- a S + b k v^T
    (2)  o = scale * q S                                                   (S of (1))
    (3)  z <- a z + b k,   o <- o / (scale * q z + EPS)                    (normalize only)

    (4)  a = 1, exp(g), or a constant of the head; b = 1; or from the step size of a state-space model
         d = clamp(softplus(dt + bias), low, high),   a = exp(d A),   b = d
    (5)  o <- o + D v,   o <- o silu(gate)                                 (each where it is given)
    (6)  q <- q / sqrt(|q|^2 + EPS_NORM),   k <- k / sqrt(|k|^2 + EPS_NORM)    (before all else, qk_l2norm only)

This is one token of the recurrence `scalar_decay`, with what its ops do before and after it. A row whose slot is negative is
padding: nothing is read or written for it, and its output is zero. Each slot stands in one row at most: two rows with one slot
race, and whose update stays is not defined. Everything is computed in float32, whatever dtype a pool is kept in.

Gates of -inf reset the state; MIN_LOG_DECAY is the clamp below which exp(g) is zero to float32 for any state it can hold well.

Letters: B rows, S slots, H query heads, HV value heads, G = HV / H, K and V head dims.
"""

EPS = 1e-10
EPS_NORM = 1e-6
MIN_LOG_DECAY = -80.0
