"""What the warps of one `gluon_sweep` block do, by partition. All walk over the same chunks i = 0, 1, ... in time order.

    load    a, b, c or x of chunk i into stage i % STAGES                                          one warp each
    score   P = mask decay weight a b^T, and the weighted rows of c, each into one of two buffers  four warps
            with a normaliser also z, and from it what `output` needs beside P: `side`, r or z
    state   S into a buffer for `output`, then S <- decay S + b^T (weighted c)                     four warps
    output  o = decay (a S) + P c; the next chunk's a S runs under the end of this one             four warps

A barrier (mbarrier) counts arrivals; its k-th phase completes with the arrivals of all who use a buffer for the k-th time, so
who waits for a buffer to be filled the k-th time waits for parity k & 1 of `..._ready` (`full`), and who waits for it to be
free for the k-th time waits for the other parity of `..._taken` (`empty`), which passes at first. Whoever arrives has met all
warps of its partition before, and has fenced what it wrote for the matrix units or for copies.

Every operand of a product is in shared memory: register operands of products in flight are miscompiled by the ptxas of these
releases (decision 0003 has a relative).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..._shared.gluon_names import barrier, copy_in, copy_out
from .gluon_normaliser import LONG, first_z, put_terms, times

LOG2E = gl.constexpr(1.4426950408889634)

#: Registers of an accumulator of [64, 64], of a vector over its rows, and of one over its columns.
TILE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ROWS = gl.constexpr(gl.SliceLayout(1, TILE.value))
COLUMNS = gl.constexpr(gl.SliceLayout(0, TILE.value))


@gluon.jit
def place(i, NT, REVERSE: gl.constexpr):
    """Position of the i-th chunk in time."""
    if REVERSE:
        return NT - 1 - i
    else:
        return i


@gluon.jit
def parity(i, N: gl.constexpr):
    """Parity of the use that chunk i makes of its buffer, one of N."""
    return (i // N) & 1


@gluon.jit
def vector(p, t, stride, length):
    """Elements t of a vector over tokens; zero outside of [0, length)."""
    return gl.load(p + t.to(gl.int64) * stride, mask=(t >= 0) & (t < length), other=0.0).to(gl.float32)


@gluon.jit
def whole_decay(p_g, i_t, length, NT, BT: gl.constexpr):
    """Log2 decay of chunk i_t from cumulative log2 decays."""
    return gl.load(p_g + gl.minimum(i_t * BT + BT, length) - 1, mask=(i_t >= 0) & (i_t < NT), other=0.0)


@gluon.jit
def constant_decays(lg, r, n, BT: gl.constexpr, REVERSE: gl.constexpr):
    """For one log2 decay per token and n tokens left, of which the chunk has at most BT: decays to each row, to the chunk's end."""
    valid = gl.minimum(n, BT).to(gl.float32)
    after = (r + 1).to(gl.float32)
    ahead = gl.exp2(after * lg)
    behind = gl.exp2(gl.where(r < n, (valid - after) * lg, float("-inf")))
    if REVERSE:
        return behind, ahead
    else:
        return ahead, behind


@gluon.jit
def token_decays(G, whole, r, n, REVERSE: gl.constexpr):
    """Decays to each row from cumulative log2 decays, of which n rows have one."""
    if REVERSE:
        return gl.exp2(whole - gl.where(r < n, G, whole))
    else:
        return gl.exp2(gl.where(r < n, G, whole))


@gluon.jit
def put(value, shared, at, EXACT: gl.constexpr):
    """Round float32 to the operands' dtype, into buffer `at`; EXACT: in two terms, in two of them."""
    high = value.to(shared.dtype)
    shared.index(at).store(high)
    if EXACT:
        shared.index(at + 1).store((value - high.to(gl.float32)).to(shared.dtype))


@gluon.jit
def rows_of(p, length, stride, D: gl.constexpr, BT: gl.constexpr, BD: gl.constexpr):
    """A descriptor of rows [length, D] in tiles of [BT, BD]; zero outside of them."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BD], p.dtype.element_ty)
    return tma.make_tensor_descriptor(p, shape=[gl.maximum(length, 1), D], strides=[stride, 1], block_shape=[BT, BD], layout=layout)


@gluon.jit
def load(p, offset, stride, staged, full, empty, length, NT, column, D: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr):
    """Copies of one operand, chunk after chunk, as stages come free; none of an operand that is None."""
    if p is not None:
        BT: gl.constexpr = staged.shape[1]
        BD: gl.constexpr = staged.shape[2]
        rows = rows_of(p + offset, length, stride, D, BT, BD)
        for i in range(NT):
            s = i % STAGES
            mbarrier.wait(empty.index(s), parity(i, STAGES) ^ 1)
            mbarrier.expect(full.index(s), BT * BD * 2)
            copy_in(rows, [place(i, NT, REVERSE) * BT, column], full.index(s), staged.index(s))


@gluon.jit
def score(
    staged, full, empty, p_sh, p_ready, p_taken, c_sh, c_ready, c_taken, u_sh, z_sh, side, g, w, u, z_in, z_out, r_out, p_gate, p_token,
    p_z, i_e, length, NT, scale, HV, D: gl.constexpr, E: gl.constexpr, REVERSE: gl.constexpr, DECAY: gl.constexpr, W: gl.constexpr,
    Z: gl.constexpr, EPS: gl.constexpr, EXACT: gl.constexpr, WEIGHED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All of a chunk that does not depend on the state: P = a b^T, masked, decayed, weighted; c weighted for the state; z and r."""
    BT: gl.constexpr = staged[0].shape[1]
    TERMS: gl.constexpr = 2 if EXACT else 1
    r = gl.arange(0, BT, ROWS)
    t = gl.arange(0, BT, COLUMNS)
    inside = (r[:, None] <= t[None, :]) if REVERSE else (r[:, None] >= t[None, :])
    first = place(NT * 0, NT, REVERSE)
    if DECAY == 0:
        M = gl.where(inside, scale, 0.0)
    if DECAY == 1:
        lg = gl.load(g + p_gate).to(gl.float32) * LOG2E
        apart = (t[None, :] - r[:, None]) if REVERSE else (r[:, None] - t[None, :])
        M = gl.exp2(gl.where(inside, apart.to(gl.float32) * lg, float("-inf"))) * scale
    if DECAY == 2:
        next_r, next_whole = vector(g + p_gate, first * BT + r, 1, length), whole_decay(g + p_gate, first, length, NT, BT)
    if W == 2:
        w_r = vector(w + p_token, first * BT + r, HV, length)
    if Z != 0:
        LZ: gl.constexpr = staged[1].shape[2] if Z == 1 else staged[2].shape[2]
        o_z = gl.arange(0, LZ, LONG) + (0 if Z == 1 else i_e * LZ)
        z = first_z(z_in, p_z, o_z, LZ, D if Z == 1 else E)
    if Z >= 2:
        u_r = vector(u + p_token, first * BT + r, HV, length)
    if Z == 1:
        put_terms(z, z_sh.index(0))
    if Z == 1 or Z == 2:
        put_terms(gl.full([BT], 1.0, gl.float32, LONG), u_sh)
        fence_async_shared()
        barrier()
    for i in range(NT):
        s = i % STAGES
        j = i % 2
        i_t = place(i, NT, REVERSE)
        i_next = place(i + 1, NT, REVERSE)
        n = length - i_t * BT
        mbarrier.wait(full.index(s), parity(i, STAGES))
        P = gl.zeros([BT, BT], gl.float32, TILE)
        P = warpgroup_mma(staged[0].index(s), staged[1].index(s).permute((1, 0)), P, use_acc=False, is_async=True)
        if Z == 1:
            a_z = times(staged[0].index(s), z_sh.index(j), BT)
            more = times(staged[1].index(s).permute((1, 0)), u_sh, LZ)
        if Z == 2:
            more = times(staged[2].index(s).permute((1, 0)), u_sh, LZ)
        if DECAY == 1:
            _, to_end = constant_decays(lg, r, n, BT, REVERSE)
        if DECAY == 2:  # columns are read when rows have brought them into the cache: held from chunk to chunk, they cost registers
            whole = next_whole
            G_r = gl.where(r < n, next_r, whole)
            G_t = gl.where(t < n, vector(g + p_gate, i_t * BT + t, 1, length), whole)
            next_r, next_whole = vector(g + p_gate, i_next * BT + r, 1, length), whole_decay(g + p_gate, i_next, length, NT, BT)
            to_end = gl.exp2(G_r) if REVERSE else gl.exp2(whole - G_r)
            apart = (G_t[None, :] - G_r[:, None]) if REVERSE else (G_r[:, None] - G_t[None, :])
            M = gl.exp2(gl.where(inside, apart, float("-inf"))) * scale
        F = M
        if W == 2 and Z == 0:
            F = F * vector(w + p_token, i_t * BT + t, HV, length)[None, :]
        if W == 2:
            b_w = w_r
            w_r = vector(w + p_token, i_next * BT + r, HV, length)
        if WEIGHED:
            weigh = gl.full([BT], scale if REVERSE else 1.0, gl.float32, ROWS)
            if DECAY != 0:
                weigh = weigh * to_end
            if W == 2:
                weigh = weigh * b_w
            weighted = staged[2].index(s).load(TILE).to(gl.float32) * weigh[:, None]
            mbarrier.wait(c_taken.index(j), parity(i, 2) ^ 1)
            put(weighted, c_sh, j * TERMS, EXACT)
            if Z == 3:
                put_terms(gl.convert_layout(weigh * u_r, LONG), u_sh)
            fence_async_shared()
            barrier()
            mbarrier.arrive(c_ready.index(j))
        if Z == 3:  # columns are read when c has left the registers
            more = times(staged[2].index(s).permute((1, 0)), u_sh, LZ)
            u_t = vector(u + p_token, i_t * BT + t, HV, length)
            F = F * vector(w + p_token, i_t * BT + t, HV, length)[None, :]
        if Z == 0:
            P = warpgroup_mma_wait(0, [P])
        elif Z == 1:
            P, a_z, more = warpgroup_mma_wait(0, [P, a_z, more])
        else:
            P, more = warpgroup_mma_wait(0, [P, more])
        if Z == 2:
            P = P + u_r[:, None]
        if Z == 3:
            P = P + u_t[None, :]
        if Z >= 2:
            u_r = vector(u + p_token, i_next * BT + r, HV, length)
        P = P * F
        mbarrier.wait(p_taken.index(j), parity(i, 2) ^ 1)
        put(P, p_sh, j * TERMS, EXACT)
        if Z == 1:
            b_r = 1.0 / (scale * gl.convert_layout(gl.sum(a_z, 1), ROWS) + gl.sum(P, 1) + EPS)  # (3)
            side.index(j).store(b_r)
            gl.store(r_out + p_token + (i_t * BT + r).to(gl.int64) * HV, b_r, mask=(r < n) & (i_e == 0))
        if Z >= 2:
            side.index(j).store(z)
        if Z != 0:
            z = z + gl.sum(more, 1)
        if Z == 1:
            put_terms(z, z_sh.index((i + 1) % 2))  # the last chunk has read it
        fence_async_shared()
        barrier()
        mbarrier.arrive(p_ready.index(j))
        mbarrier.arrive(empty.index(s))
    if z_out is not None:
        gl.store(z_out + p_z + o_z, z, mask=(o_z < (D if Z == 1 else E)) & ((i_e == 0) | (Z != 1)))


@gluon.jit
def state(
    staged, full, empty, c_sh, c_ready, c_taken, s_sh, s_ready, s_taken, g, s_in, s_out, p_gate, p_state, i_e, length, NT,
    D: gl.constexpr, E: gl.constexpr, SR: gl.constexpr, SC: gl.constexpr, DECAY: gl.constexpr, EXACT: gl.constexpr,
    WEIGHED: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr, STATES: gl.constexpr,
):  # fmt: skip
    """S of each chunk's beginning, rounded for `output`, and S from chunk to chunk: the one chain that chunks form.

    S is held as [BE, BD]: products of 64 rows and many columns read least from shared memory, which is as busy as the matrix units.
    """
    BT: gl.constexpr = staged[0].shape[1]
    BD: gl.constexpr = staged[0].shape[2]
    BE: gl.constexpr = staged[2].shape[2]
    TERMS: gl.constexpr = 2 if EXACT else 1
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128 if BD > 128 else BD, 16])
    o_e = i_e * BE + gl.arange(0, BE, gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, BD, gl.SliceLayout(0, LAYOUT))
    m_s = (o_e < E)[:, None] & (o_d < D)[None, :]
    p_s = o_e[:, None] * SC + o_d[None, :] * SR
    S = gl.zeros([BE, BD], gl.float32, LAYOUT)
    if s_in is not None:
        S = gl.load(s_in + p_state + p_s, mask=m_s, other=0.0).to(gl.float32)
    if DECAY == 1:
        lg = gl.load(g + p_gate).to(gl.float32) * LOG2E
    if DECAY == 2:
        next_whole = whole_decay(g + p_gate, place(NT * 0, NT, REVERSE), length, NT, BT)
    for i in range(NT):
        s = i % STAGES
        j = i % 2
        i_t = place(i, NT, REVERSE)
        mbarrier.wait(s_taken.index(i % STATES), parity(i, STATES) ^ 1)
        put(S, s_sh, i % STATES * TERMS, EXACT)
        fence_async_shared()
        barrier()
        mbarrier.arrive(s_ready.index(i % STATES))
        if DECAY == 1:
            S = S * gl.exp2(gl.minimum(length - i_t * BT, BT).to(gl.float32) * lg)
        if DECAY == 2:
            S = S * gl.exp2(next_whole)
            next_whole = whole_decay(g + p_gate, place(i + 1, NT, REVERSE), length, NT, BT)
        mbarrier.wait(full.index(s), parity(i, STAGES))
        if WEIGHED:
            mbarrier.wait(c_ready.index(j), parity(i, 2))
            S = warpgroup_mma(c_sh.index(j * TERMS).permute((1, 0)), staged[1].index(s), S, is_async=True)
            if EXACT:
                S = warpgroup_mma(c_sh.index(j * TERMS + 1).permute((1, 0)), staged[1].index(s), S, is_async=True)
        else:
            S = warpgroup_mma(staged[2].index(s).permute((1, 0)), staged[1].index(s), S, is_async=True)
        S = warpgroup_mma_wait(0, [S])
        barrier()  # no warp reads the stage or the weighted rows any more
        if WEIGHED:
            mbarrier.arrive(c_taken.index(j))
        mbarrier.arrive(empty.index(s))
    if s_out is not None:
        gl.store(s_out + p_state + p_s, S, mask=m_s)


@gluon.jit
def from_state(tile_a, s_sh, i, full, s_ready, more, STAGES: gl.constexpr, STATES: gl.constexpr, EXACT: gl.constexpr):
    """Start a S of chunk i, once both are there; where there is no such chunk (more), of whatever is in memory, to no use."""
    BT: gl.constexpr = tile_a.shape[1]
    BE: gl.constexpr = s_sh.shape[1]
    TERMS: gl.constexpr = 2 if EXACT else 1
    s = i % STAGES
    mbarrier.wait(full.index(s), parity(i, STAGES), pred=more)
    mbarrier.wait(s_ready.index(i % STATES), parity(i, STATES), pred=more)
    O = gl.zeros([BT, BE], gl.float32, TILE)
    O = warpgroup_mma(tile_a.index(s), s_sh.index(i % STATES * TERMS).permute((1, 0)), O, use_acc=False, is_async=True)
    if EXACT:
        O = warpgroup_mma(tile_a.index(s), s_sh.index(i % STATES * TERMS + 1).permute((1, 0)), O, is_async=True)
    return O


@gluon.jit
def output(
    staged, full, empty, p_sh, p_ready, p_taken, s_sh, s_ready, s_taken, side, tile_o, o, s_o, g, w, u, skip, dot, dot_c, p_gate, p_token,
    p_sum, i_hv, i_e, length, NT, scale, HV, E: gl.constexpr, REVERSE: gl.constexpr, DECAY: gl.constexpr, W: gl.constexpr,
    Z: gl.constexpr, EXACT: gl.constexpr, STAGES: gl.constexpr, STATES: gl.constexpr,
):  # fmt: skip
    """o of chunk after chunk, with its normaliser, its skip, its weights of rows and the row sums with x."""
    BT: gl.constexpr = staged[0].shape[1]
    BE: gl.constexpr = staged[2].shape[2]
    TERMS: gl.constexpr = 2 if EXACT else 1
    rows_o = rows_of(o + p_token * E, length, s_o, E, BT, BE)
    AHEAD: gl.constexpr = STAGES > 1  # the next chunk has a stage while this one still holds its own
    r = gl.arange(0, BT, ROWS)
    first = place(NT * 0, NT, REVERSE)
    to_row = gl.full([BT], 1.0, gl.float32, ROWS)
    if DECAY == 1:
        lg = gl.load(g + p_gate).to(gl.float32) * LOG2E
        to_row, _ = constant_decays(lg, r, length - first * BT, BT, REVERSE)
    if DECAY == 2:
        G_r, whole = vector(g + p_gate, first * BT + r, 1, length), whole_decay(g + p_gate, first, length, NT, BT)
        to_row = token_decays(G_r, whole, r, length - first * BT, REVERSE)
    if W == 1:
        w_r = vector(w + p_token, first * BT + r, HV, length)
    if Z == 2:
        u_r = vector(u + p_token, first * BT + r, HV, length)
    if skip is not None:
        b_skip = gl.load(skip + i_hv).to(gl.float32)
    O = from_state(staged[0], s_sh, NT * 0, full, s_ready, NT > 0, STAGES, STATES, EXACT)
    O = warpgroup_mma_wait(0, [O])
    for i in range(NT):
        s = i % STAGES
        j = i % 2
        i_t = place(i, NT, REVERSE)
        i_next = place(i + 1, NT, REVERSE)
        n = length - i_t * BT
        barrier()  # every warp has a S
        mbarrier.arrive(s_taken.index(i % STATES))
        O = O * (to_row if REVERSE else to_row * scale)[:, None]  # reversed, the state has the scale with its rows
        if W == 1:
            b_w = w_r
            w_r = vector(w + p_token, i_next * BT + r, HV, length)
        if Z == 2:
            lift = scale * u_r
            u_r = vector(u + p_token, i_next * BT + r, HV, length)
        if DECAY == 2:
            G_r, whole = vector(g + p_gate, i_next * BT + r, 1, length), whole_decay(g + p_gate, i_next, length, NT, BT)
        mbarrier.wait(p_ready.index(j), parity(i, 2))
        O = warpgroup_mma(p_sh.index(j * TERMS), staged[2].index(s), O, is_async=True)
        if EXACT:
            O = warpgroup_mma(p_sh.index(j * TERMS + 1), staged[2].index(s), O, is_async=True)
        if AHEAD:
            ahead = from_state(staged[0], s_sh, i + 1, full, s_ready, i + 1 < NT, STAGES, STATES, EXACT)
            O = warpgroup_mma_wait(TERMS, [O])
        else:
            O = warpgroup_mma_wait(0, [O])
        if Z == 1:
            O = O * side.index(j).load(ROWS)[:, None]
        if Z == 2:
            O = O + lift[:, None] * side.index(j).load(COLUMNS)[None, :]
        if Z == 3:
            O = O + side.index(j).load(COLUMNS)[None, :]
        if dot is not None:  # before the row weight: reversed, the sum is the weight's gradient; forward in time rows have none
            X = staged[3].index(s).load(TILE).to(gl.float32)
            p_row = p_sum + (i_t * BT + r).to(gl.int64) * HV
            gl.store(dot + p_row, gl.sum(O * X, 1), mask=r < n)
            if dot_c is not None:
                gl.store(dot_c + p_row, gl.sum(staged[2].index(s).load(TILE).to(gl.float32) * X, 1), mask=r < n)
        if W == 1:
            O = O * b_w[:, None]
        if skip is not None:
            O = O + b_skip * staged[2].index(s).load(TILE).to(gl.float32)
        tma.store_wait(0)
        barrier()  # every warp has read the stage and P, and the last output has left its tile
        mbarrier.arrive(p_taken.index(j))
        mbarrier.arrive(empty.index(s))
        tile_o.store(O.to(tile_o.dtype))
        fence_async_shared()
        barrier()
        copy_out(rows_o, [i_t * BT, i_e * BE], tile_o)
        if not AHEAD:
            ahead = from_state(staged[0], s_sh, i + 1, full, s_ready, i + 1 < NT, STAGES, STATES, EXACT)
        if DECAY == 1:
            to_row, _ = constant_decays(lg, r, length - i_next * BT, BT, REVERSE)
        if DECAY == 2:
            to_row = token_decays(G_r, whole, r, length - i_next * BT, REVERSE)
        O = warpgroup_mma_wait(0, [ahead])
    tma.store_wait(0)
