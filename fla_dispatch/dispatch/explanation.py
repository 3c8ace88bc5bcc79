"""explain: the tiers run on fake tensors, with the verdict on every variant; nothing is computed and no GPU is needed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .. import registry, settings
from ..device import DeviceProfile, default_device, hypothetical, known_archs, profile
from ..errors import CallError, UnknownNameError, nearest
from ..problem import Problem
from ..sequences import SeqInfo
from .function import needs_grad
from .handle import OpHandle, op
from .tiers import Candidate, Decision, Source, Verdict, decide, seconds_text, weigh

if TYPE_CHECKING:
    from ..requirements import Refusal


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant in an explanation. status: chosen | eligible | refused; seconds are estimates for the whole call with `config`.

    measured: by direction, the seconds of the variant's fastest config in the record that was taken; failed: its candidates that
    did not pass, `fingerprint: status`.
    """

    name: str
    status: str
    forward_seconds: float | None
    backward_seconds: float | None
    config: dict[str, Any]
    refusals: tuple[Refusal, ...]
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "refusals": [r.to_dict() for r in self.refusals]}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a call runs what it runs. forward and backward: (variant, config), None where nothing runs.

    provenance: per direction where the choice comes from: tier, record, proof, differences, and what was passed over.
    """

    op: str
    recurrence: str
    key: str
    device: str
    forward: tuple[str, dict[str, Any]] | None
    backward: tuple[str, dict[str, Any]] | None
    tier: str  # of the forward, as in tiers.py; or refused
    reason: str
    rows: tuple[Row, ...]
    provenance: tuple[dict[str, Any], ...] = ()

    def why_not(self, variant: str) -> str:
        """Why a variant was not chosen, in one line per reason. Raises UnknownNameError."""
        for row in self.rows:
            if row.name == variant:
                break
        else:
            raise UnknownNameError(f"{self.op}: no variant named {variant!r}; {nearest(variant, [r.name for r in self.rows])}.")
        if row.refusals:
            return "\n".join(f"{variant} is refused: {r.text()}" for r in row.refusals)
        if row.status == "chosen":
            return f"{variant} is chosen: {self.reason}"
        if variant == "reference":
            return "reference may run, but is taken only when it is named or everything else is refused"
        if self.tier == "forced":
            return f"{variant} may run, but {self.reason}"
        if self.tier not in ("estimate", "reference"):
            return f"{variant} may run, but by {self.tier}: {self.reason}"
        return f"{variant} may run, but is estimated slower: {_times(row)}; {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data that json can write."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for direction in ("forward", "backward"):
            ran = fields[direction]
            fields[direction] = None if ran is None else {"variant": ran[0], "config": ran[1]}
        return {**fields, "rows": [row.to_dict() for row in self.rows]}

    def to_text(self) -> str:
        """A few lines for people: the choice, the reason, and a line per variant."""
        lines = [f"{self.op} ({self.recurrence}) on {self.device}", f"  key: {self.key}"]
        for direction, ran in (("forward", self.forward), ("backward", self.backward)):
            if ran is not None:
                lines.append(f"  {direction}: {ran[0]} {_config(ran[1])}".rstrip())
        lines.append(f"  why: {self.tier}: {self.reason}")
        for p in self.provenance:
            lines += [f"    {p['direction']}: {note}" for note in p["notes"]]
            lines += [f"    {p['direction']}: nearest record {text}" for text in p["nearest"]]
        width = max(len(row.name) for row in self.rows)
        for row in self.rows:
            head = f"  {row.name:<{width}}  {row.status:<8}  "
            lines.append(head + _times(row) if not row.refusals else head + row.refusals[0].text())
            lines += [" " * len(head) + r.text() for r in row.refusals[1:]]
            lines += [" " * len(head) + f"failed here: {text}" for text in row.failed]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()


def _config(config: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{k}: {v}" for k, v in config.items()) + "}" if config else ""


def _times(row: Row) -> str:
    parts = [("forward", row.forward_seconds), ("backward", row.backward_seconds)]
    text = ", ".join(f"{name} {seconds_text(s)}" for name, s in parts if s is not None)
    measured = ", ".join(f"{name} {seconds_text(s)}" for name, s in row.measured.items())
    return f"{f'measured {measured}; estimated ' if measured else ''}{text} {_config(row.config)}".rstrip()


def _ran(candidate: Candidate | None) -> tuple[str, dict[str, Any]] | None:
    return None if candidate is None else (candidate.variant.name, {} if candidate.config is None else candidate.config._asdict())


def _row(verdict: Verdict, decision: Decision) -> Row:
    name = verdict.variant.name
    chosen = [c.variant.name for c in (decision.forward, decision.backward) if c is not None]
    status = "refused" if verdict.refusals else "chosen" if name in chosen else "eligible"
    forward, backward = verdict.forward, verdict.backward
    measured: dict[str, float] = {}
    failed: list[str] = []
    for source in decision.sources:
        outcomes = [o for o in source.record.outcomes if o.variant == name] if source.record is not None else []
        times = [o.timing.median_us * 1e-6 for o in outcomes if o.status == "ok" and o.timing is not None]
        if times and source.measured:
            measured[source.direction] = min(times)
        failed += [f"{source.direction} {o.fingerprint}: {o.status} {o.detail}".rstrip() for o in outcomes if o.status != "ok"]
    return Row(
        name, status, forward.seconds if forward else None, backward.seconds if backward else None,
        {} if forward is None or forward.config is None else forward.config._asdict(), verdict.refusals or verdict.partial,
        measured, tuple(failed),
    )  # fmt: skip


def _provenance(decision: Decision, source: Source) -> dict[str, Any]:
    """Where the choice of one direction comes from, as plain data; without a record of this Key the nearest ones field by field."""
    record, outcome = source.record, source.outcome
    found: dict[str, Any] = {
        "direction": source.direction, "tier": source.tier, "reason": source.reason, "path": source.path,
        "differences": list(source.differences), "notes": list(source.notes), "record": None, "nearest": [],
    }  # fmt: skip
    if record is not None and outcome is not None:
        found["record"] = {
            "key": record.key, "origin": record.origin, "created": record.created, "versions": record.versions,
            "certificate": None if outcome.certificate is None else outcome.certificate.model_dump(mode="json"),
            "timing": None if outcome.timing is None else outcome.timing.model_dump(mode="json"),
            "outcomes": len(record.outcomes),
        }  # fmt: skip
    else:
        from .evidence import Evidence

        found["nearest"] = Evidence(decision.key, source.direction).nearest_lines()
    return found


def _explain(handle: OpHandle, problem: Problem) -> Explanation:
    recurrence = registry.get_recurrence(problem.recurrence)
    choice = handle.choice()
    decision = decide(recurrence, problem, choice)
    seen = {v.variant.name: v for v in decision.considered}
    verdicts = [seen.get(v.name) or weigh(v, decision.key) for v in recurrence.variants]
    refused = decision.forward is None
    locked = bool(decision.blocked)
    reason = f"{decision.reason} by {handle.source()}" if choice is not None else decision.reason
    if refused:
        reason += (
            "; so the call raises LockError" if locked else "; every variant that this leaves is refused, so the call raises RefusedError"
        )
    elif decision.missed and choice is None and settings.current.miss != "estimate" and recurrence.workload is not None:
        does = "measures it first" if settings.current.miss == "tune" else "raises MissError"
        reason += f"; nothing was measured for this key, so under miss={settings.current.miss} the call {does}"
    d = problem.device
    return Explanation(
        op=handle.name,
        recurrence=problem.recurrence,
        key=decision.key.text(),
        device=f"{d.name} ({d.arch})" + ("" if d.present else ", which is not here"),
        forward=_ran(decision.forward),
        backward=_ran(decision.backward),
        tier="refused" if refused else decision.tier,
        reason=reason,
        rows=tuple(_row(v, decision) for v in verdicts),
        provenance=tuple(_provenance(decision, source) for source in decision.sources),
    )


def _faked(x: Any, mode: FakeTensorMode) -> Any:
    """Stand-ins without data for the tensors in an argument: same shape, strides, dtype, device and requires_grad."""
    if isinstance(x, torch.Tensor):
        return mode.from_tensor(x, static_shapes=True)
    if isinstance(x, SeqInfo):
        return SeqInfo(*(_faked(y, mode) for y in (x.cu_seqlens, x.host, x.segments)))
    if isinstance(x, tuple):
        parts = [_faked(y, mode) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def _problem(handle: OpHandle, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool | None) -> Problem:
    """The problem of a call, from its contract and `prepare` alone; grad None means what the tensors say."""
    _, tensors, options, prepare, _ = handle.contract(*args, **kwargs)
    if prepare is not None:
        tensors = prepare(tensors)
    recurrence = registry.get_recurrence(registry.get_op(handle.name).recurrence)
    if grad is None:
        grad = torch.is_grad_enabled() and needs_grad(handle.bridge, tensors)
    problem = recurrence.problem(tensors, options, grad)
    return dataclasses.replace(problem, deterministic=torch.are_deterministic_algorithms_enabled())


def explain_call(handle: OpHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    """OpHandle.explain: for the tensors of a call, which may be fake or meta themselves."""
    if any(isinstance(x, FakeTensor) for x in (*args, *kwargs.values())):
        return _explain(handle, _problem(handle, args, kwargs, None))
    with FakeTensorMode() as mode:
        args = tuple(_faked(x, mode) for x in args)
        return _explain(handle, _problem(handle, args, {name: _faked(x, mode) for name, x in kwargs.items()}, None))


def _device_profile(device: str | None) -> DeviceProfile:
    if device is None:
        return profile(default_device())
    if device in known_archs() and device != "cpu":
        return hypothetical(device)
    try:
        found = torch.device(device)
        if found.type in ("cpu", "cuda", "xpu"):
            return profile(found)
    except (RuntimeError, AssertionError) as error:  # torch's own wording of "no such device"; without CUDA it asserts
        if device.split(":")[0] in ("cuda", "xpu"):
            raise UnknownNameError(f"device {device!r}: {error}. To fix: name an architecture, {', '.join(known_archs())}.") from error
    return hypothetical(device)  # raises, with the names it knows


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    names = ["bfloat16", "float16", "float32", "float64"]
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None) if dtype in names else None
    if found is None:
        raise UnknownNameError(f"dtype: unknown dtype {dtype!r}; {nearest(str(dtype), names)}.")
    return found


def explain(
    name: str,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "bfloat16",
    mode: str = "auto",
    packed: bool = False,
    grad: bool = False,
    initial_state: bool = False,
    output_final_state: bool = False,
    **sizes: int,
) -> Explanation:
    """What would run for a call described by sizes (`fla-dispatch ops` lists each op's), here or on a device that is not.

    device: an architecture (`sm90`, `gfx942`), a torch device that is here, or None for the one that is. packed: the B rows
    of length T form one pack of B sequences. Raises UnknownNameError (a ValueError) for an unknown name of any kind.
    """
    handle = op(name, mode)
    found = registry.get_op(name)
    for size, value in sizes.items():
        if size not in found.sizes:
            raise UnknownNameError(f"{name}: no size named {size!r}; {nearest(size, list(found.sizes))}.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CallError(
                f"{name}: size {size}: expected an integer >= 0, got {value!r}. To fix: pass for example {size}={found.sizes[size]}."
            )
    whole = {**found.sizes, **sizes}
    lengths = [whole.get("T", 1)] * whole["B"] if packed else None
    args, kwargs = found.example(
        whole, _dtype(dtype), "meta", lengths=lengths, initial_state=initial_state, output_final_state=output_final_state
    )
    target = _device_profile(device)
    problem = _problem(handle, args, kwargs, grad)
    return _explain(handle, dataclasses.replace(problem, device=target, interpret=settings.current.interpret and target.present))
