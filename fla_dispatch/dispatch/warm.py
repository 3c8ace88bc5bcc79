"""Warming up: which calls have not been measured, measuring them, launching each once, and proving that nothing is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import registry, settings
from ..device import profile
from ..errors import JitError, MissError, RefusedError
from ..problem import Problem
from .handle import op
from .tiers import decide

if TYPE_CHECKING:
    from ..tuning.search import Event
    from ..tuning.warmup import Call


class Left(NamedTuple):
    """A call that is not warm. what: measure | compile | refused; detail: a key, a kernel or the reasons."""

    call: str
    what: str
    detail: str


def missing(keys: Iterable[Problem]) -> list[Problem]:
    """Keys that are decided without a record of theirs or a lock, in order; what nobody measures is not among them."""
    found = []
    for key in dict.fromkeys(keys):
        recurrence = registry.get_recurrence(key.recurrence)
        if recurrence.workload is not None and decide(recurrence, key, None).missed:
            found.append(key)
    return found


def tune_missing(
    keys: Iterable[Problem], device: torch.device, budget_seconds: float, progress: Callable[[Event], None] | None = None
) -> list[Problem]:
    """Measure the keys that are missing, within a budget over all of them; returns those that still are."""
    import time

    from ..tuning.search import tune

    todo = missing(keys)
    end = time.monotonic() + budget_seconds
    for name in dict.fromkeys(key.recurrence for key in todo):
        tune(registry.get_recurrence(name), [k for k in todo if k.recurrence == name], end - time.monotonic(), device, progress=progress)
    return missing(todo)


def launch(call: Call, device: torch.device) -> None:
    """Run a call once as a user would, with its gradients: compiled kernels go into Triton's caches. Raises RefusedError."""
    found = registry.get_op(call.op)
    lengths = [call.size("T")] * call.size("B") if call.packed else None
    args, kwargs = found.example(
        dict(call.sizes), getattr(torch, call.dtype), device, lengths=lengths, initial_state=call.initial_state,
        output_final_state=call.final_state, requires_grad=call.grad, options=call.options,
    )  # fmt: skip
    with torch.enable_grad() if call.grad else torch.no_grad():
        result = op(call.op)(*args, **kwargs)
        if call.grad:
            wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.grad(result[0], wanted, torch.ones_like(result[0], memory_format=torch.contiguous_format), allow_unused=True)
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)


@contextlib.contextmanager
def _nothing_new() -> Iterator[None]:
    """Anything that is measured, compiled or decided without a record raises."""
    from ..tuning import jit

    with settings.override(miss="error"), jit.ruled_out():
        yield


def launch_all(
    calls: Iterable[Call], device: torch.device, *, forbid: bool = False, each: Callable[[Call], None] | None = None
) -> list[Left]:
    """Launch every call; with forbid nothing may be measured or compiled. Returns the calls that were refused, or that would be."""
    left = []
    context = _nothing_new if forbid else contextlib.nullcontext
    for call in calls:
        if each is not None:
            each(call)
        try:
            with context():
                launch(call, device)
        except MissError:
            left.append(Left(call.text(), "measure", "the call has a key that no record is for"))
        except JitError as error:
            left.append(Left(call.text(), "compile", str(error).split(".")[0]))
        except RefusedError as error:
            left.append(Left(call.text(), "refused", str(error)))
    return left


def what_is_left(calls: Iterable[Call], device: torch.device) -> list[Left]:
    """What would still be measured or compiled if these calls came now, at their lengths and one token shorter."""
    calls = list(calls)
    here = profile(device)
    texts: dict[Problem, str] = {}
    for call in calls:
        texts.setdefault(call.key(here), call.text())
    gone = set(missing(texts))
    found = [Left(text, "measure", key.text()) for key, text in texts.items() if key in gone]
    known = [call for call in calls if call.key(here) not in gone]
    shorter = [s for call in known if (s := call.shorter()) is not None]
    return found + launch_all([*known, *shorter], device, forbid=True)
