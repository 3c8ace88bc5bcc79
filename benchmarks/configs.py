"""Times every config of Triton variants at some shapes, past the dispatcher: for those who write kernels.

    python -m benchmarks.configs --cases retention:4,4096,16,128 "linear_attn normalized:8,2048,32,64" [--variants sweep_triton]

Each config runs forward and backward of the recurrence on the inputs of the op (no states), is compared with chunk_torch in float32,
and is timed eagerly and as a replayed graph. Kernels are compiled in parallel processes first. A config that fails costs itself;
one that ends the process ends the run, with all rows before it in configs.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fla_dispatch import registry
from fla_dispatch.device import profile
from fla_dispatch.kernels.scalar_decay.cases import Sizes, make_inputs
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig

from .common import eager_ms, graph_ms, write

ROOM = registry.get_recurrence("scalar_decay")


class Job(NamedTuple):
    """label: an op, with ` normalized` after it where it shall be."""

    label: str
    shape: tuple[int, int, int, int]
    variant: str
    config: Any
    backward: bool


def call_of(label: str, shape: tuple[int, int, int, int], device: str = "cuda") -> tuple[Any, Any]:
    """Tensors and options of the recurrence."""
    B, T, H, D = shape
    op = label.split()[0]
    options = (("normalize", True),) if "normalized" in label else ()
    made = make_inputs(op, Sizes(B, T, 1 if op == "mamba2" else H, H, D, D), torch.bfloat16, device, options=options)
    low = registry.get_op(op).contract(*made.args, **made.kwargs)
    return (low.tensors if low.prepare is None else low.prepare(low.tensors)), low.options


class Setting:
    """Inputs of a case, and what chunk_torch makes of them."""

    def __init__(self, label: str, shape: tuple[int, int, int, int]) -> None:
        torch_module: Any = ROOM.variant("chunk_torch").load()
        self.tensors, self.options = call_of(label, shape)
        self.outputs = ROOM.outputs(*torch_module.forward(TorchConfig(64), self.tensors, self.options))
        self.grads = ROOM.output_grads(torch.randn_like(self.outputs.o), None, None)
        self.wanted = tuple(getattr(self.tensors, name) is not None for name in ROOM.differentiable)
        self.residuals = ROOM.residuals(self.tensors, self.outputs, self.options)
        self.gradients = torch_module.backward(TorchConfig(64), self.residuals, self.grads, self.options, self.wanted)

    def call(self, job: Job) -> Callable[[], Any]:
        module: Any = ROOM.variant(job.variant).load()
        if job.backward:
            return lambda: module.backward(job.config, self.residuals, self.grads, self.options, self.wanted)
        return lambda: module.forward(job.config, self.tensors, self.options)

    def errors(self, job: Job, found: Any) -> dict[str, float]:
        names = ROOM.differentiable if job.backward else ("o",)
        truth = self.gradients if job.backward else self.outputs
        pairs = [(name, found[i], truth[i]) for i, name in enumerate(names)]
        return {name: float((x.double() - y.double()).norm() / y.double().norm()) for name, x, y in pairs if y is not None}


def jobs_of(cases: list[str], variants: list[str]) -> list[Job]:
    found = []
    for case in cases:
        label, _, text = case.partition(":")
        shape: Any = tuple(int(x) for x in text.split(","))
        for backward in (False, True):
            tensors, options = call_of(label, shape, "meta")
            key = ROOM.problem(tensors, options, backward)
            key = type(key)(**{**vars(key), "device": profile(torch.device("cuda"))}).key()
            for variant in map(ROOM.variant, variants):
                configs = () if variant.static_refusals(key) else variant.configs(key)
                found += [Job(label, shape, variant.name, config, backward) for config in configs]
    return found


def compile_all(jobs: list[Job]) -> list[tuple[Job, str]]:
    """Run each once at a small size, for Triton's cache; what fails, and why."""
    failed = []
    for job in jobs:
        try:
            Setting(job.label, (1, 256, job.shape[2] if job.label == "mamba2" else 2, job.shape[3])).call(job)()
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
    parser.add_argument("--processes", type=int, default=14)
    given = parser.parse_args()
    jobs, began = jobs_of(given.cases, given.variants.split(",")), time.monotonic()
    once = list({(j.label, j.shape[3], j.variant, j.config, j.backward): j for j in jobs}.values())
    parts = [once[i :: 2 * given.processes] for i in range(2 * given.processes)]
    with concurrent.futures.ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = {(j.label, j.shape[3], *j[2:]): why for found in pool.map(compile_all, parts) for j, why in found}
    print(f"{len(jobs)} configs, {len(failed)} do not run; compiled in {time.monotonic() - began:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    setting, at = None, None
    for job in jobs:
        row: dict[str, Any] = {**job._asdict(), "config": job.config._asdict()}
        why = failed.get((job.label, job.shape[3], *job[2:]))
        if why is None:
            if at != job[:2]:
                setting = None
                torch.cuda.empty_cache()
                setting, at = Setting(*job[:2]), job[:2]
            assert setting is not None
            call = setting.call(job)
            row["errors"] = setting.errors(job, call())
            row["ms"], row["graph_ms"] = eager_ms(call, given.rep), graph_ms(call, given.rep)
            errors = " ".join(f"{name} {x:.0e}" for name, x in row["errors"].items())
            what = f"{row['ms']:.4f} {row['graph_ms']:.4f} {errors}"
        else:
            row["failed"] = what = why
        print(job.label, job.shape, job.variant, "backward" if job.backward else "forward", tuple(job.config), what, flush=True)
        rows.append(row)
        write(given.out, "configs", rows=rows)


if __name__ == "__main__":
    main()
