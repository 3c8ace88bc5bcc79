"""What one cell of benchmarks.peers measures: one case with one library, in a process that may die without harm to the others.

Libraries: ours (mode auto), ours_step (in decoding: the op that updates a pool of states in place), fla (flash-linear-attention's chunk
op, or fused_recurrent in decoding), flash_qla (FlashQLA's chunk op, gated_delta with head dims of 128 alone) and PyTorch's causal SDPA
with one backend, which computes another function (softmax) of tensors of the same shape. All get the same tensors: keys of unit length,
weights and log decays as the recurrence takes them, in float32, no transform inside.
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
from fla_dispatch.kernels._shared.step_cases import Inputs as StepInputs
from fla_dispatch.kernels._shared.step_cases import make_slots
from fla_dispatch.kernels._shared.token_cases import Sizes
from fla_dispatch.kernels.scalar_decay.cases import Inputs as Plain

from .bounds import floor_bytes, training_bytes
from .common import cases_of, eager_ms, graph_ms, op_of, options_of, room_of

Inputs = Any  # of a call, as its room has them: args, kwargs, leaves(), replaced()
Call = Callable[[Inputs], Any]
Found = tuple[str, Any]

SDPA = {"sdpa_flash": "FLASH_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION"}
FLA_NAMES = {"delta": "delta_rule", "gated_delta": "gated_delta_rule"}  # where they are not ours
SHORT, TINY = 300, 64  # tokens of the copies that errors and host times are taken on


class Case(NamedTuple):
    """A row: a label of an op (`common.op_of`), (B, T, H, D), and whether it is a step with states in and out.

    state: K where it is not D, as mamba2's state size N; B and C of mamba2 have one group.
    """

    op: str
    shape: tuple[int, int, int, int]
    decode: bool = False
    state: int = 0

    @property
    def text(self) -> str:
        return f"{self.op}{' decode' if self.decode else ''} {self.shape}{f' state {self.state}' if self.state else ''}"

    @property
    def sizes(self) -> Sizes:
        B, T, H, D = self.shape
        return Sizes(B, T, 1 if self.op == "mamba2" else H, H, self.state or D, D)

    @property
    def peers(self) -> tuple[str, ...]:
        """Libraries beside ours that have the op; those of the step in place after what computes the same."""
        if self.op == "mamba2":
            return ()
        if self.decode:
            return ("fla", "ours_step")
        if room_of(self.op).name == "scalar_decay":
            return ("fla", *SDPA)
        return ("fla", "flash_qla") if self.op == "gated_delta" and self.shape[3] == 128 else ("fla",)

    @property
    def promises(self) -> dict[str, Any]:
        """Bytes that the row is judged by: of the states, or the fewest that move and the most that training holds (MiB)."""
        if self.decode:
            return {"state_bytes": self.state_bytes}
        op, x = op_of(self.op), inputs_of(self, "meta")
        held = {name: size / 2**20 for name, size in training_bytes(op, x).items()}
        return {"floor_bytes": floor_bytes(op, x), "bound_mib": sum(held.values()), "bound_parts_mib": held}

    @property
    def state_bytes(self) -> int:
        """Of the float32 states that a step reads and writes."""
        B, _, H, D = self.shape
        return 2 * B * H * D * D * 4


def inputs_of(case: Case, device: str, tokens: int | None = None) -> Inputs:
    """The case's inputs, the same in every process; with tokens, their beginning."""
    made = cases_of(case.op).make_inputs(
        op_of(case.op), case.sizes, torch.bfloat16, device, initial_state=case.decode, final_state=case.decode, options=options_of(case.op)
    )
    if tokens is not None and tokens < case.sizes.T:
        made = made.replaced({name: x[:, :tokens].contiguous() for name, x in made.leaves().items() if in_rows(x)})
    return made


def in_rows(x: torch.Tensor) -> bool:
    """Whether the first dimension counts rows: parameters (A, D and the bias of mamba2) have heads alone."""
    return x.dim() >= 3


def training(x: Inputs) -> Inputs:
    """The same inputs, wanting gradients."""
    return x.replaced({name: y.detach().requires_grad_() for name, y in x.leaves().items()})


def stepping(x: Inputs) -> StepInputs:
    """A decoding call's inputs as its step takes them: no dimension of T, the states in a pool about twice as large, by slots."""
    state = x.kwargs["initial_state"]
    slots, S = make_slots(state.shape[0], False, state.device)
    pool = state.new_zeros((S, *state.shape[1:]))
    pool[slots] = state
    return StepInputs((*(y[:, 0].contiguous() for y in x.args), pool), {"slots": slots})


# ---- libraries ----


def _sdpa(x: Inputs) -> tuple[torch.Tensor, None]:
    q, k, v = (y.transpose(1, 2) for y in x.args[:3])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


def op_name(name: str, case: Case) -> str:
    """Our op that a cell of ours runs."""
    return op_of(case.op) + ("_step" if name == "ours_step" else "")


def library(name: str, case: Case) -> Call:
    """The call to measure. Raises what importing the library raises."""
    if name in ("ours", "ours_step"):
        handle = fd.op(op_name(name, case))
        return lambda x: handle(*x.args, **x.kwargs)
    if name in SDPA:
        return _sdpa
    op = FLA_NAMES.get(op_of(case.op), op_of(case.op))
    module = importlib.import_module(f"fla.ops.{op}" if name == "fla" else name)
    found = getattr(module, ("fused_recurrent_" if case.decode else "chunk_") + op)
    like = inputs_of(case, "meta")
    names = list(like.leaves())[3 : len(like.args)]  # by name what follows q, k and v: its order differs between functions
    return lambda x: found(*x.args[:3], **dict(zip(names, x.args[3:], strict=True)), **x.kwargs)


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
    """To be called under torch.no_grad(), which costs a microsecond of a step and is the caller's loop's."""
    return lambda: call(x)


def _both(call: Call, x: Inputs) -> Callable[[], object]:
    x = training(x)
    leaves = list(x.leaves().values())
    do = torch.randn_like(x.leaves()["x" if "x" in x.leaves() else "v"])
    return lambda: torch.autograd.grad(call(x)[0], leaves, do)


def errors(name: str, call: Call, case: Case, device: str, backward: bool) -> dict[str, float]:
    """Relative errors against the reference in float64: a call on the first tokens, of which the first two rows are compared.

    do is zero in the other rows, so that gradients of parameters, which are sums over rows, are those of two rows as well.
    """
    x = inputs_of(case, device, SHORT)
    wide = x.replaced({leaf: (y[:2] if in_rows(y) else y).double() for leaf, y in x.leaves().items()})
    reference = fd.op(op_of(case.op), mode="reference")
    outs: list[dict[str, torch.Tensor]] = []
    for function, given in ((lambda y: reference(*y.args, **y.kwargs), wide), (call, x)):
        given = training(given) if backward else given
        with torch.set_grad_enabled(backward):
            if name == "ours_step" and function is call:
                given = stepping(given)
                o = function(given)[:, None]  # a step returns its output alone
                state = given.args[-1][given.kwargs["slots"]]
            else:
                o, state = function(given)
        found = {"o": o, "state": state} if case.decode else {"o": o}
        if backward:
            do = torch.zeros_like(o)
            do[:2] = torch.randn(o[:2].shape, generator=torch.Generator(device).manual_seed(1), device=device).to(torch.bfloat16)
            grads = torch.autograd.grad(o, list(given.leaves().values()), do)
            found |= {f"d{leaf}": dx for leaf, dx in zip(given.leaves(), grads, strict=True)}
        outs.append({what: (y[:2] if in_rows(y) else y).detach().double() for what, y in found.items()})
    want, got = outs
    scales = {what: y.norm().item() for what, y in want.items()}
    if backward:
        grads = {what[1:]: y for what, y in want.items() if what.startswith("d")}
        scales |= {f"d{leaf}": scale for leaf, scale in cases_of(case.op).gradient_scales(op_of(case.op), wide, grads).items()}
    return {what: (got[what] - y).norm().item() / scales[what] for what, y in want.items()}


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:400]


def measure(name: str, case: Case, device: str, rep: int) -> Iterator[Found]:
    """(what, value) as soon as each is known; what failed comes as ("problem", {what: message})."""
    try:
        call = library(name, case)
    except Exception as error:  # a peer that is not here is a result too
        yield "problem", {"all": f"{'missing' if isinstance(error, ImportError) else 'failed'}: {describe(error)}"}
        return
    if name in ("ours", "ours_step"):
        yield "ran", ran(name, case, device)
    with scope(name):
        x, tiny = inputs_of(case, device), inputs_of(case, device, TINY)
        if name in SDPA:  # q, k and v alone, whatever op the shape is of
            x, tiny = Plain(x.args[:3], {}), Plain(tiny.args[:3], {})
        if name == "ours_step":
            x = tiny = stepping(x)
        makers = {"forward": _forward} if case.decode else {"forward": _forward, "both": _both}
        if name == "fla":
            bench_with(untuned)  # a refusal shows before anything is tuned
        for direction, make in list(makers.items()):
            try:
                with contextlib.suppress(OutOfResources), grad_of(direction):  # of the config that was tried, not of the call
                    make(call, x)()
            except Exception as error:  # whatever a peer raises is its cell's result
                del makers[direction]
                yield "problem", {direction: f"refused: {describe(error)}"}
                still_there(device)
        if name == "fla":
            bench_with(sampled)  # from here on tuned, at exactly this shape
        for direction, make in makers.items():
            try:
                with grad_of(direction):
                    yield from timed(direction, make(call, x), make(call, tiny), device, rep)
            except Exception as error:  # what was measured before it stays
                yield "problem", {direction: f"failed: {describe(error)}"}
                still_there(device)
        del x, tiny
        if name not in SDPA and makers:
            try:
                yield "errors", errors(name, call, case, device, "both" in makers)
            except Exception as error:  # the times stay
                yield "problem", {"errors": f"failed: {describe(error)}"}
                still_there(device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def grad_of(direction: str) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(direction == "both")


def timed(direction: str, run: Callable[[], object], tiny: Callable[[], object], device: str, rep: int) -> Iterator[Found]:
    """Times of a direction, each under its name; tiny: the same call of few tokens, for the host's time."""
    once, enough = _samples_ms(run, device, rep)
    yield f"{direction}_ms", eager_ms(run, enough) if device == "cuda" else once
    yield f"{direction}_host_us", host_us(tiny, device, 50 if direction == "forward" else 20)
    if direction == "both":
        yield "both_peak_mib", _peak_mib(run, device)
    if device == "cuda":
        yield f"{direction}_graph_ms", graph_ms(run, enough)


def ran(name: str, case: Case, device: str) -> dict[str, Any]:
    """What ours chooses for a case."""
    x = inputs_of(case, device)
    x = stepping(x) if name == "ours_step" else x if case.decode else training(x)
    explained = fd.op(op_name(name, case)).explain(*x.args, **x.kwargs)
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
    for tokens in (None,) if name == "fla" or case.decode else (None, SHORT, TINY):
        x = inputs_of(case, device, tokens)
        with grad_of("forward"):
            _forward(call, stepping(x) if name == "ours_step" else x)()
        if not case.decode:
            _both(call, x)()
    _sync(device)
