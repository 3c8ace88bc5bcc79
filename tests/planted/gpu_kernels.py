"""A planted Triton variant for real GPUs: chunk_torch's answer, copied by a kernel that misbehaves as the config says.

`KINDS` are the configs it offers, in order; a test replaces them. Each kernel writes row i of o [rows, W] from row i of x, the right
answer, by one block; the fault comes on top. It has no backward, and wants K = V = 64 in bfloat16.
Grid: (rows,), unordered_kernel (rows * WRITERS,), greedy_kernel (1,).
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fla_dispatch import registry
from fla_dispatch.kernels._shared.launch import launch
from fla_dispatch.kernels.scalar_decay import chunk_torch
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig
from fla_dispatch.problem import Problem
from fla_dispatch.registry import Direction, Variant
from fla_dispatch.requirements import Dim, DTypes, Gpu, Lacks

NAME = "misbehaving_triton"

#: Width of a row, the only head dim.
W = 64

#: Length at which `late_*` misbehaves: of a timed key, and of no proof's trial.
LATE = 64

#: Blocks that write the same row.
WRITERS = 8

KINDS: list[str] = ["good"]


class Planted(NamedTuple):
    """How to misbehave; `good`, and `good_<anything>`, does not."""

    kind: str


@triton.jit
def exact_kernel(
    x,  # [rows, W]
    o,  # [rows, W]
    W: tl.constexpr,
):
    o_w = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    tl.store(o + o_w, tl.load(x + o_w))


@triton.jit
def scaled_kernel(
    x,  # [rows, W]
    o,  # [rows, W]
    W: tl.constexpr,
):
    """Wrong by 1 %."""
    o_w = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    tl.store(o + o_w, tl.load(x + o_w).to(tl.float32) * 0.99)


@triton.jit
def beyond_kernel(
    x,  # [rows, W]
    o,  # [rows, W]
    W: tl.constexpr,
):
    """Also writes the row behind the last one."""
    i_row = tl.program_id(0).to(tl.int64)
    o_w = i_row * W + tl.arange(0, W)
    b_x = tl.load(x + o_w)
    tl.store(o + o_w, b_x)
    if i_row == tl.num_programs(0) - 1:
        tl.store(o + o_w + W, b_x)


@triton.jit
def partial_kernel(
    x,  # [rows, W]
    o,  # [rows, W]
    W: tl.constexpr,
):
    """Leaves the last row unwritten."""
    i_row = tl.program_id(0).to(tl.int64)
    o_w = i_row * W + tl.arange(0, W)
    tl.store(o + o_w, tl.load(x + o_w), mask=o_w < (tl.num_programs(0) - 1) * W)


@triton.jit
def unordered_kernel(
    x,  # [rows, W]
    o,  # [rows, W]
    W: tl.constexpr,
    WRITERS: tl.constexpr,
):
    """Every row is written by several blocks, the last of which wins; they differ in one element, by less than any tolerance."""
    i_row, i_writer = tl.program_id(0).to(tl.int64) // WRITERS, tl.program_id(0) % WRITERS
    o_c = tl.arange(0, W)
    b_x = tl.load(x + i_row * W + o_c)
    b_x = tl.where(o_c == 0, b_x.to(tl.float32) * (1 + i_writer * 0.002), b_x.to(tl.float32))
    tl.store(o + i_row * W + o_c, b_x)


@triton.jit
def far_kernel(
    x,  # [rows, W]
    o,  # [rows, W]
    W: tl.constexpr,
):
    """Also writes 2 TiB before o, where nothing is."""
    o_w = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    b_x = tl.load(x + o_w)
    tl.store(o + o_w, b_x)
    tl.store(o + o_w - (1 << 40), b_x)


@triton.jit
def endless_kernel(
    x,  # [rows, W]
    o,  # [rows, W]
    flag,  # [1] int32, 0 for ever
    W: tl.constexpr,
):
    """Waits for a flag that nobody raises, for 2^40 loads: days."""
    i = tl.load(flag).to(tl.int64)
    while (tl.load(flag, volatile=True) == 0) & (i < (1 << 40)):
        i += 1
    o_w = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    tl.store(o + o_w, tl.load(x + o_w) + i.to(tl.float32))


@triton.jit
def refused_kernel(
    x,  # [rows, W]
    o,  # [rows, W]
    W: tl.constexpr,
):
    """Does not compile."""
    tl.static_assert(W == 0, "planted: no such width")


@triton.jit(do_not_specialize=["total"])
def greedy_kernel(
    x,  # [total, 256] of any content
    o,  # [256, 256]
    total,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """A product whose staged operands need more shared memory than any device has."""
    o_t, o_e = tl.arange(0, BT), tl.arange(0, BE)
    b_o = tl.zeros([BE, BE], dtype=tl.float32)
    for i_t in range(0, total):
        p_x = x + (i_t * BT + o_t[:, None]) * BE + o_e[None, :]
        b_x = tl.load(p_x)
        b_o += tl.dot(tl.trans(b_x), b_x)
    tl.store(o + o_e[:, None] * BE + o_e[None, :], b_o)


#: kind -> the kernel of the plain form (x, o, W), its fault and no more
KERNELS = {
    "good": exact_kernel, "abort": exact_kernel, "raises": exact_kernel, "wrong": scaled_kernel, "beyond": beyond_kernel,
    "unwritten": partial_kernel, "far": far_kernel, "compile_error": refused_kernel,
}  # fmt: skip


def forward(config: Any, tensors: Any, options: Any) -> Any:
    out = chunk_torch.forward(TorchConfig(64), tensors, options)
    x, kind = out.o, config.kind
    if kind.startswith("late_"):
        kind = kind.removeprefix("late_") if x.shape[1] == LATE else "good"
    kind = "good" if kind.startswith("good_") else kind
    if x.device.type != "meta" and kind == "abort":  # what a launch or a driver may do; the tuner records launches in its own process
        os.abort()
    if kind == "raises":
        raise KeyError("planted")
    o = x.new_empty(x.shape)
    rows = x.numel() // W
    if kind == "racy":
        launch(unordered_kernel, (rows * WRITERS,), (x, o), {"W": W, "WRITERS": WRITERS}, 1, 1)
    elif kind == "endless":
        launch(endless_kernel, (rows,), (x, o, torch.zeros(1, dtype=torch.int32, device=x.device)), {"W": W}, 1, 1)
    elif kind == "shared_memory":
        launch(greedy_kernel, (1,), (x, o, 0), {"BT": 64, "BE": 256}, 8, 10)
    else:
        launch(KERNELS[kind], (rows,), (x, o), {"W": W}, 1, 1)
    return out._replace(o=o)


def _cost(problem: Problem, config: Planted, direction: Direction) -> float:
    """Slightly more than sweep_triton's: never the default, and never too slow to be measured."""
    sweep = registry.get_recurrence("scalar_decay").variant("sweep_triton")
    return 1.1 * sweep.cost(problem, sweep.configs(problem)[0], direction)


VARIANT = Variant(
    NAME, __name__, (Gpu(), Dim("K", W, W), Dim("V", W, W), DTypes("qkv", ("bfloat16",)), Lacks(("grad", "capture"))), _cost,
    lambda problem: tuple(Planted(kind) for kind in KINDS), "misbehaves on purpose",
)  # fmt: skip


def plant() -> None:
    """Register the variant unless it is registered."""
    if all(v.name != NAME for v in registry.get_recurrence("scalar_decay").variants):
        registry.register_variant("scalar_decay", VARIANT)


def withdraw() -> None:
    """Take it out unless it is out; test modules do so after importing this one, and plant it for their own tests."""
    if any(v.name == NAME for v in registry.get_recurrence("scalar_decay").variants):
        registry.unregister_variant("scalar_decay", NAME)


plant()
