"""What the host does in small calls, on any machine: microseconds and Python calls, with launches that reach no device.

    python -m benchmarks.stubbed

Kernels are neither compiled nor run: what Triton does on the host stands in for it, but for its C function, so figures are for comparing
with each other. `whole road` is a call that nothing is remembered of; `remembered` is what a user gets from the third call on.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import fla_dispatch as fd
from fla_dispatch import settings
from fla_dispatch.dispatch.memory import Memory
from fla_dispatch.kernels._shared import launch as launching
from fla_dispatch.kernels._shared import tape
from fla_dispatch.kernels._shared.step_cases import Sizes
from fla_dispatch.kernels.delta_step.cases import make_inputs as delta_steps
from fla_dispatch.kernels.scalar_step.cases import make_inputs as scalar_steps


class Driver:
    """One device with one stream."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launched: Callable[..., object] | None) -> CompiledKernel:
    """Triton's own compiled kernel and launcher around a C function that takes anything."""
    launcher = CudaLauncher.__new__(CudaLauncher)
    for name in ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"):
        setattr(launcher, name, 0)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, False
    launcher.arg_annotations = launcher.kernel_signature = b""
    launcher.launch = "".format
    found = CompiledKernel.__new__(CompiledKernel)
    found.module, found.function, found.packed_metadata, found._run = object(), 1, (4, 1, 0), launched or launcher
    found.src, found.name = None, "stub"
    return found


@contextlib.contextmanager
def stubbed(launched: Callable[..., object] | None = None) -> Iterator[None]:
    """Triton variants may be named on a CPU, and their kernels do nothing; launched: takes what their launcher would."""
    kernels: dict[int, CompiledKernel] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel:
        found = kernels.setdefault(id(self), compiled(launched))
        found[(*grid, 1, 1)[:3]](*args, *[options[p.name] for p in self.params[len(args) :]])
        return found

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(triton.runtime.driver, "_active", Driver()),
        mock.patch.object(launching, "_compiled", {}),
        settings.override(interpret=True),
        mock.patch.dict(tape.QUEUES, cpu=tape.Queue(lambda: None, lambda: False, lambda index: 0)),
    ):
        yield


def us(call: Callable[[], object], calls: int = 200, rounds: int = 25) -> float:
    """Least of many rounds: machines are shared."""
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        for _ in range(calls):
            call()
        times.append((time.perf_counter_ns() - begin) / calls / 1e3)
    return min(times)


def frames(call: Callable[[], object]) -> tuple[int, int]:
    """Calls of Python functions and of C functions in one call."""
    found = {"call": 0, "c_call": 0}

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in found:
            found[event] += 1

    call()
    sys.setprofile(count)
    call()
    sys.setprofile(None)
    return found["call"] - 1, found["c_call"] - 1


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps at B = 1, H = 32, D = 128 with slots, and small calls of 64 tokens."""
    sizes = Sizes(1, 32, 32, 128, 128)
    for op, make, options in (
        ("retention_step", scalar_steps, ()), ("simple_gla_step", scalar_steps, ()), ("mamba2_step", scalar_steps, ()),
        ("delta_step", delta_steps, ()), ("gated_delta_step", delta_steps, (("raw", True),)), ("kda_step", delta_steps, ()),
    ):  # fmt: skip
        x = make(op, sizes, torch.bfloat16, "cpu", pool="slots", options=options)
        handle = fd.op(op, mode="step_triton")
        yield op, lambda handle=handle, x=x: handle(*x.args, **x.kwargs)
    small: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("gated_delta", "chunk_triton", {}), ("gated_delta", "chunk_triton", {"use_qk_l2norm": True, "use_beta_sigmoid": True}),
        ("gated_delta", "recurrent_triton", {}), ("delta", "chunk_triton", {}), ("retention", "chunk_triton", {}),
    )  # fmt: skip
    for op, mode, options in small:
        shape = (1, 64, 4, 128)
        q, k, v = (torch.randn(shape, dtype=torch.float16) for _ in range(3))
        gates = [torch.rand(shape[:3]) * -1, torch.rand(shape[:3])]
        given = [q, k, v, *{"gated_delta": gates, "delta": gates[1:], "retention": []}[op]]
        leaves, do = [x.clone().requires_grad_() for x in given], torch.randn_like(v)
        handle = fd.op(op, mode=mode)
        title = f"{op} {mode}{', prepared' if options else ''}"
        yield f"{title}, forward", lambda handle=handle, given=given, options=options: handle(*given, **options)
        yield (
            f"{title}, forward + backward",
            lambda handle=handle, leaves=leaves, do=do, options=options: torch.autograd.grad(handle(*leaves, **options)[0], leaves, do),
        )


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':56s} {'us':>8s} {'Python':>7s} {'C':>5s}   | remembered: us, Python, C")
    with stubbed(), torch.autograd.set_multithreading_enabled(False):
        for name, call in calls():
            with torch.set_grad_enabled("backward" in name):
                with mock.patch.object(Memory, "recall", lambda *_: None), mock.patch.object(Memory, "prepared", lambda *_: None):
                    whole = us(call), *frames(call)
                found = us(call), *frames(call)
            print("{:56s} {:8.2f} {:7d} {:5d}   | {:8.2f} {:7d} {:5d}".format(name, *whole, *found))


if __name__ == "__main__":
    main()
