"""Measuring for people: time, achieved rates and error of each variant at exact sizes, beside what the device can do.

A row is one variant, sizes and direction. Its error is against the float64 oracle on the inputs that are timed; its bytes are each
input read once and each output written once, its operations those of the recurrence's chunk form (backward: three times
forward), so that rates of variants compare, whatever a variant moves or recomputes. Nothing is chosen or remembered here.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .. import registry
from ..device import profile
from ..problem import Problem
from ..registry import Recurrence, Trial
from . import environment, timing
from .jobs import Entry, Race, backward_calls, classify, forward_calls
from .keys import dtype_of
from .proof import Prover, backward_results, forward_results, fresh, module_of

DIRECTIONS = ("forward", "backward")

#: Operations of backward over those of forward, as the flop counter has them.
BACKWARD_FLOPS = 3

#: Variants whose times are within this factor take turns.
ALIKE = 3.0

#: Bytes of the copied tensor and edge of the multiplied matrices whose rates are the ceilings.
COPY_BYTES = {"cpu": 1 << 26, "gpu": 1 << 30}
MATMUL_SIZE = {"cpu": 768, "gpu": 8192}


class Pick(NamedTuple):
    """A variant for one direction of a Key: its config, or why it is refused; chosen: what a call takes by itself."""

    variant: str
    direction: str
    config: Any = None
    refusal: str = ""
    chosen: bool = False


@dataclasses.dataclass
class Row:
    """What one variant showed. status: ok | wrong | refused | oom | compile_error | crash; None where there is no number.

    errors: relative, None where one is not finite; share: of the time that the ceilings allow at best.
    """

    sizes: dict[str, int]
    direction: str
    variant: str
    config: dict[str, Any] | None
    chosen: bool
    status: str = "ok"
    detail: str = ""
    median_us: float | None = None
    min_us: float | None = None
    mad_us: float | None = None
    rounds: int = 0
    bytes: int = 0
    flops: int = 0
    tb_per_s: float | None = None
    tflop_per_s: float | None = None
    share: float | None = None
    peak_bytes: int | None = None
    errors: dict[str, float | None] = dataclasses.field(default_factory=dict)
    tolerances: dict[str, float] = dataclasses.field(default_factory=dict)


class Ceilings(NamedTuple):
    """Measured on this device: bytes (read and written) per second of a large copy, operations per second of a matrix product."""

    copy: float
    matmul: float


def ceilings(device: torch.device, dtype: torch.dtype, samples: int = 7) -> Ceilings:
    """The fastest of some copies, and of some matrix products of this dtype."""
    kind = "cpu" if device.type == "cpu" else "gpu"
    clock = timing.clock(device, "graph")
    source = torch.zeros(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = MATMUL_SIZE[kind]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def fastest(call: timing.Call) -> float:
        call()
        return min(clock.sample(call) for _ in range(samples))

    return Ceilings(2 * source.nbytes / fastest(lambda: target.copy_(source)), 2 * n**3 / fastest(lambda: a @ b))


def measure(
    op: str,
    sizes: Sequence[dict[str, int]],
    dtype: str,
    device: torch.device,
    picks: Callable[[Problem], Iterable[Pick]],
    *,
    grad: bool = False,
    regime: str = "eager",
    seconds: float = 0.5,
    progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> dict[str, Any]:
    """The document of a report, ready for JSON.

    sizes: whole sizes of calls of the op; picks(key): what runs there; seconds: of samples for each size and direction.
    """
    progress("ceilings", 0, len(sizes))
    found = registry.get_op(op)
    recurrence = registry.get_recurrence(found.recurrence)
    top = ceilings(device, dtype_of(dtype))
    clock = timing.clock(device, regime)
    rows: list[Row] = []
    for done, whole in enumerate(sizes):
        progress(" ".join(f"{name}={n}" for name, n in whole.items()), done, len(sizes))
        args, kwargs = found.example(whole, dtype_of(dtype), device)
        with torch.no_grad():
            low = found.contract(*args, **kwargs)
            tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
            del args, kwargs
            here = _Here(recurrence, tensors, low.options, device, grad)
            made = [here.row(pick, whole) for pick in picks(here.problem.key())]
            rows += [row for row, _ in made]
            here.judge(made)
            here.time(made, clock, regime, seconds)
        for row, _ in made:
            _rates(row, top)
    progress("done", len(sizes), len(sizes))
    machine = profile(device)
    return {
        "schema_version": 1,
        "op": op,
        "recurrence": recurrence.name,
        "dtype": dtype,
        "grad": grad,
        "regime": regime,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {"name": machine.name, "arch": machine.arch, "units": machine.units, "memory_bytes": machine.memory_bytes},
        "system": f"{platform.system()} {platform.machine()}",
        "environment": environment.current(device, regime).directory,
        "versions": environment.versions(),
        "ceilings": {"copy_tb_per_s": top.copy * 1e-12, "matmul_tflop_per_s": top.matmul * 1e-12},
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _rates(row: Row, top: Ceilings) -> None:
    if row.median_us is None or row.median_us <= 0:
        return
    seconds = row.median_us * 1e-6
    row.tb_per_s, row.tflop_per_s = row.bytes / seconds * 1e-12, row.flops / seconds * 1e-12
    row.share = max(row.bytes / top.copy, row.flops / top.matmul) / seconds


def _nbytes(tensors: Iterable[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


class _Here:
    """One set of inputs, and what is done with it."""

    def __init__(self, recurrence: Recurrence, tensors: Any, options: Any, device: torch.device, grad: bool) -> None:
        assert recurrence.workload is not None
        self.recurrence, self.tensors, self.options, self.device = recurrence, tensors, options, device
        self.problem = recurrence.problem(tensors, options, grad)
        self.flops = recurrence.flops(tensors, options)
        outputs = recurrence.outputs(
            *recurrence.empty_outputs(recurrence.tensors(*[None if x is None else x.to("meta") for x in tensors]), options)
        )
        carried, wanted = outputs[: len(recurrence.output_grads._fields)], [getattr(tensors, x) for x in recurrence.differentiable]
        given = recurrence.residuals(tensors, outputs, options)
        self.bytes = {
            "forward": _nbytes(tensors) + _nbytes(outputs) + _nbytes(getattr(tensors, name) for name in recurrence.mutates),
            "backward": _nbytes(given[0]) + _nbytes(given[1:]) + _nbytes(carried) + _nbytes(wanted),
        }

    def row(self, pick: Pick, sizes: dict[str, int]) -> tuple[Row, Pick]:
        config = None if pick.config is None else pick.config._asdict()
        row = Row(dict(sizes), pick.direction, pick.variant, config, pick.chosen)
        row.bytes, row.flops = self.bytes[pick.direction], self.flops * (BACKWARD_FLOPS if pick.direction == "backward" else 1)
        if pick.refusal:
            row.status, row.detail = "refused", pick.refusal
        return row, pick

    def judge(self, made: list[tuple[Row, Pick]]) -> None:
        """Errors of every row that may run, against the oracle on these inputs; a row that raises leaves with its status."""
        r, w = self.recurrence, self.recurrence.workload
        assert w is not None
        same = dataclasses.replace(w, make_trial=lambda trial, device, seed: (self.tensors, self.options))
        prover = Prover(dataclasses.replace(r, workload=same), self.device)
        trial = Trial("bench", self.problem, max(1, self.problem.BH // max(1, self.problem.N)))
        for direction in DIRECTIONS:
            rows = [(row, pick) for row, pick in made if row.direction == direction and row.status == "ok"]
            backward, why = direction == "backward", ""
            case = None
            try:
                case = prover.case(trial, backward) if rows else None
            except Exception as error:  # float64 may need more memory than there is: then times have no errors beside them
                why = f"no float64 oracle: {classify(error)[1]}"
            for row, pick in rows:
                if case is None:
                    row.detail = why
                    continue
                run = backward_results if backward else forward_results
                try:
                    errors = prover.errors(
                        run(r, module_of(r.variant(pick.variant)), pick.config, case, fresh(r, self.tensors)), case, backward
                    )  # fmt: skip
                except Exception as error:  # whatever a variant raises is its result
                    row.status, row.detail = classify(error)
                    continue
                row.errors = {name: x if math.isfinite(x) else None for name, x in errors.items()}
                row.tolerances = prover.tolerances(case, errors)
                if any(not x <= row.tolerances[name] for name, x in errors.items()):
                    row.status, row.detail = "wrong", "an error is above its tolerance"

    def time(self, made: list[tuple[Row, Pick]], clock: timing.Clock, regime: str, seconds: float) -> None:
        """Times of every row that runs, interleaved; wrong ones too, since nothing is chosen by them."""
        entries = {
            i: Entry(i, pick.variant, pick.config, row.direction == "backward")
            for i, (row, pick) in enumerate(made)
            if row.status in ("ok", "wrong")
        }
        forwards = [i for i, e in entries.items() if not e.backward]
        source = min(forwards, key=lambda i: (made[i][0].status != "ok", not made[i][0].chosen), default=None)
        plan = timing.Plan(seconds, least=3, most=50, finalists=len(entries), hopeless=ALIKE)
        for direction in DIRECTIONS:
            chosen = [e for e in entries.values() if e.backward == (direction == "backward")]
            if not chosen:
                continue
            if direction == "forward":
                calls = forward_calls(self.recurrence, self.tensors, self.options, chosen)
            elif source is None:
                continue
            else:
                calls = backward_calls(self.recurrence, entries[source], self.tensors, self.options, chosen)

            def told(event: Any) -> None:
                if event[0] == "end":
                    made[event[1]][0].status, made[event[1]][0].detail = event[2].status, event[2].detail

            race = Race(told, self.device, clock, regime, {e.number: e for e in chosen})
            left = calls
            while left:  # those of like speed take turns: beside one a hundred times slower, a launch meets a host whose caches are cold
                found = timing.race(left, race.take, plan)
                settled = {i: s for i, s in found.items() if len(s) >= plan.least} or found
                for i, samples in settled.items():
                    row, t = made[i][0], timing.summarise(samples)
                    row.median_us, row.min_us, row.mad_us, row.rounds = t.median_us, t.min_us, t.mad_us, t.rounds
                    row.peak_bytes = race.peaks.get(i)
                left = {i: left[i] for i in found if i not in settled}
