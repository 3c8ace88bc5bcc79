"""Proof before speed: a candidate must agree with a float64 oracle, write all it should and nothing else, and repeat its bits.

A proof runs a room's trials (registry.Workload): small calls with odd lengths, stress gates and more than one wave of blocks.
Inputs and outputs stand between guard bands (guard.py). It holds for one variant, config, direction and proof key, and so for
every Key that differs in lengths and counts alone. Tensors that a recurrence updates in place are new copies in every run, and are
judged like outputs afterwards; what the oracle leaves as it was keeps its bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..problem import Problem
from ..registry import Recurrence, Trial, Variant
from ..requirements import Refusal
from .guard import Guards, guarded
from .records import Certificate, Status

#: Bitwise-equal runs of a trial that asks for repeats at all, and of a trial whose result is wrong (to tell it from racy).
REPEATS = 3

#: Relative error between two makings of an oracle in float64: far above their rounding, far below any tolerance.
_REPRODUCED = 1e-9


class Verdict(NamedTuple):
    """The outcome of a proof. The certificate of a failure holds the errors that were found up to it."""

    status: Status
    detail: str = ""
    certificate: Certificate | None = None


class ImportFailed(Exception):
    """The variant's module does not import."""


def module_of(variant: Variant) -> Any:
    """The variant's module; raises ImportFailed with the refusal's text."""
    module = variant.load()
    if isinstance(module, Refusal):
        raise ImportFailed(module.text())
    return module


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that its errors show here."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)


def _wide(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


def _error(found: torch.Tensor, want: torch.Tensor, scale: float | None) -> torch.Tensor:
    """|found - want| / scale in the Frobenius norm, scale = |want| by default; NaN is infinite. A number on the device."""
    difference = (found.double() - want).norm()
    size = want.norm() if scale is None else torch.tensor(scale, dtype=torch.float64, device=want.device)
    return torch.where(difference == 0, difference, difference / size.clamp(min=1e-30)).nan_to_num(nan=math.inf, posinf=math.inf)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8) if x.dim() else x


@dataclasses.dataclass(frozen=True)
class Case:
    """A trial with its inputs, and what the oracle makes of them (float64; None or empty where absent).

    mutated: what the oracle leaves in the tensors that are updated in place, by name.
    """

    trial: Trial
    oracle: str
    tensors: Any
    options: Any
    outputs: Any
    grads: Any
    residuals: Any
    gradients: Any
    wanted: tuple[bool, ...]
    scales: dict[str, float]
    dtypes: dict[str, torch.dtype]  # promised: of each output, or of each gradient
    mutated: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def truth(self, backward: bool) -> dict[str, torch.Tensor | None]:
        """Outputs with what is updated in place, or gradients."""
        found = self.gradients if backward else self.outputs
        return dict(zip(found._fields, found, strict=True)) | self.mutated


class Prover:
    """Proves candidates of one recurrence on one device; oracles are kept for the proof key in hand."""

    def __init__(self, recurrence: Recurrence, device: torch.device) -> None:
        if recurrence.workload is None:
            raise ValueError(f"{recurrence.name} declares no workload, so nothing of it can be proven")
        self.recurrence, self.device, self.workload = recurrence, device, recurrence.workload
        self._key: Problem | None = None
        self._cases: dict[tuple[Trial, bool], Case] = {}

    def forget(self) -> None:
        """Drop the oracles."""
        self._key, self._cases = None, {}

    def prove(self, variant: Variant, config: Any, proof_key: Problem, *, backward: bool) -> Verdict:
        """The verdict on one direction. Whatever the candidate raises goes through."""
        if proof_key != self._key:
            self._key, self._cases = proof_key, {}
        run = backward_results if backward else forward_results
        module = module_of(variant)
        errors: dict[str, float] = {}
        bounds: dict[str, float] = {}
        oracles: dict[str, None] = {}
        tokens = repeats = 0
        failure: tuple[Status, str] | None = None
        for trial in self.workload.trials(proof_key, config):
            case = self.case(trial, backward)
            oracles[case.oracle] = None
            tokens = max(tokens, trial.problem.T)
            times = max(REPEATS, trial.repeats) if trial.repeats > 1 else 1
            found, failure = self._attempts(module, run, case, config, times)
            new = self.errors(found, case, backward)
            allowed = self.tolerances(case, new)
            if not all(x <= allowed[name] for name, x in new.items()) and self._damaged(trial, backward):
                case = self.case(trial, backward)
                found, failure = self._attempts(module, run, case, config, times)
                new = self.errors(found, case, backward)
            bounds.update(self.tolerances(case, new))
            errors.update({name: max(x, errors.get(name, 0.0)) for name, x in new.items()})
            bad = [f"{name} {x:.2e} > {bounds[name]:.2e}" for name, x in new.items() if not x <= bounds[name]]
            if bad and failure is None:
                _, failure = self._attempts(module, run, case, config, REPEATS)
                failure = failure or ("wrong", f"trial {trial.name}: " + ", ".join(bad))
            repeats = max(repeats, times)
            if failure is not None:
                break
        certificate = Certificate(
            oracle="+".join(oracles), dtype="float64", tokens=tokens, errors=errors, tolerances=bounds, repeats=repeats
        )  # fmt: skip
        return Verdict("ok", "", certificate) if failure is None else Verdict(*failure, certificate)

    def _attempts(
        self, module: Any, run: Callable[..., Any], case: Case, config: Any, times: int
    ) -> tuple[list[tuple[str, torch.Tensor | None]], tuple[Status, str] | None]:
        """Named results of the first of some runs, and what was wrong with any of them beside the values."""
        first: list[tuple[str, torch.Tensor | None]] = []
        for i in range(times):
            guards = Guards()
            tensors = type(case.tensors)(*[_placed(guards, x) for x in case.tensors])
            with guarded(guards), torch.no_grad():
                found = run(self.recurrence, module, config, case, tensors)
            synchronize(self.device)
            where = f"trial {case.trial.name}"
            if guards.broken():
                return found, ("wrong", f"{where}: {guards.broken()} guard bands were written to")
            touched = [
                f"{name} where it stays" if name in case.mutated else name
                for name, x, y in zip(tensors._fields, tensors, case.tensors, strict=True)
                if x is not None and not torch.equal(*map(_bits, self._kept(name, x, y, case)))
            ]
            if touched:
                return found, ("wrong", f"{where}: inputs {', '.join(touched)} were changed")
            if i == 0:
                first = found
                continue
            moved = [
                name for (name, x), (_, y) in zip(first, found, strict=True)
                if (x is None) != (y is None) or (x is not None and y is not None and not torch.equal(_bits(x), _bits(y)))
            ]  # fmt: skip
            if moved:
                return found, ("racy", f"{where}: run {i + 1} gives other bits of {', '.join(moved)}")
        return first, None

    def _kept(self, name: str, x: torch.Tensor, before: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """Of an input after a run and before it what must be the same: all, or what the oracle does not update."""
        if name not in case.mutated:
            return x, before
        kept = case.mutated[name] == before.double()
        return x[kept], before[kept]

    def tolerances(self, case: Case, names: Iterable[str]) -> dict[str, float]:
        """The largest error of each result: by the dtype of q, k, v, or by its own where it is updated in place."""
        dtype = getattr(torch, str(case.trial.problem.dtype("qkv")))
        return {name: self.workload.tolerance(case.dtypes[name] if name in case.mutated else dtype, name) for name in names}

    def errors(self, found: list[tuple[str, torch.Tensor | None]], case: Case, backward: bool) -> dict[str, float]:
        """Relative errors of one run; infinite for a result of the wrong shape or dtype, or a missing one."""
        named = dict(found)
        numbers: dict[str, torch.Tensor] = {}
        for field, want in case.truth(backward).items():
            if want is None or (want.dim() == 1 and want.numel() == 0):
                continue
            name = f"d{field}" if backward else field
            x = named.get(name)
            if x is None or x.shape != want.shape or x.dtype != case.dtypes[field]:
                numbers[name] = torch.tensor(math.inf, dtype=torch.float64, device=self.device)
            else:
                numbers[name] = _error(x, want, case.scales.get(field) if backward else None)
        values = torch.stack(list(numbers.values())).tolist() if numbers else []
        return dict(zip(numbers, values, strict=True))

    def case(self, trial: Trial, backward: bool) -> Case:
        """The trial with its oracle, made once per proof key and direction."""
        found = self._cases.get((trial, backward))
        if found is None:
            found = self._cases[trial, backward] = self._make_case(trial, backward)
        return found

    def _damaged(self, trial: Trial, backward: bool) -> bool:
        """Whether an earlier candidate wrote to what is kept of a trial, far beyond its guard bands; then all is made anew."""
        kept, fresh = self._cases[trial, backward], self._make_case(trial, backward)
        truth, new = (case.truth(backward).values() for case in (kept, fresh))
        given = [*zip(kept.tensors, fresh.tensors, strict=True), *zip(kept.grads or (), fresh.grads or (), strict=True)]
        same = all(torch.equal(_bits(x), _bits(y)) for x, y in given if x is not None)
        if same and all(
            _error(x, y, None) <= _REPRODUCED for x, y in zip(truth, new, strict=True) if x is not None and y is not None and x.numel()
        ):
            return False
        self._cases = {(trial, backward): fresh}
        return True

    def _make_case(self, trial: Trial, backward: bool) -> Case:
        r = self.recurrence
        tensors, options = self.workload.make_trial(trial, self.device, 1)
        name, config = self.workload.oracle(trial)
        oracle = module_of(r.variant(name))
        wide = fresh(r, r.tensors(*map(_wide, tensors)))
        with torch.no_grad():
            outputs = r.outputs(*oracle.forward(config, wide, options))
        wanted = tuple(getattr(tensors, field) is not None for field in r.differentiable)
        empty = r.empty_outputs(r.tensors(*[None if x is None else x.to("meta") for x in tensors]), options)
        dtypes = {field: x.dtype for field, x in zip(r.outputs._fields, empty, strict=True)}
        if not backward:
            mutated = {field: x for field in r.mutates if (x := getattr(wide, field)) is not None}
            dtypes |= {field: getattr(tensors, field).dtype for field in mutated}
            return Case(trial, name, tensors, options, outputs, None, None, None, wanted, {}, dtypes, mutated)
        rounded = r.outputs(*[x.to(dtype) for x, dtype in zip(outputs, dtypes.values(), strict=True)])
        draw = torch.Generator(self.device).manual_seed(2)
        grads = r.output_grads(
            *[
                None if x.dim() == 1 and x.numel() == 0 else torch.randn(x.shape, generator=draw, device=self.device).to(x.dtype)
                for x in rounded[: len(r.output_grads._fields)]
            ]
        )
        with torch.no_grad():
            residuals = r.residuals(wide, r.outputs(*[x.double() for x in rounded]), options)
            gradients = r.gradients(*oracle.backward(config, residuals, r.output_grads(*map(_wide, grads)), options, wanted))
        given = r.residuals(tensors, rounded, options)
        scales = self.workload.scales(tensors, gradients)
        dtypes = {field: getattr(tensors, field).dtype for field, want in zip(r.differentiable, wanted, strict=True) if want}
        return Case(trial, name, tensors, options, outputs, grads, given, gradients, wanted, scales, dtypes)


def _placed(guards: Guards, x: torch.Tensor | None) -> torch.Tensor | None:
    """An input between guard bands; tables of lengths and host tensors as they are."""
    return guards.place(x) if x is not None and x.is_floating_point() else x


def fresh(r: Recurrence, tensors: Any) -> Any:
    """The tensors of a call with copies of those that it updates in place."""
    return tensors._replace(**{name: x.clone() for name in r.mutates if (x := getattr(tensors, name)) is not None})


def forward_results(r: Recurrence, module: Any, config: Any, case: Case, tensors: Any) -> list[tuple[str, torch.Tensor | None]]:
    """Outputs, and what is left in the tensors that are updated in place."""
    outputs = module.forward(config, tensors, case.options)
    return [*zip(r.outputs._fields, outputs, strict=True), *((name, getattr(tensors, name)) for name in r.mutates)]


def backward_results(r: Recurrence, module: Any, config: Any, case: Case, tensors: Any) -> list[tuple[str, torch.Tensor | None]]:
    residuals = r.saved(tensors, *case.residuals[1:])
    found = module.backward(config, residuals, case.grads, case.options, case.wanted)
    return [(f"d{name}", x) for name, x in zip(r.gradients._fields, found, strict=True)]


def prove(recurrence: Recurrence, variant: Variant, config: Any, key: Problem, device: torch.device, *, backward: bool = False) -> Verdict:
    """One candidate against one Key, in this process: what the worker does, for tests and curious people."""
    prover = Prover(recurrence, device)
    return prover.prove(variant, config, prover.workload.proof_key(key.key()), backward=backward)
