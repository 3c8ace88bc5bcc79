"""Device functions for packing: where a unit of work begins and how long it is, for dense and packed batches alike."""

import triton
import triton.language as tl


@triton.jit
def unit_span(
    cu,  # [N + 1] cumulative lengths, or None for a dense batch
    offsets,  # [N + 1] cumulative segment counts of a pack, or None
    i_u,
    T,
    N,
    SEG,  # tokens per segment
    SEGMENTED: tl.constexpr,  # a unit is a segment; else a whole sequence
    PACKED: tl.constexpr,
):
    """(first token as int64, number of tokens) of unit i_u: a sequence, or a segment of one. Units past the last are empty."""
    if not SEGMENTED:
        if PACKED:
            begin = tl.load(cu + i_u).to(tl.int64)
            length = (tl.load(cu + i_u + 1).to(tl.int64) - begin).to(tl.int32)
        else:
            begin = tl.cast(i_u, tl.int64) * T
            length = T
    else:
        if PACKED:
            low = i_u * 0
            high = low + N
            while low < high:  # the last n with offsets[n] <= i_u
                middle = (low + high + 1) // 2
                if tl.load(offsets + middle) <= i_u:
                    low = middle
                else:
                    high = middle - 1
            inside = tl.minimum(low, N - 1)
            step = (i_u - tl.load(offsets + inside)) * SEG
            start = tl.load(cu + inside).to(tl.int64)
            left = (tl.load(cu + inside + 1).to(tl.int64) - start).to(tl.int32) - step
            begin = start + step
            length = tl.where(low < N, tl.maximum(tl.minimum(left, SEG), 0), 0)
        else:
            per_row = tl.cdiv(T, SEG)
            step = (i_u % per_row) * SEG
            begin = tl.cast(i_u // per_row, tl.int64) * T + step
            length = tl.minimum(T - step, SEG)
    return begin, length
