"""Plans: what the tiers decided (tiers.py), ready to run; and the cache that makes the choice cost one dict lookup.

Records, locks and advisories are consulted on a miss of this cache only. What a miss may do that no record is found for is the
setting `miss`: estimate, tune or error.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import registry, settings, tuning
from ..errors import LockError, RefusedError
from ..problem import Problem
from ..registry import Recurrence
from .miss import remember, resolve
from .tiers import Decision, check_choice, decide

_deterministic = torch._C._get_deterministic_algorithms
_CPU = torch.device("cpu")

#: Raw facts, and Keys, kept per recurrence before the cache starts anew (packs of ever new shapes would grow it without end).
MOST_PLANS = 16_384


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What the hot path runs: `forward(forward_config, tensors, options)` and the like.

    present and others: positions of the tensors that the call has, those that may get a gradient and those that may not;
    kept: positions of the outputs that backward needs; returned: of the gradient-carrying outputs that were asked for.
    """

    forward: Callable[..., tuple[torch.Tensor, ...]]
    forward_config: Any
    backward: Callable[..., tuple[torch.Tensor | None, ...]] | None
    backward_config: Any
    decision: Decision
    present: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    kept: tuple[int | None, ...] = ()
    returned: tuple[int, ...] = ()


def asked(x: torch.Tensor | None) -> torch.Tensor | None:
    """None for the empty(0) that stands for an output that was not asked for (real outputs have more dimensions)."""
    return None if x is None or (x.dim() == 1 and x.shape[0] == 0) else x


def refused_text(decision: Decision, choice: str | None) -> str:
    """The message of a RefusedError: every reason against every variant that could have been chosen."""
    what = f"{choice!r} must refuse this call" if choice is not None else "every variant refuses this call"
    lines = [f"  {v.variant.name}: {r.text()}" for v in decision.considered for r in (*v.refusals, *v.partial)]
    return f"{decision.key.recurrence}: {what} ({decision.key.text()})\n" + "\n".join(lines)


_warned: set[tuple[str, ...]] = set()


def _warn_slow(decision: Decision) -> None:
    """One warning per recurrence, device and dtype when a torch variant was left for a GPU."""
    key, chosen = decision.key, [c for c in (decision.forward, decision.backward) if c is not None]
    if decision.tier == "forced" or not key.device.is_gpu or all(c.variant.language != "torch" for c in chosen):
        return
    family = (key.recurrence, key.device.arch, *(f"{role}={name}" for role, name in key.dtypes))
    if family in _warned:
        return
    _warned.add(family)
    reasons = "; ".join(f"{v.variant.name}: {v.refusals[0].text()}" for v in decision.considered if v.refusals)
    names = " and ".join(dict.fromkeys(c.variant.name for c in chosen))
    warnings.warn(f"{key.recurrence} runs the torch variant {names} on {key.device.name}, which is slow: {reasons}", stacklevel=2)


def _runnable(decision: Decision, choice: str | None) -> Plan:
    if decision.blocked:
        raise LockError(decision.blocked)
    if decision.forward is None:
        raise RefusedError(refused_text(decision, choice))
    _warn_slow(decision)
    forward, backward = decision.forward, decision.backward
    module = forward.variant.load()
    run_backward = None if backward is None else backward.variant.load().backward  # type: ignore[union-attr]
    return Plan(module.forward, forward.config, run_backward, None if backward is None else backward.config, decision)  # type: ignore[union-attr]


def _plan(recurrence: Recurrence, problem: Problem, choice: str | None, device: torch.device = _CPU) -> Plan:
    decision = decide(recurrence, problem, choice)
    if decision.missed and choice is None and recurrence.workload is not None:
        remember(decision.key)
        if settings.current.miss != "estimate":
            decision = resolve(recurrence, problem, decision, device)
    if settings.current.no_jit:
        from ..tuning import jit

        jit.forbid_for_good()
    return _runnable(decision, choice)


def _plain(recurrence: Recurrence, problem: Problem, choice: str | None) -> Plan:
    """A plan of torch variants alone, whose forward torch.func differentiates and maps; records and locks are of other calls."""
    torch_only = tuple(v for v in recurrence.variants if v.language == "torch")
    if choice is not None and not any(choice in (v.name, v.family) for v in torch_only):
        check_choice(recurrence, choice, f"mode {choice!r}")
        names = ", ".join(v.name for v in torch_only)
        raise RefusedError(f"{recurrence.name}: {choice!r} has no torch variant, and torch.func runs torch variants only ({names})")
    return _runnable(decide(dataclasses.replace(recurrence, variants=torch_only), problem, choice, records=False), choice)


def _for_call(recurrence: Recurrence, plan: Plan, tensors: Any, options: Any) -> Plan:
    """The plan with the positions of the tensors and outputs that a call has, so that no call looks for them again."""
    meta = recurrence.tensors(*[None if x is None else x.new_empty(x.shape, device="meta") for x in tensors])
    outputs = recurrence.empty_outputs(meta, options)[: len(recurrence.output_grads._fields)]
    kept = recurrence.residuals(tensors, recurrence.outputs(*range(len(recurrence.outputs._fields))), options)[1:]
    return dataclasses.replace(
        plan,
        present=tuple(recurrence.tensors._fields.index(name) for name in recurrence.differentiable if getattr(tensors, name) is not None),
        others=tuple(i for i, x in enumerate(tensors) if x is not None and tensors._fields[i] not in recurrence.differentiable),
        kept=() if all(i is None for i in kept) else tuple(kept),
        returned=tuple(i for i, x in enumerate(outputs) if asked(x) is not None),
    )


class Plans:
    """The plans of one recurrence, by raw facts of a call; stale when settings, registrations or records change.

    A hit takes no lock and builds no Problem: the facts determine the Key and which tensors and outputs a call has, and so
    they determine the plan.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.RLock()
        self._refresh()

    def _refresh(self) -> None:
        with self._lock:
            self._by_key: dict[tuple[Any, ...], Plan] = {}
            self._by_facts: dict[tuple[Any, ...], Plan] = {}
            self._recurrence = registry.get_recurrence(self.name)
            self.facts = self._recurrence.facts
            self._registry_epoch, self._settings_epoch, self._tuning_epoch = registry.epoch, settings.epoch, tuning.epoch

    def lookup(self, tensors: Any, options: Any, grad: bool | None, choice: str | None) -> Plan:
        """The plan of a call; grad None asks for a torch variant to run as plain differentiable code.

        Raises RefusedError when the forced choice, or everything, must refuse the call.
        """
        if registry.epoch != self._registry_epoch or settings.epoch != self._settings_epoch or tuning.epoch != self._tuning_epoch:
            self._refresh()
        capture = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        facts = (self.facts(tensors, options), grad, choice, _deterministic(), capture)
        found = self._by_facts.get(facts)
        return found if found is not None else self._resolve(facts, tensors, options)

    def _resolve(self, facts: tuple[Any, ...], tensors: Any, options: Any) -> Plan:
        _, grad, choice, deterministic, capture = facts
        problem = self._recurrence.problem(tensors, options, bool(grad))
        problem = dataclasses.replace(problem, deterministic=deterministic, capture=capture)
        with self._lock:
            key = (problem.key(), grad, choice)
            plan = self._by_key.get(key)
            if plan is None:
                if grad is None:
                    plan = _plain(self._recurrence, problem, choice)
                else:
                    plan = _plan(self._recurrence, problem, choice, tensors[0].device)
                if len(self._by_key) >= MOST_PLANS:
                    self._by_key = {}
                self._by_key[key] = plan
            if len(self._by_facts) >= MOST_PLANS:
                self._by_facts = {}
            if grad:
                plan = _for_call(self._recurrence, plan, tensors, options)
            self._by_facts[facts] = plan
        return plan
