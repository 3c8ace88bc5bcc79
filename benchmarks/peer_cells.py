"""What one cell of benchmarks.peers measures: one case with one library, in a process that may die without harm to the others.

Libraries: ours (mode auto), fla (flash-linear-attention's chunk op, or fused_recurrent in decoding) and PyTorch's causal SDPA with
one backend, which computes another function (softmax) of tensors of the same shape.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources

import fla_dispatch as fd
from fla_dispatch.kernels.scalar_decay.cases import Inputs, Sizes, gate_gradient_scale, make_inputs

from .common import eager_ms, graph_ms
from .scalar_decay import OPS

Call = Callable[[Inputs], tuple[torch.Tensor, Any]]
Found = tuple[str, Any]

SDPA = {"sdpa_flash": "FLASH_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION"}
SHORT, TINY = 300, 64  # tokens of the copies that errors and host times are taken on


class Case(NamedTuple):
    """A row: op as benchmarks.scalar_decay labels it, (B, T, H, D), and whether it is a step with states in and out."""

    op: str
    shape: tuple[int, int, int, int]
    decode: bool = False

    @property
    def text(self) -> str:
        return f"{self.op}{' decode' if self.decode else ''} {self.shape}"

    @property
    def state_bytes(self) -> int:
        """Of the float32 states that a step reads and writes."""
        B, _, H, D = self.shape
        return 2 * B * H * D * D * 4


def inputs_of(case: Case, device: str, tokens: int | None = None) -> Inputs:
    """The case's inputs, the same in every process; with tokens, their beginning. Leaves want gradients unless it decodes."""
    B, T, H, D = case.shape
    made = make_inputs(
        case.op.split()[0], Sizes(B, T, H, H, D, D), torch.bfloat16, device, initial_state=case.decode, final_state=case.decode,
        options=OPS[case.op],
    )  # fmt: skip
    if tokens is not None and tokens < T:
        made = made.replaced({name: x[:, :tokens].contiguous() for name, x in made.leaves().items()})
    return made.replaced({name: x.detach().requires_grad_(not case.decode) for name, x in made.leaves().items()})


# ---- libraries ----


def _sdpa(x: Inputs) -> tuple[torch.Tensor, None]:
    q, k, v = (y.transpose(1, 2) for y in x.args[:3])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


def library(name: str, case: Case) -> Call:
    """The call to measure. Raises what importing the library raises."""
    op = case.op.split()[0]
    if name == "ours":
        handle = fd.op(op)
        return lambda x: handle(*x.args, **x.kwargs)
    if name == "fla":
        found = getattr(importlib.import_module(f"fla.ops.{op}"), ("fused_recurrent_" if case.decode else "chunk_") + op)
        return lambda x: found(*x.args, **x.kwargs)
    return _sdpa


def scope(name: str) -> contextlib.AbstractContextManager[Any]:
    """What stays in force around all calls of a library."""
    if name not in SDPA:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, SDPA[name]))


# ---- FLA's autotuners: what it would do at each first call, made to fit into a run ----


def _autotuners() -> list[Autotuner]:
    return [x for x in gc.get_objects() if issubclass(type(x), Autotuner)]  # isinstance would ask proxies for their class


def bench_with(make: Callable[[int], Callable[..., list[float]]]) -> None:
    """Forget what was tuned; the next tuning samples each autotuner's configs with make(how many it has)."""
    for tuner in _autotuners():
        tuner.cache.clear()
        tuner.do_bench = make(len(tuner.configs))


def untuned(configs: int) -> Callable[..., list[float]]:
    """Takes the first config without a launch."""
    return lambda call, quantiles: [1.0] * 3


def compiled(shard: int, shards: int) -> Callable[[int], Callable[..., list[float]]]:
    """Launches every shards-th config once, so that it is compiled; a process for each shard compiles them all."""

    def make(configs: int) -> Callable[..., list[float]]:
        turns = itertools.cycle(range(configs))

        def once(call: Callable[[], None], quantiles: Any) -> list[float]:
            if next(turns) % shards != shard:
                return [2.0] * 3
            call()
            return [1.0] * 3

        return once

    return make


def sampled(configs: int) -> Callable[..., list[float]]:
    """Times each config for 30 ms after 8 (Triton's own: 100 after 25)."""
    return functools.partial(triton.testing.do_bench, warmup=8, rep=30)


# ---- measuring ----


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _samples_ms(run: Callable[[], object], device: str, rep: int) -> tuple[float, int]:
    """Milliseconds of one warm call with its host's time, and of repetition that give at least five samples."""
    for _ in range(3):
        run()
    _sync(device)
    begin = time.perf_counter()
    run()
    _sync(device)
    once = 1e3 * (time.perf_counter() - begin)
    return once, max(rep, round(5.5 * once))


def _peak_mib(call: Callable[[], object], device: str) -> float | None:
    """MiB that a call needs at its worst beyond what was there before, its results among them."""
    if device != "cuda":
        return None
    gc.collect()
    _sync(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    _sync(device)
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def host_us(call: Callable[[], object], device: str, calls: int, rounds: int = 5) -> float:
    """Microseconds to issue a call, without waiting for what it issues."""
    times = []
    for _ in range(rounds):
        _sync(device)
        begin = time.perf_counter_ns()
        for _ in range(calls):
            call()
        times.append((time.perf_counter_ns() - begin) / calls / 1e3)
    _sync(device)
    return statistics.median(times)


def _forward(call: Call, x: Inputs) -> Callable[[], object]:
    plain = x.replaced({name: y.detach() for name, y in x.leaves().items()})

    def run() -> object:
        with torch.no_grad():
            return call(plain)

    return run


def _both(call: Call, x: Inputs) -> Callable[[], object]:
    leaves = [y for name, y in x.leaves().items() if y.requires_grad]
    do = torch.randn_like(x.args[2])
    return lambda: torch.autograd.grad(call(x)[0], leaves, do)


def errors(call: Call, case: Case, device: str, backward: bool) -> dict[str, float]:
    """Relative errors against the reference in float64: a call on the first tokens, of which the first two rows are compared."""
    x = inputs_of(case, device, SHORT)
    wide = x.replaced({name: y.detach()[:2].double().requires_grad_(backward) for name, y in x.leaves().items()})
    do = torch.randn(x.args[2].shape, generator=torch.Generator(device).manual_seed(1), device=device).to(x.args[2].dtype)
    outs = []
    reference = fd.op(case.op.split()[0], mode="reference")
    for function, given in ((call, x), (lambda y: reference(*y.args, **y.kwargs), wide)):
        with torch.set_grad_enabled(backward):
            o, state = function(given)
        found = {"o": o, "state": state} if case.decode else {"o": o}
        if backward:
            grads = torch.autograd.grad(o, list(given.leaves().values()), do[: o.shape[0]].to(o.dtype))
            found |= {f"d{name}": dx for name, dx in zip(given.leaves(), grads, strict=True)}
        outs.append({name: y.detach()[:2].double() for name, y in found.items()})
    got, want = outs
    scales = {name: y.norm().item() for name, y in want.items()}
    if "dg" in want:
        scales["dg"] = gate_gradient_scale(want["dg"], wide.args[0].detach(), want["dq"])
    return {name: (got[name] - y).norm().item() / scales[name] for name, y in want.items()}


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:400]


def measure(name: str, case: Case, device: str, rep: int) -> Iterator[Found]:
    """(what, value) as soon as each is known; what failed comes as ("problem", {what: message})."""
    try:
        call = library(name, case)
    except Exception as error:  # a peer that is not here is a result too
        yield "problem", {"all": f"{'missing' if isinstance(error, ImportError) else 'failed'}: {describe(error)}"}
        return
    if name == "ours":
        yield "ran", ran(case, device)
    with scope(name):
        x, tiny = inputs_of(case, device), inputs_of(case, device, TINY)
        if name in SDPA:  # q, k and v alone, whatever op the shape is of
            x, tiny = Inputs(x.args[:3], {}), Inputs(tiny.args[:3], {})
        makers = {"forward": _forward} if case.decode else {"forward": _forward, "both": _both}
        if name == "fla":
            bench_with(untuned)  # a refusal shows before anything is tuned
        for direction, make in list(makers.items()):
            try:
                with contextlib.suppress(OutOfResources):  # of the config that was tried, not of the call
                    make(call, x)()
            except Exception as error:  # whatever a peer raises is its cell's result
                del makers[direction]
                yield "problem", {direction: f"refused: {describe(error)}"}
                still_there(device)
        if name == "fla":
            bench_with(sampled)  # from here on tuned, at exactly this shape
        for direction, make in makers.items():
            try:
                run = make(call, x)
                once, enough = _samples_ms(run, device, rep)
                yield f"{direction}_ms", eager_ms(run, enough) if device == "cuda" else once
                yield f"{direction}_host_us", host_us(make(call, tiny), device, 50 if direction == "forward" else 20)
                if direction == "both":
                    yield "both_peak_mib", _peak_mib(run, device)
                    yield "gradients_mib", sum(y.numel() * y.element_size() for y in x.leaves().values()) / 2**20
                if device == "cuda":
                    yield f"{direction}_graph_ms", graph_ms(run, enough)
            except Exception as error:  # what was measured before it stays
                yield "problem", {direction: f"failed: {describe(error)}"}
                still_there(device)
        del x, tiny
        if name not in SDPA and makers:
            try:
                yield "errors", errors(call, case, device, "both" in makers)
            except Exception as error:  # the times stay
                yield "problem", {"errors": f"failed: {describe(error)}"}
                still_there(device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def ran(case: Case, device: str) -> dict[str, Any]:
    """What ours chooses for a case."""
    x = inputs_of(case, device)
    with torch.set_grad_enabled(not case.decode):
        explained = fd.op(case.op.split()[0]).explain(*x.args, **x.kwargs)
    found = {"forward": explained.forward, "backward": None if case.decode else explained.backward}
    return {direction: None if pair is None else [pair[0], str(pair[1])] for direction, pair in found.items()}


def still_there(device: str) -> None:
    """Raise if an error has left the device unusable for this process."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.zeros(1, device=device).add_(1).item()


def compile_case(name: str, case: Case, shard: int, shards: int, device: str) -> None:
    """Fill Triton's cache with what a cell will launch; T is no constant of FLA's kernels, so that a short one does."""
    if name == "fla" and not case.decode:
        case = case._replace(shape=(case.shape[0], min(case.shape[1], 512), *case.shape[2:]))
    call = library(name, case)
    if name == "fla":
        bench_with(compiled(shard, shards))
    for tokens in (None,) if name == "fla" else (None, SHORT, TINY):
        x = inputs_of(case, device, tokens)
        _forward(call, x)()
        if not case.decode:
            _both(call, x)()
    _sync(device)
