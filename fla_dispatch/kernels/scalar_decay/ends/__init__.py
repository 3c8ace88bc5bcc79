"""What `mamba2` does before and after the recurrence, in kernels: step sizes, and the gate z. They read and write each tensor once.

    (14)  d_t = clamp(softplus(dt_t + bias_h), low, high),   beta_t = d_t,   g_t = d_t A_h
    (15)  e_t = dbeta_t + A_h dg_t,   ddt_t = e_t [low <= softplus(..) <= high] sigmoid(dt_t + bias_h)
          dbias_h = sum_t ddt_t,   dA_h = sum_t d_t dg_t                              (rows of blocks first, then over blocks)
    (16)  y_t = o_t z_t s(z_t),   s(z) = 1 / (1 + exp(-z))
    (17)  do_t = dy_t z_t s(z_t),   dz_t = dy_t o_t s(z_t) (1 + z_t (1 - s(z_t)))

All in float32; softplus and its sigmoid, bias and limits where they are asked for. Float64 inputs, CPUs and traces keep torch's operations.

step_sizes     kernel and launcher of (14)
step_backward  of (15)
gated          of (16)
gated_backward of (17)
pairs          both as maps with a gradient
"""
