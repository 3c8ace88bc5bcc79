"""What layers do to their projections before the delta rules, in kernels: `transforms.py` beside them is the torch that defines it.

    (21)  y = x r,   r = (x . x + NORM_EPS)^-1/2                                (rows of q, k and p)
    (22)  dx = r (dy - r^2 (x . dy) x)
    (23)  beta = m s(b),   g = -a softplus(x)   or   g = low s(a x),            x = raw + dt_bias,   a = exp(A_log),   m = 1 or 2
    (24)  db = dbeta m s'(b),   dx = -a dg s(x)   or   dx = low a dg s'(a x),   s'(y) = e / (1 + e)^2,   e = exp(-|y|)
          ddt_bias = sum_t dx_t,   dA_log = sum_t dg_t g_t   or   sum_t dx_t x_t    (spans of tokens first, then over spans)

s is the logistic function. All in float32. Rows are read once and written once in each direction: r is computed again from the row
that backward reads anyway, and nothing but the raw tensors is kept.

rows             kernel and launcher of (21): q, k and p in one launch
rows_backward    of (22)
vectors          of (23): weights and gates in one launch
vectors_backward of (24)
pairs            both as maps with a gradient
"""
