"""Times every config of Triton variants at some shapes, past the dispatcher: for those who write kernels.

    python -m benchmarks.configs --cases retention:4,4096,16,128 "linear_attn normalized:8,2048,32,64" [--variants sweep_triton] [--kernels]

A case is an op and B,T,H,D, with a fifth number K where it is not D. Each config runs forward and backward of the recurrence on the
inputs of the op (no states), is compared with chunk_torch in float32, and is timed eagerly and as a replayed graph; with --kernels,
each of its kernels by the profiler as well. Kernels are compiled in parallel processes first. A config that fails costs itself;
one that ends the process ends the run, with all rows before it in configs.json.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib
import multiprocessing
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fla_dispatch import registry
from fla_dispatch.device import profile
from fla_dispatch.kernels._shared.token_cases import Sizes

from .common import cases_of, eager_ms, graph_ms, op_of, options_of, room_of, write


class Job(NamedTuple):
    """label: an op, with ` normalized` after it where it shall be; shape: B, T, H, D and, where it is not D, K."""

    label: str
    shape: tuple[int, ...]
    variant: str
    config: Any
    backward: bool

    @property
    def kind(self) -> tuple[Any, ...]:
        """What its kernels are compiled for."""
        return (self.label, self.shape[3:], *self[2:])


def call_of(label: str, shape: tuple[int, ...], device: str = "cuda") -> tuple[Any, Any]:
    """Tensors and options of the recurrence."""
    B, T, H, V = shape[:4]
    op = op_of(label)
    sizes = Sizes(B, T, 1 if op == "mamba2" else H, H, shape[-1], V)
    made = cases_of(label).make_inputs(op, sizes, torch.bfloat16, device, options=options_of(label))
    low = registry.get_op(op).contract(*made.args, **made.kwargs)
    return (low.tensors if low.prepare is None else low.prepare(low.tensors)), low.options


class Setting:
    """Inputs of a case, and what chunk_torch makes of them."""

    def __init__(self, label: str, shape: tuple[int, ...]) -> None:
        self.room = room = room_of(label)
        torch_module: Any = room.variant("chunk_torch").load()
        config = importlib.import_module(f"fla_dispatch.kernels.{room.name}.configs").TorchConfig(64)
        self.tensors, self.options = call_of(label, shape)
        self.outputs = room.outputs(*torch_module.forward(config, self.tensors, self.options))
        self.grads = room.output_grads(torch.randn_like(self.outputs.o), *[None] * (len(room.output_grads._fields) - 1))
        self.wanted = tuple(getattr(self.tensors, name) is not None for name in room.differentiable)
        self.residuals = room.residuals(self.tensors, self.outputs, self.options)
        self.gradients = torch_module.backward(config, self.residuals, self.grads, self.options, self.wanted)

    def call(self, job: Job) -> Callable[[], Any]:
        module: Any = self.room.variant(job.variant).load()
        if job.backward:
            return lambda: module.backward(job.config, self.residuals, self.grads, self.options, self.wanted)
        return lambda: module.forward(job.config, self.tensors, self.options)

    def errors(self, job: Job, found: Any) -> dict[str, float]:
        names = self.room.differentiable if job.backward else ("o",)
        truth = self.gradients if job.backward else self.outputs
        pairs = [(name, found[i], truth[i]) for i, name in enumerate(names)]
        return {name: float((x.double() - y.double()).norm() / y.double().norm()) for name, x, y in pairs if y is not None}


def kernel_us(call: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    """Microseconds of each kernel of a call, by the profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = collections.defaultdict(float)
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name[:60]] += event.device_time_total / calls
    return dict(found)


def jobs_of(cases: list[str], variants: list[str]) -> list[Job]:
    found = []
    for case in cases:
        label, _, text = case.partition(":")
        shape: Any = tuple(int(x) for x in text.split(","))
        for backward in (False, True):
            room = room_of(label)
            tensors, options = call_of(label, shape, "meta")
            key = room.problem(tensors, options, backward)
            key = type(key)(**{**vars(key), "device": profile(torch.device("cuda"))}).key()
            for variant in (v for v in room.variants if v.name in variants):
                configs = () if variant.static_refusals(key) else variant.configs(key)
                found += [Job(label, shape, variant.name, config, backward) for config in configs]
    return found


def compile_all(jobs: list[Job]) -> list[tuple[Job, str]]:
    """Run each once at a small size, for Triton's cache; what fails, and why."""
    failed = []
    for job in jobs:
        try:
            Setting(job.label, (1, 256, job.shape[2] if job.label == "mamba2" else 2, *job.shape[3:])).call(job)()
            torch.cuda.synchronize()
        except Exception as error:  # a candidate's fault
            failed.append((job, f"{type(error).__name__}: {str(error)[:200]}"))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--cases", nargs="+", default=["retention:4,4096,16,128"])
    parser.add_argument("--variants", default="sweep_triton,sweep_gluon,chunk_triton")
    parser.add_argument("--rep", type=int, default=15, help="milliseconds of repetition per timing")
    parser.add_argument("--kernels", action="store_true", help="the time of each kernel too")
    parser.add_argument("--processes", type=int, default=14)
    given = parser.parse_args()
    jobs, began = jobs_of(given.cases, given.variants.split(",")), time.monotonic()
    once = list({job.kind: job for job in jobs}.values())
    parts = [once[i :: 2 * given.processes] for i in range(2 * given.processes)]
    with concurrent.futures.ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = {j.kind: why for found in pool.map(compile_all, parts) for j, why in found}
    print(f"{len(jobs)} configs, {len(failed)} do not run; compiled in {time.monotonic() - began:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    setting, at = None, None
    for job in jobs:
        row: dict[str, Any] = {**job._asdict(), "config": job.config._asdict()}
        why = failed.get(job.kind)
        if why is None:
            if at != job[:2]:
                setting = None
                torch.cuda.empty_cache()
                setting, at = Setting(*job[:2]), job[:2]
            assert setting is not None
            call = setting.call(job)
            row["errors"] = setting.errors(job, call())
            row["ms"], row["graph_ms"] = eager_ms(call, given.rep), graph_ms(call, given.rep)
            if given.kernels:
                row["kernel_us"] = kernel_us(call)
            errors = " ".join(f"{name} {x:.0e}" for name, x in row["errors"].items())
            kernels = " ".join(f"{name} {us:.0f}" for name, us in row.get("kernel_us", {}).items())
            what = f"{row['ms']:.4f} {row['graph_ms']:.4f} {errors} {kernels}"
        else:
            row["failed"] = what = why
        print(job.label, job.shape, job.variant, "backward" if job.backward else "forward", tuple(job.config), what, flush=True)
        rows.append(row)
        write(given.out, "configs", rows=rows)


if __name__ == "__main__":
    main()
