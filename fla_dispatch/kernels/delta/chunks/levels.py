"""Device functions for gates per channel: pairs of tokens of a chunk by levels, each of them a product on the matrix unit.

Two tokens s < t belong to the level of SIZE, a power of two, where they are in the two halves of one block of 2 SIZE tokens. At each
level every token is on one side, and exp(G_t - G_s) = exp(G_t - G_m) exp(G_m - G_s) with m, the last token of the first half, between
the two. So one tile of decays to m or from it, no exponent of which is positive, scales all tokens for a level's pairs:

    (16)  L_t = exp(-|G_t - G_m|),   X_ts = sum_c (q L)_tc (k L)_sc

Tiles are [GR, NB, CH, BLOCK]: channels in GR groups of CH, tokens in NB blocks. Threads divide groups and blocks, and the tokens of a
block are registers of one thread, so sums over them and levels inside of a block move nothing between threads.
"""

import triton
import triton.language as tl

from .parts import LOG2E

#: Tokens of a block: the smallest operand of a matrix product.
BLOCK = tl.constexpr(16)


@triton.jit
def offsets_of(length, stride, i_d, K: tl.constexpr, NB: tl.constexpr, GR: tl.constexpr, CH: tl.constexpr):
    """Offsets of the tile at channels i_d * GR * CH of rows of tokens, and where it has elements."""
    o_t = tl.arange(0, NB)[None, :, None, None] * BLOCK + tl.arange(0, BLOCK)[None, None, None, :]
    o_c = i_d * (GR * CH) + tl.arange(0, GR)[:, None, None, None] * CH + tl.arange(0, CH)[None, None, :, None]
    return o_t * stride + o_c, (o_t < length) & (o_c < K)


@triton.jit
def load_gates(g, at, inside, FLOOR: tl.constexpr):
    """Log2 decays summed from the beginning of each block: [GR, NB, CH, BLOCK]."""
    b_g = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    return tl.cumsum(tl.where(b_g < FLOOR, FLOOR, b_g) * LOG2E, 3)


@triton.jit
def picked(b_x, here, AXIS: tl.constexpr):
    """The one element along AXIS that is `here`. Of bits: the compiler drops sums with an integer zero, and keeps those with 0.0."""
    bits = tl.sum(tl.where(here, b_x.to(tl.int32, bitcast=True), 0), AXIS)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def last_of(b_G):
    """[GR, NB, CH] of the last token of each block."""
    return picked(b_G, tl.arange(0, BLOCK) == BLOCK - 1, 3)


@triton.jit
def sum_blocks(b_total, NB: tl.constexpr, BEFORE: tl.constexpr, WITHIN: tl.constexpr):
    """For each block the sum over those before it (else after it) in its group of WITHIN blocks: [GR, NB, CH] from [GR, NB, CH]."""
    o_j, o_i = tl.arange(0, NB)[:, None, None, None], tl.arange(0, NB)[None, None, :, None]
    chosen = (o_i > o_j) if BEFORE else (o_i < o_j)
    others = tl.permute(b_total, (1, 0, 2))[:, :, None, :]
    return tl.sum(tl.where(chosen & (o_i // WITHIN == o_j // WITHIN), others, 0.0), 0)


@triton.jit
def inner_decays(b_G, SIZE: tl.constexpr, GR: tl.constexpr, NB: tl.constexpr, CH: tl.constexpr):
    """L of (16) at a level inside of blocks."""
    halves = tl.reshape(b_G, [GR, NB, CH, BLOCK // (2 * SIZE), 2 * SIZE])
    middle = picked(halves, tl.arange(0, 2 * SIZE) == SIZE - 1, 4)
    return tl.reshape(tl.exp2(-tl.abs(halves - middle[:, :, :, :, None])), [GR, NB, CH, BLOCK])


@triton.jit
def outer_decays(b_G, b_total, SIZE: tl.constexpr, NB: tl.constexpr):
    """L of (16) at a level of whole blocks."""
    COUNT: tl.constexpr = SIZE // BLOCK
    second = (tl.arange(0, NB) // COUNT % 2 == 1)[None, :, None]
    b_E = tl.where(second[:, :, :, None], b_G, b_total[:, :, :, None] - b_G)
    if COUNT > 1:
        b_E += tl.where(second, sum_blocks(b_total, NB, True, COUNT), sum_blocks(b_total, NB, False, COUNT))[:, :, :, None]
    return tl.exp2(b_E)


@triton.jit
def of_level(o_t, o_s, SIZE: tl.constexpr):
    """Whether t and s < t are a pair of the level."""
    return (o_t // SIZE - o_s // SIZE == 1) & (o_t // SIZE % 2 == 1)


@triton.jit
def by_tokens(b_x, GR: tl.constexpr, NB: tl.constexpr, CH: tl.constexpr):
    """[NB * BLOCK, GR * CH] of a tile."""
    return tl.reshape(tl.permute(b_x, (1, 3, 0, 2)), [NB * BLOCK, GR * CH])


@triton.jit
def by_blocks(b_x, GR: tl.constexpr, NB: tl.constexpr, CH: tl.constexpr):
    """[NB, BLOCK, GR * CH] of a tile."""
    return tl.reshape(tl.permute(b_x, (1, 3, 0, 2)), [NB, BLOCK, GR * CH])


@triton.jit
def on_diagonal(b_x, NB: tl.constexpr):
    """[NB * BLOCK, NB * BLOCK], zero outside of its diagonal blocks [NB, BLOCK, BLOCK]."""
    o_b = tl.arange(0, NB)
    here = o_b[:, None, None, None] == o_b[None, None, :, None]
    return tl.reshape(tl.where(here, b_x[:, :, None, :], 0.0), [NB * BLOCK, NB * BLOCK])
