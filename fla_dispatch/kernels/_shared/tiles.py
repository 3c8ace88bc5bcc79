"""Device functions for tiles of rows and for vectors over tokens, chunk by chunk: by pointers, or by tensor descriptors."""

import triton
import triton.language as tl


@triton.jit
def chunk_row(p, stride, i_t, length, BT: tl.constexpr):
    """Elements of chunk i_t of a vector over tokens; zero outside of [0, length)."""
    t = i_t * BT + tl.arange(0, BT)
    return tl.load(p + t.to(tl.int64) * stride, mask=(t >= 0) & (t < length), other=0.0).to(tl.float32)


@triton.jit
def rows_of(p, length, stride, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Rows [length, D] to read or write in tiles [BT, BD]: a tensor descriptor, or the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(p, shape=[tl.maximum(length, 1), D], strides=[stride, 1], block_shape=[BT, BD])
    else:
        return p


@triton.jit
def load_tile(rows, length, stride, i_t, i_d, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Tile [BT, BD] at chunk i_t and column tile i_d of `rows_of`; zero outside of them."""
    if TMA:
        return rows.load([i_t * BT, i_d * BD])
    else:
        o_t = tl.arange(0, BT)
        o_d = i_d * BD + tl.arange(0, BD)
        first = tl.cast(i_t * BT, tl.int64)
        mask = (o_t < length - i_t * BT)[:, None] & (o_d < D)[None, :]
        return tl.load(rows + first * stride + o_t[:, None] * stride + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(rows, b_o, length, stride, i_t, i_d, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """The other way round, in o's dtype; nothing outside of the rows is written."""
    if TMA:
        rows.store([i_t * BT, i_d * BD], b_o.to(rows.dtype))
    else:
        o_t = tl.arange(0, BT)
        o_d = i_d * BD + tl.arange(0, BD)
        first = tl.cast(i_t * BT, tl.int64)
        mask = (o_t < length - i_t * BT)[:, None] & (o_d < D)[None, :]
        tl.store(rows + first * stride + o_t[:, None] * stride + o_d[None, :], b_o.to(rows.dtype.element_ty), mask=mask)
