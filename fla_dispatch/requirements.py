"""Requirements as data, and refusals with a stable code, what the call has, what the variant wants, and what to do.

"Can it run?" is derived from "why not?": a variant may run a problem when none of its requirements refuses. Each
requirement names the Problem fields it reads and the thresholds it puts on bucketed fields, so that registration can prove
that equal Keys get equal verdicts.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable
from typing import Protocol

from .device import DeviceProfile, package_version
from .errors import RegistrationError
from .problem import BUCKETED, Problem, is_count_edge, is_length_edge


class RefusalCode(enum.Enum):
    """Every reason for which a variant can be refused. Codes are stable: tests and users may match on them."""

    DEVICE_KIND = "device.kind"  # the variant is not written for this vendor
    ARCH_TOO_OLD = "arch.too_old"  # the device's architecture is older than the variant supports
    ARCH_UNKNOWN = "arch.unknown"  # an architecture the variant has not been compiled for
    INTERPRETER_ONLY_FORCED = "interpreter.only_forced"  # on a CPU a Triton variant runs interpreted, and only when named
    PACKAGE_MISSING = "package.missing"  # a package that the variant needs is not installed
    PACKAGE_VERSION = "package.version"  # an installed package is outside the supported range
    DTYPE = "dtype.unsupported"  # a tensor's dtype is not one the variant computes in
    DIM_TOO_SMALL = "dim.too_small"
    DIM_TOO_LARGE = "dim.too_large"
    DIM_MULTIPLE = "dim.not_multiple"
    PACKED = "packing.unsupported"  # packed sequences (cu_seqlens)
    INITIAL_STATE = "state.initial_unsupported"
    FINAL_STATE = "state.final_unsupported"
    GRAD = "grad.unsupported"  # the variant has no backward
    DETERMINISM = "determinism.unsupported"  # torch.use_deterministic_algorithms is on
    CAPTURE = "capture.unsupported"  # a CUDA graph is being captured
    SHARED_MEMORY = "shared_memory.too_small"  # the smallest tiles do not fit one block's shared memory
    FLAG = "flag.unsupported"  # an option of the op that the variant does not implement
    RULE = "rule"  # a rule of the variant's own, with its reason
    IMPORT_ERROR = "import.failed"  # the variant's module could not be imported; the error's text is in `have`
    PROOF = "proof.failed"  # on this device the variant was wrong, not repeatable or crashed for such a call
    ADVISORY = "advisory.denied"  # a known-bad combination of arch, compiler and variant


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a variant cannot run a problem."""

    code: RefusalCode
    field: str
    have: str
    want: str
    fix: str

    def text(self) -> str:
        return f"{self.code.value}: {self.field} is {self.have}, wants {self.want}; {self.fix}"

    def to_dict(self) -> dict[str, str]:
        return {"code": self.code.value, "field": self.field, "have": self.have, "want": self.want, "fix": self.fix}


class Requirement(Protocol):
    """A condition on a Problem. `reads` are the fields it looks at; `thresholds` its cuts on them as (field, max)."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def thresholds(self) -> tuple[tuple[str, int], ...]: ...

    def refuse(self, p: Problem) -> Refusal | None: ...


@dataclasses.dataclass(frozen=True)
class _Base:
    """Defaults: no thresholds; each class lists what it reads."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def thresholds(self) -> tuple[tuple[str, int], ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class Gpu(_Base):
    """Runs on GPUs: NVIDIA from `nvidia_min` on, the AMD architectures named, Intel if `intel`. On a CPU only when Triton
    interprets and the variant was forced."""

    nvidia_min: int = 80
    nvidia_only: tuple[str, ...] = ()
    amd: tuple[str, ...] = ("gfx90a", "gfx942", "gfx950")
    intel: bool = True

    @property
    def reads(self) -> tuple[str, ...]:
        return ("device", "interpret", "forced")

    def refuse(self, p: Problem) -> Refusal | None:
        d = p.device
        if not d.is_gpu:
            if p.interpret and p.forced and not self.nvidia_only:
                return None
            if p.interpret and not self.nvidia_only:
                return Refusal(
                    RefusalCode.INTERPRETER_ONLY_FORCED, "device", "a CPU under the interpreter", "to be named",
                    "name the variant (mode=...) to run it interpreted",
                )  # fmt: skip
            return Refusal(RefusalCode.DEVICE_KIND, "device", d.arch, "a GPU", "move the tensors to a GPU")
        return self.refuse_gpu(d)

    def refuse_gpu(self, d: DeviceProfile) -> Refusal | None:
        """What is said of a GPU, whatever the call."""
        if d.vendor == "nvidia":
            if self.nvidia_only and d.arch not in self.nvidia_only:
                wanted = " or ".join(self.nvidia_only)
                return Refusal(RefusalCode.ARCH_UNKNOWN, "arch", d.arch, wanted, "use another variant on this device")
            if d.arch_number < self.nvidia_min:
                return Refusal(
                    RefusalCode.ARCH_TOO_OLD, "arch", d.arch, f"sm{self.nvidia_min} or newer", "use a newer GPU or a torch variant"
                )
            return None
        if self.nvidia_only:
            return Refusal(RefusalCode.DEVICE_KIND, "device", d.arch, " or ".join(self.nvidia_only), "use another variant on this device")
        if d.vendor == "amd" and d.arch not in self.amd:
            return Refusal(RefusalCode.ARCH_UNKNOWN, "arch", d.arch, " or ".join(self.amd), "use a torch variant on this device")
        if d.vendor == "intel" and not self.intel:
            return Refusal(RefusalCode.DEVICE_KIND, "device", d.arch, "an NVIDIA or AMD GPU", "use a torch variant on this device")
        return None


@dataclasses.dataclass(frozen=True)
class Package(_Base):
    """An installed distribution, at least `minimum` and below `below`."""

    name: str
    minimum: tuple[int, ...] = ()
    below: tuple[int, ...] = ()

    def refuse(self, p: Problem) -> Refusal | None:
        have = package_version(self.name)
        want = ".".join(map(str, self.minimum)) or "any version"
        want = f"{self.name} >= {want}" + (f", < {'.'.join(map(str, self.below))}" if self.below else "")
        if have is None:
            return Refusal(RefusalCode.PACKAGE_MISSING, "package", f"no {self.name}", want, f"pip install {self.name}")
        if have < self.minimum or (self.below and have >= self.below):
            shown = ".".join(map(str, have))
            return Refusal(RefusalCode.PACKAGE_VERSION, "package", f"{self.name} {shown}", want, f"pip install '{want}'")
        return None


@dataclasses.dataclass(frozen=True)
class DTypes(_Base):
    """The dtypes a role may have when its tensor is present."""

    role: str
    allowed: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return ("dtypes",)

    def refuse(self, p: Problem) -> Refusal | None:
        have = p.dtype(self.role)
        if have is None or have in self.allowed:
            return None
        return Refusal(RefusalCode.DTYPE, self.role, have, " or ".join(self.allowed), f"cast {self.role}, or use a torch variant")


@dataclasses.dataclass(frozen=True)
class Dim(_Base):
    """Range and divisibility of a size."""

    field: str
    minimum: int | None = None
    maximum: int | None = None
    multiple: int | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.field,)

    @property
    def thresholds(self) -> tuple[tuple[str, int], ...]:
        cuts = [self.minimum - 1] if self.minimum is not None else []
        cuts += [self.maximum] if self.maximum is not None else []
        return tuple((self.field, c) for c in cuts)

    def refuse(self, p: Problem) -> Refusal | None:
        have = getattr(p, self.field)
        if self.minimum is not None and have < self.minimum:
            return Refusal(RefusalCode.DIM_TOO_SMALL, self.field, str(have), f">= {self.minimum}", "use another variant")
        if self.maximum is not None and have > self.maximum:
            return Refusal(RefusalCode.DIM_TOO_LARGE, self.field, str(have), f"<= {self.maximum}", "use another variant")
        if self.multiple is not None and have % self.multiple:
            fix = f"pad {self.field} to {-(-have // self.multiple) * self.multiple}"
            return Refusal(RefusalCode.DIM_MULTIPLE, self.field, str(have), f"a multiple of {self.multiple}", fix)
        return None


@dataclasses.dataclass(frozen=True)
class Lacks(_Base):
    """Features that a variant does not have, out of packed, initial_state, final_state, grad, deterministic, capture."""

    features: tuple[str, ...]

    CODES = {
        "packed": (RefusalCode.PACKED, "call it once per sequence"),
        "initial_state": (RefusalCode.INITIAL_STATE, "leave initial_state out"),
        "final_state": (RefusalCode.FINAL_STATE, "set output_final_state=False"),
        "grad": (RefusalCode.GRAD, "call it under torch.no_grad()"),
        "deterministic": (RefusalCode.DETERMINISM, "torch.use_deterministic_algorithms(False)"),
        "capture": (RefusalCode.CAPTURE, "call it outside graph capture"),
    }

    def __post_init__(self) -> None:
        unknown = set(self.features) - set(self.CODES)
        if unknown:
            raise RegistrationError(f"Lacks: unknown features {sorted(unknown)}; known: {sorted(self.CODES)}")

    @property
    def reads(self) -> tuple[str, ...]:
        return self.features

    def refuse(self, p: Problem) -> Refusal | None:
        for feature in self.features:
            if getattr(p, feature):
                code, fix = self.CODES[feature]
                return Refusal(code, feature, "asked for", "not asked for", f"{fix}, or use another variant")
        return None


@dataclasses.dataclass(frozen=True)
class Flag(_Base):
    """The values of a semantic option that a variant implements."""

    name: str
    allowed: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return ("flags",)

    def refuse(self, p: Problem) -> Refusal | None:
        have = p.flag(self.name)
        if have is None or have in self.allowed:
            return None
        return Refusal(RefusalCode.FLAG, self.name, have, " or ".join(self.allowed), "use another variant")


class _View:
    """What a rule of a variant's own may see: the fields it declared, nothing else."""

    _problem: Problem
    _reads: tuple[str, ...]

    def __init__(self, problem: Problem, reads: tuple[str, ...]):
        object.__setattr__(self, "_problem", problem)
        object.__setattr__(self, "_reads", reads)

    def __getattr__(self, name: str) -> object:
        if name not in self._reads:
            raise RegistrationError(f"a rule reads the field {name!r} that it does not declare (declared: {self._reads})")
        return getattr(self._problem, name)

    def dtype(self, role: str) -> str | None:
        """As Problem.dtype, for rules that declare `dtypes`."""
        return dict(self.__getattr__("dtypes")).get(role)  # type: ignore[call-overload]

    def flag(self, name: str) -> str | None:
        """As Problem.flag, for rules that declare `flags`."""
        return dict(self.__getattr__("flags")).get(name)  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class SharedMemory(_Base):
    """Bytes of shared memory that the smallest config needs, as a function of declared fields."""

    needed: Callable[[Problem], int]
    fields: tuple[str, ...] = ("K", "V", "dtypes")

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.fields, "device")

    def refuse(self, p: Problem) -> Refusal | None:
        if not p.device.is_gpu:
            return None
        need, have = self.needed(_View(p, self.reads)), p.device.shared_bytes  # type: ignore[arg-type]
        if need <= have:
            return None
        return Refusal(RefusalCode.SHARED_MEMORY, "shared memory", f"{have} B", f"{need} B", "use smaller head dims or another variant")


@dataclasses.dataclass(frozen=True)
class Rule(_Base):
    """The escape hatch: a check of the variant's own that declares which fields it reads.

    check(view) returns None, or (have, want, fix). A rule may not read bucketed fields: its cuts on them would be
    invisible to the soundness check; use Dim for those.
    """

    name: str
    fields: tuple[str, ...]
    check: Callable[[Problem], tuple[str, str, str] | None]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.fields

    def refuse(self, p: Problem) -> Refusal | None:
        found = self.check(_View(p, self.fields))  # type: ignore[arg-type]
        return None if found is None else Refusal(RefusalCode.RULE, self.name, *found)


def prove_sound(owner: str, requirements: Iterable[Requirement]) -> None:
    """Raise RegistrationError if a requirement could split a bucket, or reads something that is not a Problem field."""
    fields = {f.name for f in dataclasses.fields(Problem)}
    for r in requirements:
        unknown = set(r.reads) - fields
        if unknown:
            raise RegistrationError(f"{owner}: {type(r).__name__} reads {sorted(unknown)}, which are no Problem fields")
        if isinstance(r, (Rule, SharedMemory)) and set(r.reads) & set(BUCKETED):
            hidden = sorted(set(r.reads) & set(BUCKETED))
            raise RegistrationError(f"{owner}: a {type(r).__name__} may not read bucketed fields {hidden}; use Dim")
        if isinstance(r, Dim) and r.multiple is not None and r.field in BUCKETED:
            raise RegistrationError(f"{owner}: a multiple of the bucketed field {r.field} splits its buckets")
        for field, cut in r.thresholds:
            edge = is_length_edge if field in ("T", "mean_length") else is_count_edge
            if field in BUCKETED and not edge(cut):
                raise RegistrationError(
                    f"{owner}: the threshold {field} <= {cut} falls inside a bucket; lengths cut at 0, 1, 16, 32, 64 and "
                    "powers of two, counts at powers of two"
                )


def refusals(requirements: Iterable[Requirement], problem: Problem) -> tuple[Refusal, ...]:
    """Every reason against a problem, in the order of the requirements."""
    return tuple(found for r in requirements if (found := r.refuse(problem)) is not None)
