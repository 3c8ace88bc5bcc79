"""The normaliser (3) in `gluon_sweep`, as products of 8 columns: sums over tokens or columns cost the matrix units next to nothing.

z adds up rows of b (Z 1) or of c (Z 2, 3) that a chunk weighs by 1 or by u. A vector enters a product as a tile [8, N] whose first
two rows are its two rounded terms and whose others are zero, so that the sum of the product's 8 columns is exact in the vector
to 2^-16. Both operands are in shared memory: decision 0003 is about others.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

#: Columns of a narrow product: the fewest that there are.
WIDTH = gl.constexpr(8)

#: Registers of an accumulator of WIDTH columns, and of a vector over its rows.
NARROW = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
LONG = gl.constexpr(gl.SliceLayout(1, NARROW.value))


@gluon.jit
def put_terms(x, shared):
    """A float32 vector [N] into a tile [WIDTH, N], in two terms."""
    high = x.to(shared.dtype).to(gl.float32)
    j = gl.arange(0, WIDTH, gl.SliceLayout(0, NARROW))[None, :]
    both = gl.where(j == 0, high[:, None], gl.where(j == 1, (x - high)[:, None], 0.0))
    shared.permute((1, 0)).store(both.to(shared.dtype))


@gluon.jit
def times(rows, terms, N: gl.constexpr):
    """Start rows [N, ...] times the vector that `put_terms` has put into a tile; `gl.sum(..., 1)` of the result is the product."""
    zero = gl.zeros([N, WIDTH], gl.float32, NARROW)
    return warpgroup_mma(rows, terms.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def first_z(z_in, p_z, o_z, N: gl.constexpr, LAST: gl.constexpr):
    """z before the first chunk, elements o_z of [LAST]."""
    if z_in is None:
        return gl.zeros([N], gl.float32, LONG)
    else:
        return gl.load(z_in + p_z + o_z, mask=o_z < LAST, other=0.0).to(gl.float32)
