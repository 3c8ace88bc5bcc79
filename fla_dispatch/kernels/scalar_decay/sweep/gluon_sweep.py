"""f(a, b, c) of equation (5) on Hopper's matrix units by hand: the chunks of `chunk_body`, with products that run side by side.

Grid: (sequences * HV * tiles of E). Forward and each gradient are one launch with permuted arguments. Triton waits for every
product where it stands; here, per chunk,

    P = a b^T and O = a S start together; while they run, c is weighted;
    S <- decay S + b^T (weighted c) starts; while it runs, P is masked;
    O <- decays O + P c starts; while it runs, S is rounded for the next chunk,

and tensor descriptors fetch STAGES chunks ahead. Every operand comes from shared memory: register operands of pipelined
products are miscompiled by the ptxas of these releases (decision 0003 has a relative). No normaliser.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..._shared.gluon_names import barrier, copy_in, copy_out
from ..._shared.launch import launch, tile
from .host import Call, tiles

LOG2E = gl.constexpr(1.4426950408889634)

#: Tokens per chunk.
CHUNK = 64


@gluon.jit
def rows_of(p, length, stride, D: gl.constexpr, BT: gl.constexpr, BD: gl.constexpr):
    """A descriptor of rows [length, D] in tiles of [BT, BD]; zero outside of them."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BD], p.dtype.element_ty)
    return tma.make_tensor_descriptor(p, shape=[gl.maximum(length, 1), D], strides=[stride, 1], block_shape=[BT, BD], layout=layout)


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """One barrier for the copies of each stage."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(STAGES):
        mbarrier.init(full.index(j), count=1)
    fence_async_shared()
    barrier()
    return full


@gluon.jit
def span(cu, i_n, T, PACKED: gl.constexpr):
    """First token and length of a sequence."""
    if PACKED:
        begin = gl.load(cu + i_n).to(gl.int64)
        return begin, (gl.load(cu + i_n + 1).to(gl.int64) - begin).to(gl.int32)
    else:
        return i_n.to(gl.int64) * T, T


@gluon.jit
def vector(p, t, stride, length):
    """Elements t of a vector over tokens; zero outside of [0, length)."""
    return gl.load(p + t.to(gl.int64) * stride, mask=(t >= 0) & (t < length), other=0.0).to(gl.float32)


@gluon.jit
def gates(p, i_t, r, t, length, NT, BT: gl.constexpr):
    """Cumulative log2 decays of chunk i_t by rows and by columns, and of the whole chunk."""
    last = gl.load(p + gl.minimum(i_t * BT + BT, length) - 1, mask=(i_t >= 0) & (i_t < NT), other=0.0)
    return vector(p, i_t * BT + r, 1, length), vector(p, i_t * BT + t, 1, length), last


@gluon.jit
def fetch(rows, staged, full, i, NT, i_e, REVERSE: gl.constexpr, STAGES: gl.constexpr):
    """Start the copies of the i-th chunk in time into its stage: a, b, c, and x where there is one."""
    BT: gl.constexpr = staged[0].shape[1]
    BD: gl.constexpr = staged[0].shape[2]
    BE: gl.constexpr = staged[2].shape[2]
    pred = i < NT
    s = i % STAGES
    row = ((NT - 1 - i) if REVERSE else i) * BT
    mbarrier.expect(full.index(s), (2 * BT * BD + (len(rows) - 2) * BT * BE) * 2, pred=pred)
    for j in gl.static_range(len(rows)):
        copy_in(rows[j], [row, 0 if j < 2 else i_e * BE], full.index(s), staged[j].index(s), pred=pred)


@gluon.jit
def put(value, shared, EXACT: gl.constexpr):
    """Round float32 to the operands' dtype; EXACT: in two terms."""
    high = value.to(shared.dtype)
    shared.index(0).store(high)
    if EXACT:
        shared.index(1).store((value - high.to(gl.float32)).to(shared.dtype))


@gluon.jit
def token_decays(G_r, G_t, whole, inside, REVERSE: gl.constexpr):
    """From cumulative log2 decays of rows and columns: decays to each row, to the chunk's end, and M of (4)."""
    if REVERSE:
        return gl.exp2(whole - G_r), gl.exp2(G_r), gl.exp2(gl.where(inside, G_t[None, :] - G_r[:, None], float("-inf")))
    else:
        return gl.exp2(G_r), gl.exp2(whole - G_r), gl.exp2(gl.where(inside, G_r[:, None] - G_t[None, :], float("-inf")))


@gluon.jit
def constant_decays(lg, r, n, BT: gl.constexpr, REVERSE: gl.constexpr):
    """For one log2 decay per token and n tokens left, of which the chunk has at most BT: the whole decay, to each row, to the end."""
    valid = gl.minimum(n, BT).to(gl.float32)
    after = (r + 1).to(gl.float32)
    ahead = gl.exp2(after * lg)
    behind = gl.exp2(gl.where(r < n, (valid - after) * lg, float("-inf")))
    if REVERSE:
        return valid * lg, behind, ahead
    else:
        return valid * lg, ahead, behind


@gluon.jit(do_not_specialize=["T", "total", "scale", "H", "HV"])
def gluon_sweep(
    a,  # [B, T, heads, D], token stride s_a; heads are H where SHARED says so, else HV
    b,  # [B, T, heads, D], token stride s_b
    c,  # [B, T, heads, E], token stride s_c
    o,  # [B, T, HV, E]
    x,  # [B, T, heads, E] to take row sums with, token stride s_x, or None
    dot,  # [NE, B, T, HV] float32 row sums, or None
    dot_c,  # [NE, B, T, HV] float32 row sums c . x, or None
    g,  # [HV, B * T] cumulative log2 decays (DECAY 2), [HV] log decays (DECAY 1), or None
    w,  # [B, T, HV] weights of rows (W 1) or columns (W 2), or None
    skip,  # [HV] weight of c itself in o, or None
    s_in,  # [N, HV, D, E] by strides SR and SC, or None
    s_out,  # the same, final state, or None
    cu,  # [N + 1] or None
    T,
    total,
    scale,
    s_a,
    s_b,
    s_c,
    s_x,
    H,
    HV,
    D: gl.constexpr,
    E: gl.constexpr,
    BD: gl.constexpr,
    BE: gl.constexpr,
    BT: gl.constexpr,
    SR: gl.constexpr,
    SC: gl.constexpr,
    SHARED: gl.constexpr,  # bits of those of a (1), b (2), c (4), x (8) that hold one head per group
    DECAY: gl.constexpr,  # 0 none, 1 constant per head, 2 per token
    REVERSE: gl.constexpr,
    W: gl.constexpr,  # 0 none, 1 rows, 2 columns
    EXACT: gl.constexpr,  # two terms per rounded operand
    PACKED: gl.constexpr,
    STAGES: gl.constexpr,
    TMA: gl.constexpr,  # always: the launcher gives scratch memory for descriptors
):
    NE: gl.constexpr = (E + BE - 1) // BE
    i_e = gl.program_id(0) % NE
    i_nh = gl.program_id(0) // NE
    i_hv = i_nh % HV
    i_h = i_hv // (HV // H)
    begin, length = span(cu, i_nh // HV, T, PACKED)
    p_token = begin * HV + i_hv
    rows_o = rows_of(o + p_token * E, length, HV * E, E, BT, BE)
    rows_a = rows_of(a + begin * s_a + (i_h if SHARED & 1 else i_hv) * D, length, s_a, D, BT, BD)
    rows_b = rows_of(b + begin * s_b + (i_h if SHARED & 2 else i_hv) * D, length, s_b, D, BT, BD)
    rows_c = rows_of(c + begin * s_c + (i_h if SHARED & 4 else i_hv) * E, length, s_c, E, BT, BE)
    dtype: gl.constexpr = c.dtype.element_ty
    NW: gl.constexpr = gl.num_warps() // 4
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, NW], [16, BT // NW, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, NW], [16, BE // NW, 16])
    tile_a = gl.allocate_shared_memory(dtype, [STAGES, BT, BD], rows_a.layout)
    tile_b = gl.allocate_shared_memory(dtype, [STAGES, BT, BD], rows_b.layout)
    tile_c = gl.allocate_shared_memory(dtype, [STAGES, BT, BE], rows_c.layout)
    tile_o = gl.allocate_shared_memory(o.dtype.element_ty, [BT, BE], rows_o.layout)
    if x is not None:
        rows_x = rows_of(x + begin * s_x + (i_h if SHARED & 8 else i_hv) * E, length, s_x, E, BT, BE)
        tile_x = gl.allocate_shared_memory(dtype, [STAGES, BT, BE], rows_x.layout)
        rows = (rows_a, rows_b, rows_c, rows_x)
        staged = (tile_a, tile_b, tile_c, tile_x)
    else:
        rows = (rows_a, rows_b, rows_c)
        staged = (tile_a, tile_b, tile_c)
    TERMS: gl.constexpr = 2 if EXACT else 1
    WEIGHED: gl.constexpr = W == 2 or DECAY != 0 or REVERSE
    p_sh = gl.allocate_shared_memory(dtype, [TERMS, BT, BT], gl.NVMMASharedLayout.get_default_for([BT, BT], dtype))
    s_sh = gl.allocate_shared_memory(dtype, [TERMS, BD, BE], gl.NVMMASharedLayout.get_default_for([BD, BE], dtype))
    if WEIGHED:
        c_sh = gl.allocate_shared_memory(dtype, [TERMS, BT, BE], rows_c.layout)
    full = barriers(STAGES)
    NT = gl.cdiv(length, BT)
    for j in gl.static_range(STAGES):
        fetch(rows, staged, full, j, NT, i_e, REVERSE, STAGES)
    r = gl.arange(0, BT, gl.SliceLayout(1, LP))
    t = gl.arange(0, BT, gl.SliceLayout(0, LP))
    o_d = gl.arange(0, BD, gl.SliceLayout(1, LO))
    o_e = i_e * BE + gl.arange(0, BE, gl.SliceLayout(0, LO))
    m_s = (o_d < D)[:, None] & (o_e < E)[None, :]
    p_s = i_nh.to(gl.int64) * D * E + o_d[:, None] * SR + o_e[None, :] * SC
    if s_in is not None:
        S = gl.load(s_in + p_s, mask=m_s, other=0.0).to(gl.float32)
    else:
        S = gl.zeros([BD, BE], gl.float32, LO)
    inside = (r[:, None] <= t[None, :]) if REVERSE else (r[:, None] >= t[None, :])
    i_t = (NT - 1) if REVERSE else NT * 0
    if DECAY == 1:
        lg = gl.load(g + i_hv).to(gl.float32) * LOG2E
        apart = (t[None, :] - r[:, None]) if REVERSE else (r[:, None] - t[None, :])
        M = gl.exp2(gl.where(inside, apart.to(gl.float32) * lg, float("-inf")))
    if DECAY == 2:
        p_g = g + i_hv * total.to(gl.int64) + begin
        next_r, next_t, next_total = gates(p_g, i_t, r, t, length, NT, BT)
    if W != 0:
        w_r = vector(w + p_token, i_t * BT + r, HV, length)
    if W == 2:
        w_t = vector(w + p_token, i_t * BT + t, HV, length)
    if skip is not None:
        b_skip = gl.load(skip + i_hv).to(gl.float32)
    put(S, s_sh, EXACT)
    fence_async_shared()
    barrier()
    for i in range(NT):
        s = i % STAGES
        i_t = (NT - 1 - i) if REVERSE else i
        i_next = (i_t - 1) if REVERSE else (i_t + 1)
        n = length - i_t * BT
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        P = gl.zeros([BT, BT], gl.float32, LP)
        P = warpgroup_mma(tile_a.index(s), tile_b.index(s).permute((1, 0)), P, use_acc=False, is_async=True)
        O = warpgroup_mma(tile_a.index(s), s_sh.index(0), gl.zeros([BT, BE], gl.float32, LO), use_acc=False, is_async=True)
        if EXACT:
            O = warpgroup_mma(tile_a.index(s), s_sh.index(1), O, is_async=True)
        if W != 0:
            b_w = w_r
            w_r = vector(w + p_token, i_next * BT + r, HV, length)
        if W == 2:
            b_wt = w_t
            w_t = vector(w + p_token, i_next * BT + t, HV, length)
        if DECAY == 2:
            whole = next_total
            G_r = gl.where(r < n, next_r, whole)
            G_t = gl.where(t < n, next_t, whole)
            next_r, next_t, next_total = gates(p_g, i_next, r, t, length, NT, BT)
            to_row, to_end, M = token_decays(G_r, G_t, whole, inside, REVERSE)
        if DECAY == 1:
            whole, to_row, to_end = constant_decays(lg, r, n, BT, REVERSE)
        b_T = tile_b.index(s).permute((1, 0))
        if WEIGHED:
            weigh = gl.full([BT], scale if REVERSE else 1.0, gl.float32, gl.SliceLayout(1, LP))
            if DECAY != 0:
                weigh = weigh * to_end
            if W == 2:
                weigh = weigh * b_w
            put(tile_c.index(s).load(LO).to(gl.float32) * gl.convert_layout(weigh, gl.SliceLayout(1, LO))[:, None], c_sh, EXACT)
            fence_async_shared()
            barrier()
            if DECAY != 0:
                S = S * gl.exp2(whole)
            S = warpgroup_mma(b_T, c_sh.index(0), S, is_async=True)
            if EXACT:
                S = warpgroup_mma(b_T, c_sh.index(1), S, is_async=True)
        else:
            S = warpgroup_mma(b_T, tile_c.index(s), S, is_async=True)
        P = warpgroup_mma_wait(2 * TERMS, [P])
        P = gl.where(inside, P, 0.0) if DECAY == 0 else P * M
        if W == 2:
            P = P * b_wt[None, :]
        if REVERSE:
            P = P * scale
        put(P, p_sh, EXACT)
        fence_async_shared()
        barrier()
        O = warpgroup_mma_wait(TERMS, [O])
        if DECAY != 0:
            O = O * gl.convert_layout(to_row, gl.SliceLayout(1, LO))[:, None]
        O = warpgroup_mma(p_sh.index(0), tile_c.index(s), O, is_async=True)
        if EXACT:
            O = warpgroup_mma(p_sh.index(1), tile_c.index(s), O, is_async=True)
        S = warpgroup_mma_wait(TERMS, [S])
        O = warpgroup_mma_wait(0, [O])
        if not REVERSE:
            O = O * scale
        if x is not None:  # before the row weight: reversed, the sum is the weight's gradient; forward in time rows have none
            o_t = gl.arange(0, BT, gl.SliceLayout(1, LO))
            p_dot = i_e * total.to(gl.int64) * HV + p_token + (i_t * BT + o_t).to(gl.int64) * HV
            X = tile_x.index(s).load(LO).to(gl.float32)
            gl.store(dot + p_dot, gl.sum(O * X, 1), mask=o_t < n)
            if dot_c is not None:
                gl.store(dot_c + p_dot, gl.sum(tile_c.index(s).load(LO).to(gl.float32) * X, 1), mask=o_t < n)
        if W == 1:
            O = O * gl.convert_layout(b_w, gl.SliceLayout(1, LO))[:, None]
        if skip is not None:
            O = O + b_skip * tile_c.index(s).load(LO).to(gl.float32)
        tma.store_wait(0)
        barrier()  # every warp has read this chunk's tiles, the state and the last output
        put(S, s_sh, EXACT)
        tile_o.store(O.to(o.dtype.element_ty))
        fence_async_shared()
        barrier()
        copy_out(rows_o, [i_t * BT, i_e * BE], tile_o)
        fetch(rows, staged, full, i + STAGES, NT, i_e, REVERSE, STAGES)
    tma.store_wait(0)
    if s_out is not None:
        gl.store(s_out + p_s, S, mask=m_s)


def run_sweep(
    c: Call,
    a: torch.Tensor,
    s_a: int,
    b: torch.Tensor,
    s_b: int,
    x: torch.Tensor,  # c of the equation
    s_x: int,
    out: torch.Tensor,
    *,
    shared: int,  # bits of the operands with one head per group, see the kernel
    scale: float,
    decay: int,
    reverse: bool,
    w: torch.Tensor | None,
    W: int,
    skip: torch.Tensor | None,
    s_in: torch.Tensor | None,
    s_out: torch.Tensor | None,
    transposed: bool,  # states are [E, D] in memory
    exact: bool,
    with_rows: tuple[torch.Tensor, int] | None,  # rows and their token stride, for row sums
    dot: torch.Tensor | None,
    dot_c: torch.Tensor | None,
    BE: int,
    warps: int,
    stages: int,
) -> None:
    """One sweep: out = f(a, b, x) over all sequences, value heads and tiles of the last dim of `out`."""
    D, E = a.shape[-1], out.shape[-1]
    SR, SC = (1, D) if transposed else (E, 1)
    launch(
        gluon_sweep,
        (c.N * c.HV * tiles(E, BE),),
        (
            a, b, x, out, None if with_rows is None else with_rows[0], dot, dot_c, c.g, w, skip, s_in, s_out, c.cu, c.T, c.B * c.T, scale,
            s_a, s_b, s_x, 0 if with_rows is None else with_rows[1], c.H, c.HV,
        ),
        {
            "D": D, "E": E, "BD": tile(D), "BE": BE, "BT": CHUNK, "SR": SR, "SC": SC, "SHARED": shared, "DECAY": decay, "REVERSE": reverse,
            "W": W if w is not None else 0, "EXACT": exact, "PACKED": c.cu is not None, "STAGES": stages, "TMA": True,
        },
        warps,
        stages,
    )  # fmt: skip
