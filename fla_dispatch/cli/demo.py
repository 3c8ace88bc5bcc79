"""`fla-dispatch demo`: every op at a realistic size on the device that is here.

For each op: the variant chosen for the forward alone and for training, and why; the relative error of the output and of
every gradient against the reference; the time beside the reference's. The reference runs once on the same values in
float64. Its backward keeps one state per token, so gradients are compared over as many tokens as fit `reference_bytes`;
that length is printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import registry
from ..device import default_device, profile
from ..dispatch import op as handle_of
from ..errors import CallError, UnknownNameError
from . import output

#: Batch, tokens, heads and head dim; ops with other size names take them by the meaning in `SAME`.
GPU_SIZES = {"B": 4, "T": 4096, "H": 16, "D": 128}
CPU_SIZES = {"B": 1, "T": 2048, "H": 8, "D": 64}

#: Size names of ops -> what they mean. Sizes that are not named keep the op's default (groups, layer numbers).
SAME = {"B": "B", "T": "T", "H": "H", "HV": "H", "K": "D", "V": "D", "P": "D", "N": "D"}

#: Relative error (norm of the difference over the norm) above which the demo fails: a few roundings of the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

#: How much more the gradients of gates, and of what gates are made of, may err: they are sums of differences of large terms
#: that cancel over the length (docs/numerics.md). The tests judge them against those terms instead.
GATE_SLACK = 10


@dataclasses.dataclass(frozen=True)
class Result:
    """What one op's run showed; times in seconds."""

    op: str
    sizes: dict[str, int]
    dtype: str
    forward_variant: str
    training_variants: tuple[str, str]
    tier: str
    reason: str
    forward_seconds: float
    reference_forward_seconds: float
    output_error: float
    training_seconds: float
    gradient_tokens: int
    reference_training_seconds: float
    training_seconds_same_tokens: float
    gradient_errors: dict[str, float]
    gate_gradient_errors: dict[str, float]
    ok: bool


def run(device_text: str | None, only: list[str], as_json: bool) -> int:
    device = default_device() if device_text is None else _device(device_text)
    names = [registry.get_op(name).name for name in only] or [name for name in registry.op_names() if _trains(name)]
    for name in names:
        if not _trains(name):
            fix = f"name {name.removesuffix('_step')}, or measure it with fla-dispatch bench --op {name}"
            raise CallError(f"demo: --op {name}: expected an op with gradients, got one without. To fix: {fix}.")
    on_gpu = device.type != "cpu"
    sizes, dtype = (GPU_SIZES, torch.bfloat16) if on_gpu else (CPU_SIZES, torch.float32)
    results = []
    with output.progress() as bar:
        task = bar.add_task("demo", total=len(names))
        for name in names:

            def step(what: str, name: str = name) -> None:
                bar.update(task, description=f"{name}: {what}")

            results.append(run_op(name, sizes, dtype, device, step))
            bar.advance(task)
    failed = [r.op for r in results if not r.ok]
    here = profile(device)
    if as_json:
        records = [dataclasses.asdict(r) for r in results]
        output.print_json({"device": {"arch": here.arch, "name": here.name}, "torch": torch.__version__, "ok": not failed, "ops": records})
    else:
        _print(results, f"{here.name} ({here.arch})")
        if failed:
            output.console().print(f"error above tolerance: {', '.join(failed)}", style="bold red")
    return 1 if failed else 0


def _trains(name: str) -> bool:
    return bool(registry.get_recurrence(registry.get_op(name).recurrence).differentiable)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own wording of "no such device"; without CUDA it asserts
        first = str(error).split("\n")[0]
        raise CallError(f"demo: --device {text}: {first}. To fix: name a device that is here, for example cpu.") from None
    if device.type == "meta":
        raise UnknownNameError("demo: --device meta computes nothing. To fix: name a device that is here, for example cpu.")
    return device


def run_op(name: str, base: dict[str, int], dtype: torch.dtype, device: torch.device, step: Callable[[str], None]) -> Result:
    """Run, compare and time one op."""
    op = registry.get_op(name)
    sizes = {size: base[SAME[size]] if size in SAME else default for size, default in op.sizes.items()}
    chosen, reference = handle_of(name), handle_of(name, mode="reference")

    step("forward")
    args, kwargs = op.example(sizes, dtype, device)
    forward = chosen.explain(*args, **kwargs)
    with torch.no_grad():
        out = _tensor(chosen(*args, **kwargs))
        forward_seconds = timed(lambda: chosen(*args, **kwargs), device)
        step(f"reference forward ({sizes['T']} steps)")
        wide = _float64(args), _float64(kwargs)
        with one_thread():
            started = _now(device)
            expected = _tensor(reference(*wide[0], **wide[1]))
            reference_forward = _now(device) - started
    output_error = relative_error(out, expected)
    del out, expected, wide

    step("forward and backward")
    args, kwargs = op.example(sizes, dtype, device, requires_grad=True)
    training = chosen.explain(*args, **kwargs)
    training_seconds = timed(lambda: gradients(chosen, args, kwargs), device)

    tokens = gradient_tokens(sizes, base["D"], reference_bytes(device))
    step(f"reference forward and backward ({tokens} steps)")
    args, kwargs = op.example({**sizes, "T": tokens}, dtype, device, requires_grad=True)
    same_tokens = timed(lambda: gradients(chosen, args, kwargs), device)
    found = gradients(chosen, args, kwargs)
    wide = _float64(args), _float64(kwargs)
    with one_thread():
        started = _now(device)
        wanted = gradients(reference, *wide)
        reference_training = _now(device) - started
    names = list(inspect.signature(op.contract).parameters)
    errors: dict[str, float] = {}
    gates: dict[str, float] = {}
    for role, expected in wanted.items():
        kind = errors if expected.dim() == 4 else gates
        kind[names[int(role)] if role.isdecimal() else role] = relative_error(found[role], expected)

    limit = TOLERANCE[dtype]
    return Result(
        op=name,
        sizes=sizes,
        dtype=str(dtype).removeprefix("torch."),
        forward_variant=_name(forward.forward),
        training_variants=(_name(training.forward), _name(training.backward)),
        tier=forward.tier,
        reason=forward.reason,
        forward_seconds=forward_seconds,
        reference_forward_seconds=reference_forward,
        output_error=output_error,
        training_seconds=training_seconds,
        gradient_tokens=tokens,
        reference_training_seconds=reference_training,
        training_seconds_same_tokens=same_tokens,
        gradient_errors=errors,
        gate_gradient_errors=gates,
        ok=max(output_error, *errors.values()) <= limit and max(gates.values(), default=0.0) <= limit * GATE_SLACK,
    )


def _name(chosen: tuple[str, dict[str, Any]] | None) -> str:
    return "-" if chosen is None else chosen[0]


def reference_bytes(device: torch.device) -> int:
    """What the states that the reference's backward keeps may take: 128 MiB on a CPU, at most 4 GiB on a GPU."""
    memory = profile(device).memory_bytes
    return min(4 << 30, memory // 8) if memory else 1 << 27


def gradient_tokens(sizes: dict[str, int], dim: int, room: int) -> int:
    """Tokens for which one float64 state each fits into `room` bytes: all, or a power of two."""
    per_token = 8 * sizes["B"] * (sizes.get("HV") or sizes["H"]) * dim * dim
    fit = max(1, room // per_token)
    return sizes["T"] if sizes["T"] <= fit else 1 << (fit.bit_length() - 1)


def gradients(handle: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of all floating inputs for a fixed gradient of the output, by position or name."""
    inputs = {str(i): x for i, x in enumerate(args)} | kwargs
    leaves = {role: x for role, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    out = _tensor(handle(*args, **kwargs))
    seed = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype).expand_as(out)
    found = torch.autograd.grad(out, list(leaves.values()), seed, allow_unused=True)
    return {role: grad for role, grad in zip(leaves, found, strict=True) if grad is not None}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, both as float64 vectors; NaN counts as infinitely wrong."""
    a, b = found.detach().double(), expected.detach().double()
    error = float((a - b).norm() / b.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def timed(call: Callable[[], object], device: torch.device, budget: float = 1.0) -> float:
    """Seconds of the fastest of three to twenty calls within the budget, after one warm call: others may hold the cores."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 20):
        started = _now(device)
        call()
        times.append(_now(device) - started)
    return min(times)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one CPU thread: the reference's steps are too small to share, and waiting for a second thread costs more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _now(device: torch.device) -> float:
    """The clock, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    return time.perf_counter()


def _tensor(result: Any) -> torch.Tensor:
    """The output of an op's result (o, state)."""
    return result[0] if isinstance(result, tuple) else result


def _float64(values: Any) -> Any:
    """The same arguments with floating tensors widened to float64, as fresh leaves."""
    if isinstance(values, torch.Tensor):
        if not values.is_floating_point():
            return values
        return values.detach().double().requires_grad_(values.requires_grad)
    if isinstance(values, dict):
        return {name: _float64(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_float64(value) for value in values)
    return values


def _print(results: list[Result], where: str) -> None:
    out = output.console()
    s = output.seconds
    for r in results:
        worst = f"{max(r.gradient_errors.values()):.1e}"
        if r.gate_gradient_errors:
            worst += f", gates {max(r.gate_gradient_errors.values()):.1e}"
        pair = " + ".join(dict.fromkeys(r.training_variants))
        rows = [
            ["forward", r.forward_variant, str(r.sizes["T"]), s(r.forward_seconds), s(r.reference_forward_seconds), f"{r.output_error:.1e}"]
        ]
        if r.gradient_tokens != r.sizes["T"]:
            rows.append(["forward + backward", pair, str(r.sizes["T"]), s(r.training_seconds), "", ""])
        times = [s(r.training_seconds_same_tokens), s(r.reference_training_seconds)]
        rows.append(["forward + backward", pair, str(r.gradient_tokens), *times, worst])
        sizes = " ".join(f"{name}={n}" for name, n in r.sizes.items())
        out.print(f"{r.op}  {sizes}  {r.dtype}  on {where}", style="bold")
        out.print(f"{r.forward_variant}: {r.reason} [{r.tier}]")
        columns = ["", "variant", "tokens", "time", "reference (float64)", "relative error"]
        out.print(output.table("", columns, rows, styles=[None if r.ok else "red"] * len(rows)))
