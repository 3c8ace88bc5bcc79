"""Estimated seconds of each variant and config, from fitted times of one step of a block (costs.json, `python -m benchmarks.fit`).

A sweep is blocks times steps. A unit that runs b blocks needs max(alone, b * shared) microseconds for a step of each: the two
numbers, and how many blocks a unit holds, are fitted per class (padded head dim, kind, direction) and config. `micros` takes
floats or tensors, so that the fit is of the very function that ranks. Greater of two is a power mean: times overlap, not quite.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from ...device import DeviceProfile, hypothetical
from ...problem import Problem
from ...registry import Direction
from .._shared.cost import torch_seconds
from .._shared.launch import tile
from .configs import SweepConfig

FILE = Path(__file__).with_name("costs.json")

#: Exponents of the power means: of a unit's two limits, and of host, memory and device.
SHARP, OVERLAP = 8, 6

#: What a config that was never timed in its class is estimated slower than its nearest relative, so that it must promise more.
UNTRIED = 1.25

#: The longest sequence of a pack over the mean (`workload.make`).
SKEW = 1.9

# -- facts of a problem ------------------------------------------------------------------------------------------------------


def item_bytes(p: Problem) -> int:
    """Bytes of one element of q, k and v."""
    return {"float64": 8, "float32": 4}.get(p.dtype("qkv") or "", 2)


#: A head dim as the kernels pad it.
padded = tile


def tokens(p: Problem) -> float:
    """Tokens times value heads: T counts one row of a dense batch, the whole of a pack."""
    return min(p.T, p.N * p.mean_length) * (p.BH / max(1, p.N)) if p.packed else p.T * p.BH


# -- constants ---------------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What a step's time is looked up by: the class (wide, kind, backward) and the config."""

    wide: int  # the larger head dim, padded
    kind: str  # plain | gated | weighted | normalized
    backward: bool
    full: bool  # float32 operands: no matrix unit
    BT: int
    BE: int
    warps: int
    stages: int
    split: bool
    tma: bool

    @property
    def name(self) -> str:
        """As costs.json names it: `128 gated backward 64x64x4 stages=3 split tma`."""
        words = (
            f"{self.wide} {self.kind} {'backward' if self.backward else 'forward'} {self.BT}x{self.BE}x{self.warps} stages={self.stages}"
        )
        return words + " float32" * self.full + " split" * self.split + " tma" * self.tma

    @classmethod
    def parse(cls, name: str) -> Shape:
        wide, kind, direction, sizes, stages, *rest = name.split()
        BT, BE, warps = map(int, sizes.split("x"))
        flags = ("split" in rest, "tma" in rest)
        return cls(int(wide), kind, direction == "backward", "float32" in rest, BT, BE, warps, int(stages.partition("=")[2]), *flags)

    @property
    def group(self) -> str:
        """The class: `128 gated backward`."""
        return f"{self.wide} {self.kind} {'backward' if self.backward else 'forward'}"

    def rough(self) -> float:
        """Microseconds of a step by formula: what one shape's time is scaled by where another's is known."""
        slower = {"plain": 1.0, "normalized": 2.4}.get(self.kind, 2.6 if self.backward else 1.8)
        slower *= (1.5, 1.5, 1.15)[self.stages] if self.stages < 3 else 1.0
        if not self.BT:
            return 0.35 * slower * (self.wide / 64) ** 0.5
        wide = {128: 1.45, 256: 4.6}.get(self.wide, 1.05 * (min(self.wide, 64) / 64) ** 0.5)
        return wide * slower * (self.BT * self.BE / 4096) ** 0.5 * (16 if self.full else 1)

    def distance(self, other: Shape) -> float:
        """How far apart two shapes are; halved or doubled sizes count as often as that."""
        sizes = ((4.0, self.wide, other.wide), (2.0, self.BT + 1, other.BT + 1), (1.0, self.BE, other.BE), (1.0, self.warps, other.warps))
        steps = sum(weight * abs(a.bit_length() - b.bit_length()) for weight, a, b in sizes) + 0.5 * abs(self.stages - other.stages)
        kinds = 0 if self.kind == other.kind else 3 if "plain" in (self.kind, other.kind) else 2
        apart = 64 * (self.backward != other.backward) + 128 * (bool(self.BT) != bool(other.BT)) + 8 * (self.full != other.full)
        return steps + kinds + apart + 2 * (self.split != other.split) + (self.tma != other.tma)


class Step(NamedTuple):
    """Microseconds of one step of a block: alone on its unit, and its share of a full unit; blocks that a unit holds."""

    alone: float
    shared: float
    resident: float


class Numbers(NamedTuple):
    """The constants that one estimate takes; microseconds unless said otherwise. In a fit each is a tensor."""

    host: Any  # of issuing the call
    lead: Any  # before the device is busy
    alone: Any  # see Step
    shared: Any
    resident: Any
    start: Any  # steps that a block's beginning and end count for
    passing: Any  # a step of a pass over segments, over that of a sweep
    scan: Any  # of one segment in the composition
    memory: Any  # share of the bandwidth that is reached


def kind_of(p: Problem) -> str:
    """weighted: gates with beta or grouped value heads (mamba2)."""
    if p.flag("normalize") == "true":
        return "normalized"
    if p.flag("decay") != "token":
        return "plain"
    return "weighted" if p.dtype("beta") else "gated"


def shape(p: Problem, config: Any, backward: bool) -> Shape:
    """Forward is one launch, whatever `split` says; a config without BT goes token by token."""
    BT, stages, split, tma = (getattr(config, name, 0) for name in ("BT", "stages", "split", "tma"))
    wide = max(padded(p.K), padded(p.V))
    return Shape(wide, kind_of(p), backward, item_bytes(p) >= 4, BT, config.BE, config.warps, stages, bool(split) and backward, bool(tma))


def host_terms(variant: str, p: Problem, s: Shape) -> tuple[str, ...]:
    """Names of the host's terms, which add up; each is a constant."""
    direction = "backward" if s.backward else "forward"
    found = [f"{variant} {s.kind} {direction}"]
    found += [f"split {direction}"] * s.split + [f"tma {variant} {direction}"] * s.tma + [f"packed {variant}"] * p.packed
    return (*found, *[f"state {direction}"] * (p.initial_state or p.final_state))


@dataclasses.dataclass
class Constants:
    """What costs.json holds: terms of the host, steps by shape, and the numbers that few shapes share."""

    host: dict[str, float]
    passing: dict[str, float]
    shared: dict[str, float]
    steps: dict[Shape, Step]

    def __post_init__(self) -> None:
        self._found: dict[Shape, Step] = {}
        self._hosts: dict[str, float] = {}

    @classmethod
    def read(cls, text: str) -> Constants:
        found = json.loads(text)
        steps = {Shape.parse(name): Step(*numbers) for name, numbers in found["steps"].items()}
        return cls(found["host"], found["passing"], found["shared"], steps)

    def text(self, about: dict[str, Any]) -> str:
        """As JSON, one constant a line; about: what was fitted."""
        steps = {s.name: list(step) for s, step in sorted(self.steps.items())}
        parts = {"about": about, "host": self.host, "passing": self.passing, "shared": self.shared, "steps": steps}
        lines = [f" {json.dumps(name)}: {{\n{_lines(part)}\n }}" for name, part in parts.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def step(self, s: Shape) -> Step:
        """The step of a shape; of one that was never fitted, its nearest relative's, scaled by formula."""
        known = self.steps.get(s) or self._found.get(s)
        if known is None:
            known = self._found[s] = self._like(s)
        return known

    def _like(self, s: Shape) -> Step:
        relative = min(self.steps, key=lambda other: (s.distance(other), other), default=None)
        if relative is None:
            return Step(s.rough(), 0.5 * s.rough(), 2)
        step, factor = self.steps[relative], s.rough() / relative.rough()
        factor *= UNTRIED if relative[4:] != s[4:] else 1.0
        return Step(step.alone * factor, step.shared * factor, max(1, step.resident * relative.warps // s.warps))

    def issuing(self, variant: str, p: Problem, s: Shape) -> float:
        """Microseconds of the host; of a kind that was never timed, as of the sweep, or as the variant's dearest kind."""
        first, *rest = host_terms(variant, p, s)
        base = self.host.get(first) or self._hosts.get(first)
        if base is None:
            direction = first.rpartition(" ")[2]
            sweep = self.host.get(first.replace("recurrent", "sweep"))
            same = [v for name, v in self.host.items() if name.startswith(variant) and name.endswith(direction)]
            base = self._hosts[first] = sweep or max(same, default=self.shared["host"])
        return base + sum(self.host.get(name, 0.0) for name in rest)

    def numbers(self, variant: str, p: Problem, s: Shape) -> Numbers:
        """What `micros` takes for a shape of a problem; on another architecture, steps are slower by what a unit's rates are."""
        step, shared, slower = self.step(s), self.shared, _slower(p.device)
        return Numbers(
            host=self.issuing(variant, p, s),
            lead=shared["lead"],
            alone=step.alone * slower**0.5,
            shared=step.shared * slower,
            resident=step.resident,
            start=shared["start" if s.BT else "start_token"],
            passing=self.passing.get(s.group, shared["passing"]),
            scan=shared["scan"],
            memory=shared["memory"],
        )


def _lines(part: dict[str, Any]) -> str:
    return ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in part.items())


@functools.cache
def _slower(d: DeviceProfile) -> float:
    """A unit's time for the same work over that of the device that was fitted."""
    fitted = hypothetical("sm90")
    rates = (getattr(fitted, r) / fitted.units / (getattr(d, r) / d.units) for r in ("matrix_rate", "bandwidth"))
    return 1.0 if d.arch == fitted.arch else max(rates)


_installed: list[Constants] = []


def constants() -> Constants:
    """The constants in force: those of costs.json, read on first use."""
    if not _installed:
        install(Constants.read(FILE.read_text(encoding="utf-8")))
    return _installed[0]


def install(new: Constants) -> None:
    """Estimate with these constants from now on."""
    _installed[:] = [new]


# -- work --------------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a call asks of the device, without any fitted number.

    blocks, steps: of the sweeps, on average, in so many launches; longest: steps of the longest block of a pack (0: all are
    alike); pass_blocks, pass_steps: of the passes over segments; segments: of the longest sequence, in all compositions;
    memory, states: microseconds at the full bandwidth, of inputs and outputs and of what passes and compositions move.
    """

    units: float
    blocks: float
    steps: float
    launches: float
    longest: float
    pass_blocks: float
    pass_steps: float
    segments: float
    memory: float
    states: float


def work(p: Problem, config: Any, backward: bool) -> Work:
    """The work of a Triton variant under a config: of a SegmentConfig with segments in parallel, else of whole sequences."""
    BT, SEG = getattr(config, "BT", 1), getattr(config, "SEG", 0)
    every, rows = tokens(p), float(p.BH)
    mean = every / max(1.0, rows)
    uneven = p.packed and p.N > 1
    longest = min(SKEW * mean, float(p.T)) if uneven else mean
    columns = max(-(-p.K // config.BE) if backward else 1, -(-p.V // config.BE))
    launches, slices = (1, 1) if not backward else (3, 1) if getattr(config, "split", False) else (1, 3)
    size = item_bytes(p)
    moved = every * size * ((4 * p.K + 3 * p.V) if backward else 2 * (p.K / p.group + p.V))
    moved += 4.0 * p.BH * p.K * p.V * (int(p.initial_state) + int(p.final_state))
    passes = segments = states = 0.0
    if SEG:
        passes = 2.0 if backward else 1.0
        segments = -(-longest // SEG)
        rows = max(rows, every / SEG + rows / 2) if uneven else rows * segments
        mean, longest = every / max(1.0, rows), min(longest, SEG)
        mean = mean if uneven else longest
        states = passes * 16.0 * rows * p.K * p.V
    steps, second = -(-mean // max(1, BT)), p.device.bandwidth * 1e-6
    return Work(
        p.device.units, rows * columns * slices, launches * steps, launches, launches * -(-longest // max(1, BT)) * uneven,
        rows * columns * bool(passes), passes * steps, passes * segments, moved / second,
        states / second,
    )  # fmt: skip


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
    device = n.lead + busy ** (1 / OVERLAP) + passes + n.scan * w.segments + w.states / n.memory
    return (n.host**OVERLAP + device**OVERLAP) ** (1 / OVERLAP)


# -- costs -------------------------------------------------------------------------------------------------------------------


def _triton(variant: str, p: Problem, config: Any, direction: Direction) -> float:
    s = shape(p, config, direction.backward)
    return 1e-6 * float(micros(work(p, config, direction.backward), constants().numbers(variant, p, s)))


sweep_cost, chunk_cost, recurrent_cost = (functools.partial(_triton, f"{name}_triton") for name in ("sweep", "chunk", "recurrent"))


def states_cost(p: Problem, config: Any, direction: Direction) -> float:
    """Bytes at half the bandwidth until it is fitted: states are written and read once, tensors read again for them."""
    passes, states = (10, 5) if direction.backward else (4, 2)
    wide = passes * p.V + (2 if direction.backward else 1) * 2 * p.K / p.group
    moved = item_bytes(p) * tokens(p) * (wide + states * p.K * p.V / config.BT)
    waves = max(1.0, tokens(p) / config.BT / config.HEADS / (2 * p.device.units))
    return UNTRIED * (moved / (0.5 * p.device.bandwidth) * -(-waves // 1) / waves + (10 if direction.backward else 5) * 1e-5)


def parallel_cost(p: Problem, config: Any, direction: Direction) -> float:
    """Launches, and waves of blocks that each wait for memory a few times; untimed so far."""
    launches = 3 if direction.backward else 1
    waves = -(-p.BH // config.HEADS // p.device.units)
    return UNTRIED * launches * (2.5e-5 + waves * (config.tokens / 64) * (8e-6 + 2e-6 * config.HEADS))


def gluon_cost(p: Problem, config: Any, direction: Direction) -> float:
    """As the sweep in Triton with descriptors, and a little more until it is fitted: it is tried, and not taken unmeasured."""
    return 1.1 * sweep_cost(p, SweepConfig(64, 64, 4, config.stages, split=True, tma=True), direction)


def torch_cost(p: Problem, config: Any, direction: Direction) -> float:
    every, sweeps = tokens(p), 3 if direction.backward else 1
    steps = p.T / config.C + (p.N if p.packed else 0)
    states = every / config.C + p.BH
    return torch_seconds(
        p.device,
        flops=sweeps * every * 4 * (p.K * p.V + config.C * (p.K + p.V) / 2),
        bytes_moved=sweeps * 4 * 6 * (every * (p.K + p.V + config.C) + states * p.K * p.V),
        operations=30 * sweeps + 8 * sweeps * steps,
    )


def reference_cost(p: Problem, config: Any, direction: Direction) -> float:
    steps = max(1, p.T) * (4 if direction.backward else 1)
    return torch_seconds(p.device, flops=steps * p.BH * 6 * p.K * p.V, bytes_moved=steps * p.BH * 24 * p.K * p.V, operations=12 * steps)
