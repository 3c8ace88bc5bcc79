"""What the host does in a call, part by part: microseconds of a decoding step and of a small training call, back to back on a GPU.

    python -m benchmarks.host --out results

Each part is timed by itself with the arguments of a real call; `compiled` is the kernel's own launcher in Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import fla_dispatch as fd
from fla_dispatch.dispatch.memory import Memory
from fla_dispatch.kernels._shared import launch as launching
from fla_dispatch.kernels._shared.step_cases import Sizes
from fla_dispatch.kernels.delta_step.cases import make_inputs as delta_inputs
from fla_dispatch.kernels.scalar_step.cases import make_inputs

from .common import write


def us(call: Callable[[], object], calls: int = 300, rounds: int = 7) -> float:
    """Median over rounds of back-to-back calls, without waiting for the device inside a round."""
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for _ in range(calls):
            call()
        times.append((time.perf_counter_ns() - begin) / calls / 1e3)
    torch.cuda.synchronize()
    return round(statistics.median(times), 2)


@contextlib.contextmanager
def forgetful() -> Iterator[None]:
    """Nothing is remembered: every call takes the whole road."""
    with mock.patch.object(Memory, "recall", lambda *_: None), mock.patch.object(Memory, "prepared", lambda *_: None):
        yield


def caught(name: str, call: Callable[[], object]) -> tuple[Any, ...]:
    """The arguments with which a call reaches a function of the launch module."""
    with forgetful(), mock.patch.object(launching, name, wraps=getattr(launching, name)) as spy:
        call()
    return tuple(spy.call_args.args)


def whole_road(call: Callable[[], object], calls: int = 300) -> float:
    """Microseconds of a call of which nothing is remembered."""
    with forgetful():
        return us(call, calls)


def step(op: str) -> dict[str, float]:
    """Parts of a step at B = 1, H = 32, D = 128, with slots; of a delta rule with what its layer does before it inside."""
    sizes = Sizes(1, 32, 32, 128, 128)
    if op in ("retention_step", "simple_gla_step"):
        x = make_inputs(op, sizes, torch.bfloat16, "cuda", pool="slots")
    else:
        x = delta_inputs(op, sizes, torch.bfloat16, "cuda", pool="slots", options=(("raw", True),))
    handle = fd.op(op)
    call = lambda: handle(*x.args, **x.kwargs)  # noqa: E731
    call()
    v = x.args[2]
    run, args, options, _ = caught("_call", call)
    whole = caught("_run", call)
    low = handle.contract(*x.args, **x.kwargs)
    plan = handle.bridge.plans.lookup(low.tensors, low.options, False, None)
    bound = handle.bind(*x.args, **x.kwargs)
    named = {name: y for name, y in x.kwargs.items() if isinstance(y, torch.Tensor)}
    return {
        "torch.add": us(lambda: torch.add(v, v)),
        "output": us(lambda: v.new_empty(v.shape)),
        "compiled": us(lambda: run(*args, **options)),
        "launch": us(lambda: launching._run(*whole)),
        "variant": us(lambda: plan.forward(plan.forward_config, low.tensors, low.options)),
        "contract": us(lambda: handle.contract(*x.args, **x.kwargs)),
        "plan": us(lambda: handle.bridge.plans.lookup(low.tensors, low.options, False, None)),
        "handle, whole road": whole_road(call),
        "bound handle": us(lambda: bound(*x.args, **named)),
        "handle": us(call),
    }


class Bare(torch.autograd.Function):
    """Tensors in, one like the third out, nothing computed."""

    @staticmethod
    def forward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*given)
        return torch.empty_like(given[2])

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def training(op: str) -> dict[str, float]:
    """An op at 64 tokens, forward and backward, beside a bare function; with autograd in its thread and in the caller's."""
    shape = (1, 64, 4, 128)
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    if op == "gated_delta":
        given[1] = torch.nn.functional.normalize(given[1], dim=-1)
        given += [-torch.rand(shape[:3], device="cuda"), torch.rand(shape[:3], device="cuda")]
    given = [x.requires_grad_() for x in given]
    handle, do = fd.op(op), torch.randn_like(given[2])
    ours = lambda: torch.autograd.grad(handle(*given)[0], given, do)  # noqa: E731
    bare = lambda: torch.autograd.grad(Bare.apply(*given), given, do)  # noqa: E731
    found = {}
    for where, several in (("", True), (", one thread", False)):
        with torch.autograd.set_multithreading_enabled(several):
            found[f"{op} forward + backward{where}"] = us(ours, 100)
            found[f"{op} forward + backward, whole road{where}"] = whole_road(ours, 100)
            found[f"bare function of {len(given)}, forward + backward{where}"] = us(bare, 100)
    with torch.no_grad():
        found[f"{op} forward"] = us(lambda: handle(*given), 100)
        found[f"{op} forward, whole road"] = whole_road(lambda: handle(*given), 100)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    given = parser.parse_args()
    with torch.no_grad():
        found = step("retention_step")
        for op in ("simple_gla_step", "gated_delta_step"):
            found |= {f"{op}, {part}": time for part, time in step(op).items()}
    found |= training("retention") | training("gated_delta")
    for name, value in found.items():
        print(f"{value:8.2f} us  {name}")
    write(given.out, "host", rows=[found])


if __name__ == "__main__":
    main()
