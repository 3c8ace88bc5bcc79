"""What choosing costs: microseconds per call of a bound handle, a handle and the variant's launcher, with and without grad.

    python -m benchmarks.overhead --out results [--device cuda]

The launcher is that of a variant that only allocates its outputs, so the differences are the cost of checking and choosing.
Medians of many rounds; the ways are interleaved, because clocks drift.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fla_dispatch as fd
from fla_dispatch import registry
from fla_dispatch.dispatch.bridge import get_bridge


class Plain(torch.autograd.Function):
    """The hand-written autograd.Function that a handle with grad is compared with."""

    @staticmethod
    def forward(ctx: Any, plan: Any, recurrence: Any, options: Any, tensors: Any, *inputs: Any) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        outputs = plan.forward(plan.forward_config, tensors, options)
        ctx.save_for_backward(*inputs)
        ctx.rest = plan, recurrence, options, tensors, outputs
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> Any:
        plan, recurrence, options, tensors, outputs = ctx.rest
        residuals = recurrence.residuals(recurrence.tensors(*ctx.saved_tensors, *tensors[3:]), outputs, options)
        grads = plan.backward(None, residuals, recurrence.output_grads(do, None, None), options, (True,) * 3 + (False,) * 4)
        return (None,) * 4 + tuple(grads[:3])


def interleaved(ways: dict[str, Callable[[], object]], rounds: int, calls: int, sync: Callable[[], None]) -> dict[str, float]:
    """Median microseconds per call of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            sync()
            begin = time.perf_counter_ns()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter_ns() - begin) / calls / 1e3)
            sync()
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=20)
    given = parser.parse_args()
    device = torch.device(given.device)
    sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    registry.load_rooms()
    free = lambda problem, config, direction: 0.0  # noqa: E731
    registry.register_variant("scalar_decay", registry.Variant("null_torch", "benchmarks.null_variant", (), free))
    handle = fd.op("retention", mode="null_torch")
    q, k, v = (torch.randn(1, 64, 2, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    low = handle.contract(q, k, v)
    bridge = get_bridge("scalar_decay")
    recurrence = registry.get_recurrence("scalar_decay")
    result: dict[str, dict[str, float]] = {}
    for grad in (False, True):
        inputs = [x.detach().requires_grad_(grad) for x in (q, k, v)]
        tensors = low.tensors._replace(q=inputs[0], k=inputs[1], v=inputs[2])
        plan = bridge.plans.lookup(tensors, low.options, grad, "null_torch")
        bound = handle.bind(*inputs)
        if grad:
            direct = lambda: Plain.apply(plan, recurrence, low.options, tensors, *inputs)  # noqa: E731, B023
        else:
            direct = lambda: plan.forward(plan.forward_config, tensors, low.options)  # noqa: E731, B023
        if grad:
            do = torch.empty_like(v)
            step = lambda way: lambda: torch.autograd.grad(way(), inputs, do)  # noqa: E731, B023
            both = {"launcher": step(direct), "handle": step(lambda: handle(*inputs)[0])}  # noqa: B023
            for call in both.values():
                call()
            result["grad, forward + backward"] = found = interleaved(both, given.rounds, given.calls, sync)
            base = found["launcher"]
            print("fwd+bwd", "  ".join(f"{n} {us:.2f} us (+{us - base:.2f})" for n, us in found.items()))
        ways = {"launcher": direct, "bound handle": lambda: bound(*inputs), "handle": lambda: handle(*inputs)}  # noqa: B023
        with torch.set_grad_enabled(grad):
            for call in ways.values():
                for _ in range(50):
                    call()
            found = interleaved(ways, given.rounds, given.calls, sync)
        result["grad" if grad else "no grad"] = found
        base = found["launcher"]
        print("grad   " if grad else "no grad", "  ".join(f"{n} {us:.2f} us (+{us - base:.2f})" for n, us in found.items()))
    stamp = {"device": str(device), "torch": torch.__version__, "rounds": given.rounds, "calls": given.calls}
    if device.type == "cuda":
        from .common import write

        write(given.out, "overhead", overhead=result, setup=stamp)
    else:
        import json

        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "overhead_cpu.json").write_text(json.dumps({"setup": stamp, "overhead": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
