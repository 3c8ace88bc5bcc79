"""Plans: which variant and config run a call, and why; and the cache that makes the choice cost one dict lookup.

Tiers, first hit wins: forced (the call's mode, then `fd.use`, then FLA_DISPATCH_USE) -> cost estimate -> reference.
Requirements filter before any tier, on the Key of the problem, so that equal Keys get equal plans.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import registry, settings
from ..errors import RefusedError, RegistrationError, UnknownNameError, nearest
from ..problem import Problem
from ..registry import BACKWARD, FORWARD, Direction, Recurrence, Variant
from ..requirements import Refusal

_deterministic = torch._C._get_deterministic_algorithms

#: Raw facts kept per recurrence before the cache starts anew (packs of ever new shapes would grow it without end).
MOST_PLANS = 16_384


class Candidate(NamedTuple):
    """A variant with its cheapest config for one direction of a Key, and the estimated seconds."""

    variant: Variant
    config: Any
    seconds: float


class Verdict(NamedTuple):
    """What is known of a variant for a Key: why not, or how fast."""

    variant: Variant
    refusals: tuple[Refusal, ...]
    forward: Candidate | None
    backward: Candidate | None


@dataclasses.dataclass(frozen=True)
class Decision:
    """The outcome of the tiers. forward is None when everything that may be chosen is refused."""

    key: Problem
    tier: str  # forced | estimate | reference
    reason: str
    forward: Candidate | None
    backward: Candidate | None
    considered: tuple[Verdict, ...]


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


def seconds_text(seconds: float) -> str:
    """`1.2 ms`, `340 us`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _cheapest(variant: Variant, key: Problem, configs: tuple[Any, ...], direction: Direction) -> Candidate:
    return min((Candidate(variant, c, variant.cost(key, c, direction)) for c in configs), key=lambda c: c.seconds)


def weigh(variant: Variant, key: Problem) -> Verdict:
    """The verdict on a variant; its module is imported when its requirements do not refuse."""
    refused = variant.static_refusals(key)
    if refused:
        return Verdict(variant, refused, None, None)
    module = variant.load()
    if isinstance(module, Refusal):
        return Verdict(variant, (module,), None, None)
    configs = variant.configs(key)
    if not configs:
        raise RegistrationError(f"variant {variant.name}: configs() is empty for {key.text()}, which no requirement refuses")
    backward = _cheapest(variant, key, configs, BACKWARD) if key.grad else None
    return Verdict(variant, (), _cheapest(variant, key, configs, FORWARD), backward)


def check_choice(recurrence: Recurrence, choice: str, where: str) -> None:
    """Raise UnknownNameError unless `choice` is auto, a variant or a family of the recurrence."""
    known = {"auto", *(v.name for v in recurrence.variants), *(v.family for v in recurrence.variants)}
    if choice not in known:
        raise UnknownNameError(
            f"{where}: no mode, family or variant named {choice!r} in {recurrence.name}; {nearest(str(choice), list(known))}."
        )


def _forced(recurrence: Recurrence, key: Problem, choice: str) -> tuple[list[Verdict], str]:
    named = dataclasses.replace(key, forced=True)
    exact = [v for v in recurrence.variants if v.name == choice]
    if exact:
        return [weigh(v, named) for v in exact], f"the variant {choice!r} was named"
    family = [v for v in recurrence.variants if v.family == choice]
    reason = f"the family {choice!r} was named"
    verdicts = [weigh(v, key) for v in family]
    if all(v.refusals for v in verdicts):  # naming a family admits what only a name admits, where nothing else is left
        verdicts = [weigh(v, named) for v in family]
    return verdicts, reason


def _why_estimate(best: list[Verdict], chosen: Candidate, backward: Candidate | None) -> str:
    if len(best) == 1:
        return "the only variant besides the reference that no requirement refuses"
    others = sorted((v.forward.seconds, v.variant.name) for v in best if v.forward and v.variant is not chosen.variant)
    text = f"lowest estimated time: forward {seconds_text(chosen.seconds)}, next {others[0][1]} {seconds_text(others[0][0])}"
    if backward is not None:
        rest = sorted((v.backward.seconds, v.variant.name) for v in best if v.backward and v.variant is not backward.variant)
        text += f"; backward {backward.variant.name} {seconds_text(backward.seconds)}, next {rest[0][1]} {seconds_text(rest[0][0])}"
    return text


def decide(recurrence: Recurrence, problem: Problem, choice: str | None) -> Decision:
    """Run the tiers. With a gradient, forward and backward are chosen each for itself: every backward fits every forward."""
    key = problem.key()
    if choice is not None:
        check_choice(recurrence, choice, f"mode {choice!r}")
        verdicts, reason = _forced(recurrence, key, choice)
        able, tier = [v for v in verdicts if not v.refusals], "forced"
    else:
        verdicts = [weigh(v, key) for v in recurrence.variants if v.name != "reference"]
        able, tier, reason = [v for v in verdicts if not v.refusals], "estimate", ""
        if not able:
            verdicts.append(weigh(recurrence.variant("reference"), key))
            able, tier = [v for v in verdicts if not v.refusals], "reference"
            reason = "every other variant is refused"
    if not able:
        return Decision(key, tier, reason, None, None, tuple(verdicts))
    forward = min((v.forward for v in able if v.forward), key=lambda c: c.seconds)
    backward = min((v.backward for v in able if v.backward), key=lambda c: c.seconds) if key.grad else None
    if tier == "estimate":
        reason = _why_estimate(able, forward, backward)
    return Decision(key, tier, reason, forward, backward, tuple(verdicts))


def refused_text(decision: Decision, choice: str | None) -> str:
    """The message of a RefusedError: every reason against every variant that could have been chosen."""
    what = f"{choice!r} must refuse this call" if choice is not None else "every variant refuses this call"
    lines = [f"  {v.variant.name}: {r.text()}" for v in decision.considered for r in v.refusals]
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


def _plan(recurrence: Recurrence, problem: Problem, choice: str | None) -> Plan:
    decision = decide(recurrence, problem, choice)
    if decision.forward is None:
        raise RefusedError(refused_text(decision, choice))
    _warn_slow(decision)
    forward, backward = decision.forward, decision.backward
    module = forward.variant.load()
    run_backward = None if backward is None else backward.variant.load().backward  # type: ignore[union-attr]
    return Plan(module.forward, forward.config, run_backward, None if backward is None else backward.config, decision)  # type: ignore[union-attr]


def _plain(recurrence: Recurrence, problem: Problem, choice: str | None) -> Plan:
    """A plan of torch variants alone, whose forward torch.func differentiates and maps."""
    torch_only = tuple(v for v in recurrence.variants if v.language == "torch")
    if choice is not None and not any(choice in (v.name, v.family) for v in torch_only):
        check_choice(recurrence, choice, f"mode {choice!r}")
        names = ", ".join(v.name for v in torch_only)
        raise RefusedError(f"{recurrence.name}: {choice!r} has no torch variant, and torch.func runs torch variants only ({names})")
    return _plan(dataclasses.replace(recurrence, variants=torch_only), problem, choice)


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
    """The plans of one recurrence, by raw facts of a call; stale when settings or registrations change.

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
            self._registry_epoch, self._settings_epoch = registry.epoch, settings.epoch

    def lookup(self, tensors: Any, options: Any, grad: bool | None, choice: str | None) -> Plan:
        """The plan of a call; grad None asks for a torch variant to run as plain differentiable code.

        Raises RefusedError when the forced choice, or everything, must refuse the call.
        """
        if registry.epoch != self._registry_epoch or settings.epoch != self._settings_epoch:
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
                plan = (_plain if grad is None else _plan)(self._recurrence, problem, choice)
                self._by_key[key] = plan
            if len(self._by_facts) >= MOST_PLANS:
                self._by_facts = {}
            if grad:
                plan = _for_call(self._recurrence, plan, tensors, options)
            self._by_facts[facts] = plan
        return plan
