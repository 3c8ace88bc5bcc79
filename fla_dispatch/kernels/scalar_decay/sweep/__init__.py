"""The causal sweep in Triton: one body, called by every Triton variant of the recurrence.

chunk_body  equations (4) and (7): chunks of BT tokens on the matrix units
token_body  equations (1) to (3): token by token, the state in registers, float32
forward     kernel and launcher of the output; backward of dq, dk, dv as three slices of one launch
segments    states of segments from zero; scan composes them; gate turns row sums into gate gradients
host        what the launchers share: strides, weights, output buffers
"""
