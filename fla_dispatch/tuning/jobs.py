"""What a worker does: compile, prove and time candidates that are named, and say before each which one it is.

Events of `prove` and `time`: ("begin", i), ("end", i, Verdict); of `time` also ("skip", i) for a candidate that is estimated to
be hopeless, and at the end ("times", {i: Timing}, {i: peak bytes}). ("late", names) says which kernels were compiled on the way,
which the crew should have done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import registry
from ..problem import Problem
from ..registry import Recurrence
from . import timing
from .precompile import CompileJob, compiler, launches
from .proof import Prover, Verdict, module_of, synchronize
from .records import Status

Emit = Callable[[Any], None]

#: A candidate is not even sampled when it is estimated to take this many times as long as the fastest one measured.
HOPELESS = 4.0

_NO_MEMORY = {"OutOfMemoryError", "MemoryError"}
_NOT_COMPILED = {"CompilationError", "CompileTimeAssertionFailure", "PTXASError", "OutOfResources", "UnsupportedLanguageConstruct"}


class Entry(NamedTuple):
    """A candidate of one direction: number, variant and config, and the estimated seconds (inf where there is none)."""

    number: int
    variant: str
    config: Any
    backward: bool
    estimate: float = float("inf")


def classify(error: BaseException) -> tuple[Status, str]:
    """The status that an exception amounts to, and its text in one line."""
    names = {c.__name__ for c in type(error).__mro__}
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    if names & _NO_MEMORY:
        return "oom", text
    if names & _NOT_COMPILED or _in_compiler(error):
        return "compile_error", text
    return "crash", text


def _in_compiler(error: BaseException) -> bool:
    """Whether Triton's compiler raised it: its passes raise plain RuntimeErrors."""
    trace = error.__traceback__
    found = False
    while trace is not None:
        found = found or str(trace.tb_frame.f_globals.get("__name__", "")).startswith("triton.compiler")
        trace = trace.tb_next
    return found


class Jobs:
    """The jobs of one process, and what it keeps between them."""

    def __init__(self, *, isolated: bool = False) -> None:
        self.isolated = isolated
        self._provers: dict[tuple[str, torch.device], Prover] = {}
        self._clocks: dict[tuple[torch.device, str], timing.Clock] = {}
        self._compiling: str | None = None
        self._late: list[str] | None = None

    def run(self, function: str, arguments: dict[str, Any], emit: Emit) -> None:
        """Run a job; raises what it raises, `worker.Broken` when the device's context is lost."""
        table: dict[str, Callable[..., None]] = {"compile": self.compile, "prove": self.prove, "time": self.time}
        table[function](emit, **arguments)
        if self._late:
            emit(("late", self._late))
            self._late = []

    def count_compilations(self) -> None:
        """From now on say how many kernels were compiled, once Triton is here; for a process of its own."""
        from triton import knobs

        def listen(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
            if not cache_hit and self._late is not None:
                self._late.append(getattr(getattr(src, "fn", None), "__name__", "?"))

        self._late = []
        knobs.compilation.listener = listen

    def compile(self, emit: Emit, job: CompileJob, arch: str) -> None:
        """Compile one launch; the event is its bytes of shared memory."""
        room = compiler(registry.get_recurrence(job.site.recurrence))
        if self._compiling != arch:
            room.compile_for(arch)
            self._compiling = arch
        emit(room.compile_launch(launches(job.site)[job.position]))

    def prove(self, emit: Emit, recurrence: str, device: torch.device, proof_key: Problem, entries: list[Entry]) -> None:
        """Prove candidates of one proof key."""
        if self.isolated and device.type != "cpu" and self._late is None:
            self.count_compilations()
        found = registry.get_recurrence(recurrence)
        prover = self._provers.setdefault((recurrence, device), Prover(found, device))
        synchronize(device)  # a device that does not answer is no candidate's fault
        for e in entries:
            emit(("begin", e.number))
            attempt = _Attempt(device)
            with attempt:
                verdict = prover.prove(found.variant(e.variant), e.config, proof_key, backward=e.backward)
            if not attempt.failed(emit, e.number):
                emit(("end", e.number, verdict))
        prover.forget()
        _release(device, always=True)  # other provers and the timing of large keys want the memory

    def time(
        self,
        emit: Emit,
        recurrence: str,
        device: torch.device,
        key: Problem,
        regime: str,
        entries: list[Entry],
        source: Entry | None,
        always: frozenset[int],
        plan: timing.Plan,
    ) -> None:
        """Time candidates of both directions on one set of inputs.

        Backward's residuals come from the fastest forward of this job, or from `source` where it has none.
        """
        found = registry.get_recurrence(recurrence)
        workload = found.workload
        assert workload is not None
        clock = self._clocks.get((device, regime))
        if clock is None:
            clock = self._clocks[device, regime] = timing.clock(device, regime)
        with torch.no_grad():
            tensors, options = workload.make(key, device, 0)
            for backward in (False, True):
                chosen = [e for e in entries if e.backward == backward]
                if not chosen or (backward and source is None):
                    continue
                calls = (
                    backward_calls(found, source, tensors, options, chosen) if backward else forward_calls(found, tensors, options, chosen)
                )
                race = Race(emit, device, clock, regime, {e.number: e for e in chosen})
                samples = timing.race(calls, race.take, plan, always)
                if samples and not backward:
                    source = race.entries[min((min(s), i) for i, s in samples.items())[1]]
                emit(("times", {i: timing.summarise(s) for i, s in samples.items() if s}, race.peaks))
                del calls
        del tensors
        _release(device)


def forward_calls(r: Recurrence, tensors: Any, options: Any, entries: list[Entry]) -> dict[int, timing.Call]:
    """What is updated in place goes on being updated from one sample to the next: a room's inputs keep that finite."""

    def call(e: Entry) -> timing.Call:
        module = module_of(r.variant(e.variant))
        return lambda: module.forward(e.config, tensors, options)

    return {e.number: call(e) for e in entries}


def backward_calls(r: Recurrence, source: Entry | None, tensors: Any, options: Any, entries: list[Entry]) -> dict[int, timing.Call]:
    assert source is not None
    outputs = r.outputs(*module_of(r.variant(source.variant)).forward(source.config, tensors, options))
    residuals = r.residuals(tensors, outputs, options)
    carried = outputs[: len(r.output_grads._fields)]
    grads = r.output_grads(*[None if x.dim() == 1 and x.numel() == 0 else torch.randn_like(x) for x in carried])
    wanted = tuple(getattr(tensors, name) is not None for name in r.differentiable)

    def call(e: Entry) -> timing.Call:
        module = module_of(r.variant(e.variant))
        return lambda: module.backward(e.config, residuals, grads, options, wanted)

    return {e.number: call(e) for e in entries}


class _Attempt:
    """Runs a candidate's code: an exception becomes a verdict, and `failed` finds out whether the device survived."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.verdict: Verdict | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            return False
        if not isinstance(error, Exception):
            return False
        self.verdict = Verdict(*classify(error))
        error.__traceback__ = None  # its frames hold the candidate's tensors
        return True

    def failed(self, emit: Emit, number: int) -> bool:
        """Whether there is a verdict, which is emitted; raises worker.Broken after it when nothing more runs on the device.

        A lost device is a crash, wherever its error showed: loading the next kernel raises it inside Triton's compiler.
        """
        if self.verdict is None:
            return False
        lost = None if self.device.type == "cpu" else self._lost()
        emit(("end", number, self.verdict if lost is None else self.verdict._replace(status="crash")))
        if lost is not None:
            from .worker import Broken

            raise Broken(lost)
        _release(self.device, always=True)
        return True

    def _lost(self) -> str | None:
        """The error of a device that nothing more runs on."""
        try:
            synchronize(self.device)
            torch.zeros(1, device=self.device).item()
        except Exception as error:  # any error here means that the context is lost, whatever its type
            return f"{type(error).__name__}: {error}"
        return None


class Race:
    """Takes the samples of a race: the first of a contender after a warm-up, and none of one that is hopeless."""

    def __init__(self, emit: Emit, device: torch.device, clock: timing.Clock, regime: str, entries: dict[int, Entry]) -> None:
        self.emit, self.device, self.clock, self.regime, self.entries = emit, device, clock, regime, entries
        self.peaks: dict[int, int] = {}
        self._ready: dict[int, timing.Call] = {}
        self._best = float("inf")
        self._reach = 0.0  # the estimate of the fastest contender: estimates may all be too high

    def take(self, number: int, call: timing.Call) -> float | None:
        entry = self.entries[number]
        if number not in self._ready and HOPELESS * max(self._best, self._reach) < entry.estimate < float("inf"):
            self.emit(("skip", number))
            return None
        self.emit(("begin", number))
        attempt = _Attempt(self.device)
        seconds = 0.0
        with attempt:
            if number not in self._ready:
                self._warm(number, call)
            seconds = self.clock.sample(self._ready[number])
        if attempt.failed(self.emit, number):
            return None
        if seconds < self._best:
            self._best, self._reach = seconds, entry.estimate if entry.estimate < float("inf") else 0.0
        return seconds

    def _warm(self, number: int, call: timing.Call) -> None:
        gpu = self.device.type == "cuda"
        before = 0
        call()
        synchronize(self.device)
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            call()
            self.peaks[number] = torch.cuda.max_memory_allocated(self.device) - before
        self._ready[number] = timing.captured(call, self.device) if self.regime == "graph" else call


def _release(device: torch.device, *, always: bool = False) -> None:
    """Give cached memory back before it crowds out the next key's inputs."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if always or free < total // 3:
            torch.cuda.empty_cache()
