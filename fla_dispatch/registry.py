"""The tables: ops (contracts), recurrences (mathematics) and variants (implementations), and the rooms they come from.

Contracts import this module only, so that rooms never import the dispatcher. Variant modules are known by name and
imported on first use; one that fails to import becomes a refusal with the error's text, never a disappearance.
"""

from __future__ import annotations

import dataclasses
import importlib
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .errors import RegistrationError, UnknownNameError, nearest
from .problem import Problem
from .requirements import Lacks, Refusal, RefusalCode, Requirement, prove_sound, refusals

Tensors = tuple[torch.Tensor | None, ...]


class Lowering(NamedTuple):
    """What a contract returns: a call of a recurrence, and plain torch before and after it.

    tensors and options are the recurrence's own NamedTuples. prepare(tensors) -> tensors and finish(outputs) -> result are
    differentiable torch; explain reads a Lowering without running them.
    """

    recurrence: str
    tensors: Any
    options: Any
    prepare: Callable[[Any], Any] | None = None
    finish: Callable[[tuple[Any, ...]], Any] | None = None


class Direction(NamedTuple):
    """Which half of a call is meant; costs and configs may differ."""

    backward: bool


FORWARD, BACKWARD = Direction(False), Direction(True)


class CostFunction(Protocol):
    """Estimated seconds of one direction of a problem under a config, planned from bytes, operations, launches and occupancy."""

    def __call__(self, problem: Problem, config: Any, direction: Direction) -> float: ...


@dataclasses.dataclass(frozen=True)
class Variant:
    """One implementation of a recurrence, by name; its module is imported on first use.

    The module exports `forward(config, tensors, options) -> outputs` and, unless `Lacks(("grad",))` is required,
    `backward(config, residuals, grads, options, wanted) -> gradients`; the forward of a torch variant (language "torch") is
    plain differentiable torch, so that it serves under torch.func. configs(problem) lists the configs that may be chosen,
    the default first, each a NamedTuple (or `(None,)` for a variant without any).
    """

    name: str
    module: str
    requirements: tuple[Requirement, ...]
    cost: CostFunction
    configs: Callable[[Problem], tuple[Any, ...]] = lambda problem: (None,)
    summary: str = ""

    @property
    def family(self) -> str:
        """The algorithm: what `mode="chunk"` means."""
        return self.name.split("_")[0]

    @property
    def language(self) -> str:
        return self.name.split("_")[1] if "_" in self.name else "torch"

    def static_refusals(self, problem: Problem) -> tuple[Refusal, ...]:
        """Reasons against a problem, without importing the variant's module."""
        return refusals(self.requirements, problem)

    def load(self) -> types.ModuleType | Refusal:
        """The variant's module, or the refusal that its failed import amounts to."""
        return _load_variant(self)


_loaded: dict[str, types.ModuleType | Refusal] = {}


def _load_variant(variant: Variant) -> types.ModuleType | Refusal:
    found = _loaded.get(variant.module)
    if found is None:
        try:
            found = importlib.import_module(variant.module)
        except Exception as e:  # any failure of a plug-in's import is a reason to be shown, whatever its type
            found = Refusal(
                RefusalCode.IMPORT_ERROR, "module", f"{type(e).__name__}: {e}", f"{variant.module} to import",
                "mend the error shown, or use another variant",
            )  # fmt: skip
        else:
            lacks_grad = any(isinstance(r, Lacks) and "grad" in r.features for r in variant.requirements)
            for function in ("forward",) if lacks_grad else ("forward", "backward"):
                if not callable(getattr(found, function, None)):
                    raise RegistrationError(f"variant {variant.name}: module {variant.module} has no function {function!r}")
        _loaded[variant.module] = found
    return found


class Trial(NamedTuple):
    """One small call that a proof runs: exact sizes, and how often it is repeated (bitwise equal each time).

    heads: value heads of each sequence; lengths: of a pack; regime: of the gates, in the room's own words.
    """

    name: str
    problem: Problem
    heads: int
    lengths: tuple[int, ...] | None = None
    regime: str = "mild"
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class Workload:
    """How the tuner makes calls of a recurrence and judges them. A call is (tensors, options).

    make(key, device, seed) -> a realistic call whose Problem has this Key (shapes alone on the meta device).
    proof_key(key): the Key with everything set to one value that a proof does not depend on (lengths, counts), so that
    equal proof keys share their proofs; trials(proof_key, config): the calls that prove a config, the cheap ones first;
    make_trial(trial, device, seed) -> its call.
    layout(key): (sequences, query heads, value heads) of `make`: what a compiler may specialise on beside the proof key.
    oracle(trial) -> (variant, config) that computes it in float64.
    tolerance(dtype, name): largest relative error of an output (`o`) or gradient (`dq`); scales(tensors, gradients): what
    errors of gradients are relative to, where that is not their own norm.
    compiler: name of the module that compiles launches without running them (`kernels/_shared/precompile.py`).
    """

    make: Callable[[Problem, torch.device, int], tuple[Any, Any]]
    proof_key: Callable[[Problem], Problem]
    trials: Callable[[Problem, Any], tuple[Trial, ...]]
    make_trial: Callable[[Trial, torch.device, int], tuple[Any, Any]]
    layout: Callable[[Problem], tuple[int, int, int]]
    oracle: Callable[[Trial], tuple[str, Any]]
    tolerance: Callable[[torch.dtype, str], float]
    scales: Callable[[Any, Any], dict[str, float]]
    compiler: str


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The mathematics that variants implement, and the shapes that a compiler must know without running one.

    tensors, options: NamedTuple types; a tensor field whose annotation admits None is optional; options are float, int,
    str or bool, `final_state` among them unless states are updated in place.
    outputs: NamedTuple type, first the outputs that carry gradients in the order of output_grads; state is the second.
    mutates: names of the tensors that a forward updates in place; such a recurrence has no gradients, and what its variants
    leave in these tensors is proven like an output.
    saved, gradients, output_grads: NamedTuple types of what backward gets and gives. saved starts with `tensors` and holds
    outputs after it; gradients has the fields `differentiable`; output_grads the names of outputs that carry gradients.
    differentiable: names of the tensors that get gradients.
    empty_outputs(tensors, options) -> new empty outputs (also of fake tensors); absent ones are empty(0).
    residuals(tensors, outputs, options) -> what backward needs, of fixed arity.
    check(tensors, options): host-side checks of values, run inside the op.
    valued: names of the tensors whose values, not their layout alone, a check or a variant's Python may depend on (packings).
    problem(tensors, options, grad) -> Problem; facts(tensors, options) -> a cheap hashable that determines its Key.
    flops(tensors, options) -> multiply-adds times two of the forward's chunk form.
    workload: what the tuner needs; a recurrence without one is never measured.
    """

    name: str
    tensors: type[Any]
    options: type[Any]
    outputs: type[Any]
    saved: type[Any]
    gradients: type[Any]
    output_grads: type[Any]
    differentiable: tuple[str, ...]
    empty_outputs: Callable[[Any, Any], tuple[torch.Tensor, ...]]
    residuals: Callable[[Any, Any, Any], Any]
    check: Callable[[Any, Any], None]
    facts: Callable[[Any, Any], tuple[Any, ...]]
    problem: Callable[[Any, Any, bool], Problem]
    flops: Callable[[Any, Any], int]
    variants: tuple[Variant, ...]
    workload: Workload | None = None
    mutates: tuple[str, ...] = ()
    valued: tuple[str, ...] = ()

    def variant(self, name: str) -> Variant:
        for v in self.variants:
            if v.name == name:
                return v
        raise UnknownNameError(f"{self.name}: no variant named {name!r}; {nearest(name, [v.name for v in self.variants])}.")


@dataclasses.dataclass(frozen=True)
class Op:
    """What a user calls: a contract function that lowers to a recurrence.

    sizes: the names of its sizes with defaults, for `explain` without tensors; example(sizes, dtype, device, ...) makes
    the arguments of a call (the room's input generator).
    """

    name: str
    recurrence: str
    contract: Callable[..., Lowering]
    sizes: dict[str, int]
    example: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def summary(self) -> str:
        return (self.contract.__doc__ or "").strip().split("\n")[0]


#: One line per room, each a folder of `kernels/` with `ops.py` and `variants.py`.
ROOMS = ("scalar_decay", "scalar_step", "delta", "delta_step")

_ops: dict[str, Op] = {}
_recurrences: dict[str, Recurrence] = {}
_rooms_loaded = False
_loading = threading.Lock()

#: Counts registrations, so that caches of decisions know when they are stale.
epoch = 0


def _check_variant(recurrence: str, variant: Variant, siblings: Sequence[Variant]) -> None:
    if variant.name in ("auto", "reference") and variant.module.rsplit(".", 1)[-1] != "reference":
        raise RegistrationError(f"{recurrence}: the variant name {variant.name!r} is reserved")
    if sum(v.name == variant.name for v in siblings) > 1:
        raise RegistrationError(f"{recurrence}: two variants are named {variant.name!r}; names are unique in a recurrence")
    prove_sound(f"{recurrence}/{variant.name}", variant.requirements)


def _check_fields(r: Recurrence) -> None:
    """The NamedTuples of a recurrence must agree with each other: the dispatcher passes tensors by position."""
    carried = r.output_grads._fields
    if r.gradients._fields != r.differentiable or not set(r.differentiable) <= set(r.tensors._fields):
        raise RegistrationError(f"{r.name}: `gradients` and `differentiable` must name the same tensors in the same order")
    if not set(r.mutates) <= set(r.tensors._fields) or (r.mutates and (r.differentiable or carried)):
        raise RegistrationError(f"{r.name}: `mutates` must name tensors of a recurrence without gradients, got {r.mutates}")
    if r.outputs._fields[: len(carried)] != carried or len(r.outputs._fields) < (1 if r.mutates else 2):
        raise RegistrationError(f"{r.name}: outputs {r.outputs._fields} must begin with those that carry gradients, {carried}")
    if r.saved._fields[0] != "tensors" or not set(r.saved._fields[1:]) <= set(r.outputs._fields):
        raise RegistrationError(f"{r.name}: `saved` must hold `tensors` first, then outputs")
    if not set(r.valued) <= set(r.tensors._fields):
        raise RegistrationError(f"{r.name}: `valued` must name tensors, got {r.valued}")
    if not r.mutates and "final_state" not in r.options._fields:
        raise RegistrationError(f"{r.name}: options have no field `final_state`")


def register_recurrence(recurrence: Recurrence) -> None:
    """Add a recurrence with its table of variants."""
    global epoch
    if recurrence.name in _recurrences:
        raise RegistrationError(f"a recurrence named {recurrence.name!r} is registered already")
    _check_fields(recurrence)
    for v in recurrence.variants:
        _check_variant(recurrence.name, v, recurrence.variants)
    if not any(v.name == "reference" for v in recurrence.variants):
        raise RegistrationError(f"{recurrence.name}: the table has no `reference` variant")
    _recurrences[recurrence.name] = recurrence
    epoch += 1


def register_variant(recurrence: str, variant: Variant) -> None:
    """Add a variant to a registered recurrence (the way in for variants from outside this package)."""
    global epoch
    base = get_recurrence(recurrence)
    table = (*base.variants, variant)
    _check_variant(recurrence, variant, table)
    _recurrences[recurrence] = dataclasses.replace(base, variants=table)
    epoch += 1


def unregister_variant(recurrence: str, name: str) -> None:
    """Take a variant out again (tests and plug-ins that are switched off)."""
    global epoch
    base = get_recurrence(recurrence)
    base.variant(name)
    _recurrences[recurrence] = dataclasses.replace(base, variants=tuple(v for v in base.variants if v.name != name))
    epoch += 1


def register_op(op: Op) -> None:
    """Add an op; its recurrence must be registered."""
    global epoch
    if op.name in _ops:
        raise RegistrationError(f"an op named {op.name!r} is registered already")
    if op.recurrence not in _recurrences:
        raise RegistrationError(f"op {op.name!r} lowers to the unknown recurrence {op.recurrence!r}")
    if not op.contract.__doc__:
        raise RegistrationError(f"op {op.name!r}: the contract function has no docstring")
    _ops[op.name] = op
    epoch += 1


def load_rooms() -> None:
    """Register every room's recurrences and ops (imports torch, no triton)."""
    if not _rooms_loaded:
        _register_rooms()


def _register_rooms() -> None:
    global _rooms_loaded
    with _loading:
        for room in () if _rooms_loaded else ROOMS:
            base = f"{__package__}.kernels.{room}"
            register_recurrence(importlib.import_module(f"{base}.variants").RECURRENCE)
            for op in importlib.import_module(f"{base}.ops").OPS:
                register_op(op)
        _rooms_loaded = True


def get_op(name: str) -> Op:
    load_rooms()
    found = _ops.get(name)
    if found is None:
        raise UnknownNameError(f"no op named {name!r}; {nearest(str(name), list(_ops))}.")
    return found


def get_recurrence(name: str) -> Recurrence:
    load_rooms()
    found = _recurrences.get(name)
    if found is None:
        raise UnknownNameError(f"no recurrence named {name!r}; {nearest(str(name), list(_recurrences))}.")
    return found


def op_names() -> list[str]:
    load_rooms()
    return list(_ops)


def recurrence_names() -> list[str]:
    load_rooms()
    return list(_recurrences)
