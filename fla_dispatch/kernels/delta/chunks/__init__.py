"""Chunks of the recurrence in Triton: equations (5) to (10) on the matrix unit.

inverse    (I + Diag(beta) M)^-1 of (6), scores X of (5) and sums of gates: all chunks at once
forward    (12): outputs, or w and the states of all chunks: over time, the state in registers
reverse    (13): dy and the gradients of all states: back in time, the gradient of the state in registers
gradients  (14) and (15): all other gradients, all chunks at once
channel    for a gate per key channel, in the place of inverse: (17), which forward and reverse take as if there were no gates
states     (18), and channels (19) and (20): in the place of gradients
levels     (16), device functions for gates per channel: pairs of tokens as products without an exponent above zero
segments   states at the ends of segments that run in parallel; compose puts them together
parts      device functions that they share: where a chunk is, its decays
host       what the launchers share: strides, chunks, constants
"""
