"""Which launches a candidate needs, and compiling one of them: a room's compiler module does the work, by name."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch

from ..problem import Problem
from ..registry import Recurrence, Trial, get_recurrence
from .proof import module_of

META = torch.device("meta")


class Site(NamedTuple):
    """One direction of a candidate on one call: a Key's, or a trial's of its proof."""

    recurrence: str
    variant: str
    config: Any
    backward: bool
    call: Problem | Trial


class CompileJob(NamedTuple):
    """The launch at a position of a site."""

    site: Site
    position: int


def compiler(recurrence: Recurrence) -> Any:
    """The room's compiler module: record, launch_key, compile_for, compile_launch."""
    assert recurrence.workload is not None
    return importlib.import_module(recurrence.workload.compiler)


@functools.lru_cache(maxsize=256)
def _meta_call(recurrence: str, call: Problem | Trial) -> tuple[Any, Any]:
    workload = get_recurrence(recurrence).workload
    assert workload is not None
    return workload.make_trial(call, META, 0) if isinstance(call, Trial) else workload.make(call, META, 0)


def launches(site: Site) -> list[Any]:
    """What the site would launch, in order; a torch variant launches nothing."""
    recurrence = get_recurrence(site.recurrence)
    variant = recurrence.variant(site.variant)
    if variant.language == "torch":
        return []
    module = module_of(variant)
    tensors, options = _meta_call(site.recurrence, site.call)
    with compiler(recurrence).record() as found, torch.no_grad():
        if not site.backward:
            module.forward(site.config, tensors, options)
        else:
            outputs = recurrence.outputs(*recurrence.empty_outputs(tensors, options))
            carried = outputs[: len(recurrence.output_grads._fields)]
            grads = recurrence.output_grads(*[None if x.dim() == 1 and x.numel() == 0 else torch.empty_like(x) for x in carried])
            wanted = tuple(getattr(tensors, name) is not None for name in recurrence.differentiable)
            module.backward(site.config, recurrence.residuals(tensors, outputs, options), grads, options, wanted)
    return [launch for launch in found if 0 not in launch.grid]


class Compilation:
    """Compile jobs without repetition: launches that compile to the same code are one job."""

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
        self._jobs: dict[tuple[Any, ...], CompileJob] = {}
        self._seen: dict[Site, tuple[CompileJob, ...]] = {}

    def jobs(self, site: Site) -> tuple[CompileJob, ...]:
        """The jobs that a site needs, each the first of its kind; none where host code raises without a device: its proof will say so."""
        if site not in self._seen:
            try:
                found = launches(site)
            except Exception:  # a candidate's own code, in the tuner's process; the worker meets whatever is its fault
                found = []
            key = compiler(self.recurrence).launch_key if found else None
            keyed = [(key(launch), CompileJob(site, i)) for i, launch in enumerate(found)] if key else []
            self._seen[site] = tuple(dict.fromkeys(self._jobs.setdefault(k, job) for k, job in keyed))
        return self._seen[site]
