"""The recurrence token by token in Triton: the state or its gradient in float32 registers, a block for each sequence, head and tile of V.

forward  equations (1) to (4); for backward it stores the errors e instead of o
reverse  (8), and dk of (9): back in time, from e
reads    dq and dp of (9): forward in time once more, from e and dv
combine  sums over tiles of V, and gate gradients (10)
host     what the launchers share: strides, buffers, constants

Nothing is reversed and no state is stored: every pass carries its own state in the direction in which it is stable.
"""
