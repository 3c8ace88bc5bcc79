"""Estimates from fitted times of one step of a block, for rooms whose kernels pass over time; `python -m benchmarks.fit` fits them.

A sweep is blocks times steps. A unit that runs b blocks needs max(alone, b * shared) microseconds for a step of each: the two
numbers, how many blocks a unit holds, and what a unit needs for a chunk of kernels that take chunks in any order, are fitted per class
(padded head dim, kind, direction) and config. `micros` takes floats or tensors, so that the fit is of the very function that ranks.
Greater of two is a power mean: times overlap, not quite. A room says what is its own in a `Model`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...device import DeviceProfile, hypothetical
from ...problem import Problem
from ...registry import Direction

#: Exponents of the power means: of a unit's two limits, and of host, memory and device.
SHARP, OVERLAP = 8, 6

#: What a config that was never timed in its class is estimated slower than its nearest relative, so that it must promise more.
UNTRIED = 1.25

#: The longest sequence of a pack over the mean (`layout.pack_lengths`).
SKEW = 1.9

#: How far apart two shapes are that differ in a flag; 1 where it is not named.
FLAGS = {"split": 2.0, "gluon": 32.0, "states": 32.0, "parallel": 32.0}

# -- facts of a problem ------------------------------------------------------------------------------------------------------


def item_bytes(p: Problem) -> int:
    """Bytes of one element of q, k and v."""
    return {"float64": 8, "float32": 4}.get(p.dtype("qkv") or "", 2)


def tokens(p: Problem) -> float:
    """Tokens times value heads: T counts one row of a dense batch, the whole of a pack."""
    return min(p.T, p.N * p.mean_length) * (p.BH / max(1, p.N)) if p.packed else float(p.T * p.BH)


class Rows(NamedTuple):
    """What passes over time walk side by side: how many rows, their mean and longest length, in tokens; uneven: of a pack;
    segments: of the longest sequence, 0 where sequences are not cut."""

    count: float
    mean: float
    longest: float
    uneven: bool
    segments: float


def rows_of(p: Problem, SEG: int) -> Rows:
    """Sequences and value heads, or their segments of SEG tokens."""
    every, rows = tokens(p), float(p.BH)
    mean = every / max(1.0, rows)
    uneven = p.packed and p.N > 1
    longest = min(SKEW * mean, float(p.T)) if uneven else mean
    if not SEG:
        return Rows(rows, mean, longest, uneven, 0.0)
    segments = -(-longest // SEG)
    rows = max(rows, every / SEG + rows / 2) if uneven else rows * segments
    mean, longest = every / max(1.0, rows), min(longest, SEG)
    return Rows(rows, mean if uneven else longest, longest, uneven, segments)


# -- constants ---------------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What a step's time is looked up by: the class (wide, kind, backward, full) and the config."""

    wide: int  # the larger head dim, padded
    kind: str  # the room's
    backward: bool
    full: bool  # float32 operands: no matrix unit
    BT: int  # tokens of a chunk, 0: token by token
    BE: int
    warps: int
    stages: int
    flags: tuple[str, ...] = ()  # what else a config says, sorted

    @property
    def name(self) -> str:
        """As costs.json names it: `128 gated backward 64x64x4 stages=3 split tma`."""
        words = (self.group, f"{self.BT}x{self.BE}x{self.warps}", f"stages={self.stages}", *["float32"] * self.full, *self.flags)
        return " ".join(words)

    @classmethod
    def parse(cls, name: str) -> Shape:
        wide, kind, direction, sizes, stages, *flags = name.split()
        BT, BE, warps = map(int, sizes.split("x"))
        full = "float32" in flags
        return cls(
            int(wide), kind, direction == "backward", full, BT, BE, warps, int(stages.partition("=")[2]), tuple(flags[full:])
        )  # fmt: skip

    @property
    def group(self) -> str:
        """The class: `128 gated backward`."""
        return f"{self.wide} {self.kind} {'backward' if self.backward else 'forward'}"

    def distance(self, other: Shape) -> float:
        """How far apart two shapes are; halved or doubled sizes count as often as that."""
        sizes = ((4.0, self.wide, other.wide), (2.0, self.BT + 1, other.BT + 1), (1.0, self.BE, other.BE), (1.0, self.warps, other.warps))
        steps = sum(weight * abs(a.bit_length() - b.bit_length()) for weight, a, b in sizes) + 0.5 * abs(self.stages - other.stages)
        kinds = 0 if self.kind == other.kind else 3 if "plain" in (self.kind, other.kind) else 2
        apart = 64 * (self.backward != other.backward) + 128 * (bool(self.BT) != bool(other.BT)) + 8 * (self.full != other.full)
        return steps + kinds + apart + sum(FLAGS.get(flag, 1.0) for flag in {*self.flags} ^ {*other.flags})


class Step(NamedTuple):
    """Microseconds of one step of a block: alone on its unit, and its share of a full unit; blocks that a unit holds; local: microseconds
    of a unit for a chunk of one head in the kernels that take chunks in any order."""

    alone: float
    shared: float
    resident: float
    local: float = 0.0


class Numbers(NamedTuple):
    """The constants that one estimate takes; microseconds unless said otherwise. In a fit each is a tensor."""

    host: Any  # of issuing the call
    lead: Any  # before the device is busy
    alone: Any  # see Step
    shared: Any
    resident: Any
    local: Any
    start: Any  # steps that a block's beginning and end count for
    passing: Any  # a step of a pass over segments, over that of a sweep
    scan: Any  # of one segment in the composition
    memory: Any  # share of the bandwidth that is reached


class Work(NamedTuple):
    """What a call asks of the device, without any fitted number.

    blocks, steps: of the sweeps, on average, in so many launches; longest: steps of the longest block of a pack (0: all are
    alike); chunks: of one head, on each unit, in kernels that take them in any order; pass_blocks, pass_steps: of the passes over
    segments; segments: of the longest sequence, in all compositions; memory, states: microseconds at the full bandwidth, of inputs
    and outputs and of what passes and compositions move.
    """

    units: float
    blocks: float
    steps: float
    launches: float
    longest: float
    chunks: float
    pass_blocks: float
    pass_steps: float
    segments: float
    memory: float
    states: float


@dataclasses.dataclass(frozen=True)
class Model:
    """What a room says of its fitted variants.

    configs: their configs' types by name; work: of a call under a config (p, config, backward); shape, and terms, names of the host's
    constants, which add up: of a variant's too (variant, p, config, backward); rough: a step by formula, which others of a like shape
    are scaled by.
    """

    recurrence: str
    file: Path
    configs: Mapping[str, Callable[..., Any]]
    shape: Callable[[str, Problem, Any, bool], Shape]
    work: Callable[[Problem, Any, bool], Work]
    terms: Callable[[str, Problem, Any, bool], tuple[str, ...]]
    rough: Callable[[Shape], Step]
    installed: list[Constants] = dataclasses.field(default_factory=list)

    def constants(self) -> Constants:
        """The constants in force: those of the file, read on first use."""
        if not self.installed:
            self.install(self.read(self.file.read_text(encoding="utf-8")))
        return self.installed[0]

    def install(self, new: Constants) -> None:
        """Estimate with these constants from now on."""
        self.installed[:] = [new]

    def read(self, text: str) -> Constants:
        found = json.loads(text)
        steps = {Shape.parse(name): Step(*numbers) for name, numbers in found["steps"].items()}
        return Constants(self, found["host"], found["passing"], found["shared"], steps)

    def seconds(self, variant: str, p: Problem, config: Any, direction: Direction) -> float:
        """The estimate of a variant of `configs`."""
        return 1e-6 * self.constants().micros(variant, p, config, direction.backward)

    def cost(self, variant: str) -> Callable[[Problem, Any, Direction], float]:
        """A Variant's cost."""
        assert variant in self.configs, variant
        return functools.partial(self.seconds, variant)


@dataclasses.dataclass
class Constants:
    """What costs.json holds: terms of the host, steps by shape, and the numbers that few shapes share."""

    model: Model = dataclasses.field(repr=False, compare=False)
    host: dict[str, float]
    passing: dict[str, float]
    shared: dict[str, float]
    steps: dict[Shape, Step]

    def __post_init__(self) -> None:
        self._found: dict[Shape, Step] = {}
        self._hosts: dict[str, float] = {}

    def text(self, about: dict[str, Any]) -> str:
        """As JSON, one constant a line; about: what was fitted."""
        steps = {s.name: list(step if step.local else step[:3]) for s, step in sorted(self.steps.items())}
        parts = {"about": about, "host": self.host, "passing": self.passing, "shared": self.shared, "steps": steps}
        lines = [f" {json.dumps(name)}: {_lines(part)}" for name, part in parts.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def step(self, s: Shape) -> Step:
        """The step of a shape; of one that was never fitted, its nearest relative's, scaled by formula."""
        known = self.steps.get(s) or self._found.get(s)
        if known is None:
            known = self._found[s] = self._like(s)
        return known

    def _like(self, s: Shape) -> Step:
        relative = min(self.steps, key=lambda other: (s.distance(other), other), default=None)
        rough = self.model.rough(s)
        if relative is None:
            return rough
        step, known = self.steps[relative], self.model.rough(relative)
        untried = UNTRIED if relative[4:] != s[4:] else 1.0
        factor = rough.alone / known.alone * untried
        local = step.local * rough.local / known.local * untried if known.local else 0.0
        return Step(step.alone * factor, step.shared * factor, max(1, step.resident * relative.warps // s.warps), local)

    def issuing(self, terms: tuple[str, ...]) -> float:
        """Microseconds of the host; of a kind that was never timed, as of the sweep, or as the variant's dearest kind."""
        first, *rest = terms
        base = self.host.get(first) or self._hosts.get(first)
        if base is None:
            variant, _, direction = first.split()
            sweep = self.host.get(first.replace("recurrent", "sweep"))
            same = [v for name, v in self.host.items() if name.startswith(variant) and name.endswith(direction)]
            base = self._hosts[first] = sweep or max(same, default=self.shared["host"])
        return base + sum(self.host.get(name, 0.0) for name in rest)

    def numbers(self, variant: str, p: Problem, config: Any, backward: bool) -> Numbers:
        """What `micros` takes; on another architecture, steps are slower by what a unit's rates are."""
        s = self.model.shape(variant, p, config, backward)
        step, shared, slower = self.step(s), self.shared, _slower(p.device)
        return Numbers(
            host=self.issuing(self.model.terms(variant, p, config, backward)),
            lead=shared["lead"],
            alone=step.alone * slower**0.5,
            shared=step.shared * slower,
            resident=step.resident,
            local=step.local * slower,
            start=shared["start" if s.BT else "start_token"],
            passing=self.passing.get(s.group, shared["passing"]),
            scan=shared["scan"],
            memory=shared["memory"],
        )

    def micros(self, variant: str, p: Problem, config: Any, backward: bool) -> float:
        """The estimate with these constants."""
        return float(micros(self.model.work(p, config, backward), self.numbers(variant, p, config, backward)))


def _lines(part: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in part.items()) + "\n }" if part else "{}"


@functools.cache
def _slower(d: DeviceProfile) -> float:
    """A unit's time for the same work over that of the device that was fitted."""
    fitted = hypothetical("sm90")
    rates = (getattr(fitted, r) / fitted.units / (getattr(d, r) / d.units) for r in ("matrix_rate", "bandwidth"))
    return 1.0 if d.arch == fitted.arch else max(rates)


# -- the estimate ------------------------------------------------------------------------------------------------------------


def _together(blocks: Any, n: Numbers) -> Any:
    """Microseconds of a step of each of the blocks on one unit."""
    return (blocks > 0) * (n.alone**SHARP + (blocks * n.shared) ** SHARP) ** (1 / SHARP)


def _waves(blocks: Any, units: Any, n: Numbers) -> Any:
    """Microseconds of a step of every block: full waves, then what is left over the units."""
    room = n.resident * units
    full = blocks // room
    return full * _together(n.resident, n) + _together(-(-(blocks - full * room) // units), n)


def micros(w: Work, n: Numbers) -> Any:
    """Microseconds of a call: the host's or the device's, of which memory is a limit."""
    sweep = (w.steps + w.launches * n.start) * _waves(w.blocks, w.units, n)
    chain = w.longest * n.alone
    passes = n.passing * w.pass_steps * _waves(w.pass_blocks, w.units, n)
    busy = sweep**OVERLAP + chain**OVERLAP + (w.memory / n.memory) ** OVERLAP
    device = n.lead + busy ** (1 / OVERLAP) + n.local * w.chunks + passes + n.scan * w.segments + w.states / n.memory
    return (n.host**OVERLAP + device**OVERLAP) ** (1 / OVERLAP)
