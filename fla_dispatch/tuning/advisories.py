"""Known-bad combinations as data: rows that deny or demote a variant, or some of its configs, on some devices and compilers.

Rows are read from `data/advisories.json` and from `advisories.json` at the root of the user's and the site's records. Nothing
wins over a denial, not even naming the variant. A demotion gives way to anything else that may run, and to a measurement of
this device. Fields of a row:

    id, reason, link, test   for people; the test shows the hazard or that the denial works
    evidence                 observed (a run of ours) | tested | inherited (told by others, not repeated here)
    recurrence, variants     what is concerned
    arch                     architectures, [] for all
    triton, ptxas            version ranges: [">=3.4", "<3.8"], [] for all
    when                     exact fields of the Problem: {"dtypes": {"qkv": [...]}, "flags": {"decay": [...]}, "K": [...], "grad": [true]}
    config                   fields of the config: {"BE": {"max": 63}, "warps": {"min": 4}}; {} for every config
    action                   deny | demote
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

from ..device import package_version
from ..errors import FlaDispatchError
from ..problem import BUCKETED, Problem
from ..registry import Variant
from ..requirements import Refusal, RefusalCode

SHIPPED = Path(__file__).parent / "data" / "advisories.json"

_EXACT = tuple(f.name for f in dataclasses.fields(Problem) if f.name not in (*BUCKETED, "recurrence", "device", "forced"))
_OPERATORS = (">=", "<=", "==", "<", ">")


class AdvisoryError(FlaDispatchError):
    """A file of advisories that cannot be read as one: what it would have denied must not run unnoticed."""


@dataclasses.dataclass(frozen=True)
class Advisory:
    """One known-bad combination; see the module's docstring for the fields."""

    id: str
    recurrence: str
    variants: tuple[str, ...]
    action: str
    reason: str
    link: str = ""
    test: str = ""
    evidence: str = "inherited"
    arch: tuple[str, ...] = ()
    triton: tuple[str, ...] = ()
    ptxas: tuple[str, ...] = ()
    when: tuple[tuple[str, Any], ...] = ()
    config: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, row: Any, where: str) -> Advisory:
        """A row of a file, checked. Raises AdvisoryError."""
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(row, dict) or not {"id", "recurrence", "variants", "action", "reason"} <= set(row) <= names:
            raise AdvisoryError(
                f"{where}: expected a row with id, recurrence, variants, action and reason, and no others than {sorted(names)}"
            )
        fields: dict[str, Any] = {}
        for name, value in row.items():
            fields[name] = tuple(sorted(value.items())) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
        made = cls(**fields)
        where = f"{where}: {made.id}"
        if made.action not in ("deny", "demote") or made.evidence not in ("observed", "tested", "inherited"):
            raise AdvisoryError(f"{where}: action is deny or demote, evidence observed, tested or inherited")
        unsound = sorted(name for name, _ in made.when if name not in _EXACT)
        if unsound:
            raise AdvisoryError(f"{where}: `when` may not read {unsound}: equal Keys must get equal verdicts; it may read {sorted(_EXACT)}")
        for text in (*made.triton, *made.ptxas):
            if not re.fullmatch(rf"({'|'.join(_OPERATORS)})\d+(\.\d+)*", text):
                raise AdvisoryError(f'{where}: a version range is written like [">=3.4", "<3.8"], got {text!r}')
        for name, bounds in made.config:
            if not isinstance(bounds, dict) or not bounds or not set(bounds) <= {"min", "max", "in"}:
                raise AdvisoryError(f"{where}: config field {name} takes min, max or in, got {bounds!r}")
        return made

    def concerns(self, variant: str, problem: Problem) -> bool:
        """Whether the row speaks of a variant for a problem, whatever the config."""
        return (
            self.recurrence == problem.recurrence
            and variant in self.variants
            and (not self.arch or problem.device.arch in self.arch)
            and all(_holds(getattr(problem, name), wanted) for name, wanted in self.when)
            and (not self.triton or in_range(package_version("triton"), self.triton))
            and (not self.ptxas or in_range(_assembler(problem), self.ptxas))
        )

    def hits(self, config: Any) -> bool:
        """Whether the row speaks of a config."""
        fields = {} if config is None else config._asdict()
        return all(name in fields and _within(fields[name], bounds) for name, bounds in self.config)

    def refusal(self, variant: Variant) -> Refusal:
        """The denial as a refusal."""
        bounds = ", ".join(f"{name} {_bounds_text(b)}" for name, b in self.config)
        versions = "".join(f", {name} {' '.join(r)}" for name, r in (("triton", self.triton), ("ptxas", self.ptxas)) if r)
        have = f"{variant.name}{f' with {bounds}' if bounds else ''} on {' or '.join(self.arch) or 'any device'}{versions}"
        return Refusal(
            RefusalCode.ADVISORY, self.id, f"{have}: {self.reason} ({self.evidence}; {self.link})", "another combination",
            "use another variant or another compiler version",
        )  # fmt: skip


def _holds(have: Any, wanted: Any) -> bool:
    """A field of a problem against a list of values, or its named parts (dtypes, flags) against a list each."""
    if isinstance(wanted, dict):
        parts = dict(have)
        return all(parts.get(name) in values for name, values in wanted.items())
    return have in wanted


def _within(value: Any, bounds: dict[str, Any]) -> bool:
    return (
        ("min" not in bounds or value >= bounds["min"])
        and ("max" not in bounds or value <= bounds["max"])
        and ("in" not in bounds or value in bounds["in"])
    )


def _bounds_text(bounds: dict[str, Any]) -> str:
    return " ".join(f"{ {'min': '>=', 'max': '<=', 'in': 'in'}[name] } {value}" for name, value in sorted(bounds.items()))


def in_range(version: tuple[int, ...] | None, conditions: tuple[str, ...]) -> bool:
    """Whether a version is in a range like (">=3.4", "<3.8"); an unknown version is, since a hazard is not ruled out."""
    if version is None:
        return True
    for text in conditions:
        operator = next(o for o in _OPERATORS if text.startswith(o))
        bound = tuple(int(n) for n in text[len(operator) :].split("."))
        width = max(len(bound), len(version))
        have, limit = (v + (0,) * (width - len(v)) for v in (version, bound))
        if not {">=": have >= limit, "<=": have <= limit, "==": have == limit, "<": have < limit, ">": have > limit}[operator]:
            return False
    return True


def _assembler(problem: Problem) -> tuple[int, ...] | None:
    from .environment import compiler_version

    found = re.findall(r"\d+", compiler_version(problem.device))
    return tuple(map(int, found)) or None


def read(path: Path) -> tuple[Advisory, ...]:
    """The rows of a file. Raises AdvisoryError for one that is no list of rows."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdvisoryError(f"{path}: {error}. To fix: mend or remove the file.") from error
    if not isinstance(rows, list):
        raise AdvisoryError(f"{path}: expected a list of rows. To fix: mend or remove the file.")
    return tuple(Advisory.parse(row, str(path)) for row in rows)


@functools.lru_cache(maxsize=16)
def _read_all(paths: tuple[Path, ...]) -> tuple[Advisory, ...]:
    return tuple(row for path in paths for row in read(path))


def known() -> tuple[Advisory, ...]:
    """All rows in force: the shipped ones, the site's and the user's. Files are read once a process."""
    from .store import site_roots, user_root

    extra = (root / "advisories.json" for root in (*site_roots(), user_root()))
    return _read_all((SHIPPED, *(path for path in extra if path.is_file())))


@dataclasses.dataclass(frozen=True)
class Screened:
    """Configs of a variant after the advisories: what may run, why the rest may not, and whether all of it is demoted."""

    configs: tuple[Any, ...]
    denied: tuple[Refusal, ...]
    demoted: bool


def screen(variant: Variant, problem: Problem, configs: tuple[Any, ...]) -> Screened:
    """The configs that no advisory denies, demoted ones last. Empty configs mean that the variant is denied."""
    rows = [row for row in known() if row.concerns(variant.name, problem)]
    denying = [row for row in rows if row.action == "deny" and any(row.hits(c) for c in configs)]
    left = [c for c in configs if not any(row.hits(c) for row in denying)]
    weak = [c for c in left if any(row.action == "demote" and row.hits(c) for row in rows)]
    ordered = (*(c for c in left if c not in weak), *weak)
    return Screened(ordered, tuple(row.refusal(variant) for row in denying), bool(weak) and len(weak) == len(left))


def denies(variant: Variant, problem: Problem, config: Any) -> Refusal | None:
    """The denial of one config, if there is one."""
    denied = screen(variant, problem, (config,)).denied
    return denied[0] if denied else None
