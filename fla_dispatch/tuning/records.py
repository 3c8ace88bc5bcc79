"""The persisted models: what was measured, what was proven, what was chosen and by which rule.

A record is a pure function of its outcomes and of its header (default, order, incumbent, kernels, created, ...), so records
merge without a clock or a lock: see `choice.merge`. Models are frozen; unknown fields are ignored on reading, so that
a newer minor version's files serve; a newer `schema_version` does not validate and reads as a miss.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from ..problem import Problem

Status = Literal["ok", "wrong", "racy", "crash", "timeout", "oom", "compile_error"]
DirectionName = Literal["forward", "backward"]
Origin = Literal["measured", "imported", "shipped"]
Rule = Literal["fastest", "band", "default_guard"]
ConfigValue = int | bool | str
ConfigDictionary = dict[str, ConfigValue]

Microseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Model(BaseModel):
    # infinite and NaN errors are evidence too; as strings they stay standard JSON
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    @property
    def canonical(self) -> str:
        """The model as JSON with sorted names: equal texts mean equal models, whatever the order of a dict."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


class Timing(_Model):
    """Microseconds of one call: median, minimum and median absolute deviation over `rounds` interleaved rounds."""

    median_us: Microseconds
    min_us: Microseconds
    mad_us: Microseconds
    rounds: int = Field(ge=1)


class Certificate(_Model):
    """What was proven: the error of each output and gradient against an oracle, beside what was allowed.

    oracle: the variant that computed the truth; dtype: its dtype; tokens: the longest case; repeats: bitwise-equal runs.
    """

    oracle: str
    dtype: str
    tokens: int
    errors: dict[str, float]
    tolerances: dict[str, float]
    repeats: int


class Outcome(_Model):
    """What became of one candidate: a variant with a config, as its code was when `kernel_hash` was taken."""

    variant: str
    config: ConfigDictionary | None = None
    kernel_hash: str
    status: Status
    timing: Timing | None = None
    certificate: Certificate | None = None
    peak_bytes: int | None = None
    detail: str = ""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.variant, self.config)


class Choice(_Model):
    """The chosen candidate and why.

    rule: `fastest`; `band`: as fast within the noise, and the incumbent or declared first; `default_guard`: nothing beat the
    default clearly. margin: time of the best other candidate over the chosen one's time (1.0 if there is no other).
    band: fingerprints of the candidates that cannot be told apart from the fastest, in declared order.
    """

    variant: str
    config: ConfigDictionary | None = None
    rule: Rule
    margin: float = 1.0
    band: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.variant, self.config)


class Record(_Model):
    """Everything known about one key and direction in one environment.

    key: `record_key(problem)`. default, order, incumbent: the fingerprints that the choice rule took into account (the default
    config, all candidates as declared, the choice before this measurement). kernels: variant -> hash of its code at the time
    of measuring; outcomes of other hashes are history and take no part in `choice`. created: UTC, ISO 8601.
    """

    # the first four fields stay first: a store finds records by the beginning of their text, without parsing the rest
    schema_version: Literal[1] = 1
    recurrence: str
    key: str
    direction: DirectionName
    choice: Choice | None = None
    outcomes: tuple[Outcome, ...] = ()
    origin: Origin = "measured"
    versions: dict[str, str] = {}
    created: str = ""
    default: str = ""
    order: tuple[str, ...] = ()
    incumbent: str | None = None
    kernels: dict[str, str] = {}

    @property
    def tried(self) -> dict[tuple[str, str], Outcome]:
        """Outcomes by (fingerprint, kernel hash): what need not be measured again."""
        return {(o.fingerprint, o.kernel_hash): o for o in self.outcomes}

    def to_json(self) -> str:
        """The record as one line of JSON, as files and packs hold it."""
        return self.model_dump_json(exclude_none=True)

    def outcome(self, choice: Choice | None = None) -> Outcome | None:
        """The outcome behind a choice (the record's own by default): its timing and certificate."""
        chosen = choice or self.choice
        found = [o for o in self.outcomes if chosen and o.status == "ok" and o.fingerprint == chosen.fingerprint]
        found.sort(key=lambda o: self.kernels.get(o.variant) not in (None, o.kernel_hash))
        return found[0] if found else None

    def choose_among(self, allowed: Callable[[Outcome], bool]) -> Choice | None:
        """The choice of this record's rule among the outcomes that pass `allowed` (a current hash, no refusal)."""
        from .choice import choose

        return choose([o for o in self.outcomes if allowed(o)], self.default, self.order, self.incumbent)


def config_dict(config: Any) -> ConfigDictionary | None:
    """A variant's config (a NamedTuple, a mapping, or None) as the plain dict that records hold."""
    if config is None:
        return None
    pairs = config if isinstance(config, Mapping) else config._asdict()
    return dict(pairs)


def fingerprint(variant: str, config: Any = None) -> str:
    """Canonical text of a candidate: `sweep_triton{"BE":64,"BT":64}`; the order of a config's fields does not matter."""
    fields = config_dict(config)
    return variant if not fields else variant + json.dumps(fields, sort_keys=True, separators=(",", ":"))


def record_key(problem: Problem) -> str:
    """The key text that records of a problem are kept under.

    What a person or a process asked for (a named variant, the interpreter) is no fact of a measurement, and whether launches
    are captured into a graph is the regime of the environment.
    """
    return dataclasses.replace(problem.key(), forced=False, interpret=False, capture=False).text()


def now() -> str:
    """The present in the form of `Record.created`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
