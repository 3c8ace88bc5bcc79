"""Device functions that the kernels over chunks share: where a chunk is, and decays inside it."""

import triton
import triton.language as tl

from ..._shared.spans import unit_span

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def chunk_span(cu, offsets, i_c, T, N, SEG, BT: tl.constexpr, PACKED: tl.constexpr):
    """First token and length of chunk i_c, counted through all segments of SEG tokens; empty past a sequence's end."""
    per_unit = SEG // BT
    begin, length = unit_span(cu, offsets, i_c // per_unit, T, N, SEG, True, PACKED)
    step = (i_c % per_unit) * BT
    return begin + step, tl.maximum(tl.minimum(length - step, BT), 0)


@triton.jit
def first_chunk(offsets, i_u, T, SEG, BT: tl.constexpr, SEGMENTED: tl.constexpr, PACKED: tl.constexpr):
    """The number of the first chunk of a unit, a sequence or a segment of one, as `chunk_span` counts."""
    if SEGMENTED:
        segment = tl.cast(i_u, tl.int64)
    elif PACKED:
        segment = tl.load(offsets + i_u).to(tl.int64)
    else:
        segment = tl.cast(i_u, tl.int64) * tl.cdiv(T, SEG)
    return segment * (SEG // BT)


@triton.jit
def between(b_later, b_earlier, inside):
    """exp2(b_later - b_earlier) of cumulative log2 decays where `inside`, else 0; their rounding makes none positive."""
    return tl.exp2(tl.where(inside, tl.minimum(b_later - b_earlier, 0.0), float("-inf")))


@triton.jit
def chunk_gates(g, i_t, length, BT: tl.constexpr, EARLY: tl.constexpr):
    """Cumulative log2 decays G and E of chunk i_t, [BT] each, and their total; zero outside of [0, length)."""
    o_t = tl.arange(0, BT)
    t = i_t * BT + o_t
    inside = (t >= 0) & (t < length)
    b_G = tl.load(g + t, mask=inside, other=0.0)
    b_E = tl.load(g + t - 1, mask=inside & (o_t > 0), other=0.0) if EARLY else b_G
    last = tl.minimum(i_t * BT + BT, length) - 1
    return b_G, b_E, tl.load(g + last, mask=(last >= 0) & (i_t >= 0), other=0.0)
