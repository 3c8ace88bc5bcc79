"""The generated matrix op x variant x case: its parameters and its checks, shared by the CPU, interpreter and GPU tests.

Every check takes (op, variant, case, device) and raises AssertionError. Variants come from the registry, so a new variant
is tested by existing. A variant that must refuse a case is skipped with its reasons; one without a backward is checked
without gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rooms import SCALAR_DECAY, Room, Tensors, main, per_token, room_of

import fla_dispatch as fd
from fla_dispatch import registry
from fla_dispatch.requirements import Refusal

Case = Any  #: of a room's cases.py, as Inputs is
Inputs = Any

#: The oracle is the loop up to this length, and above it the chunked form in float64 (equal to rounding: test_reference).
LOOP_UP_TO = 200


# -- parameters --------------------------------------------------------------------------------------------------------------


def variants(language: str | None = None) -> list[str]:
    """Variants of scalar_decay, all or those of one language (`triton`, `torch`)."""
    return SCALAR_DECAY.variants(language)


def pairs(tag: str, chosen: list[str], only: Callable[[Case], bool] = lambda case: True, room: Room = SCALAR_DECAY) -> list[Any]:
    """pytest parameters (variant, case) for a tag."""
    return [pytest.param(v, c, id=f"{v}-{c.id}") for c in room.cases.select(tag) if only(c) for v in chosen]


def has(*tags: str) -> Callable[[Case], bool]:
    """Whether a case has one of these tags."""
    return lambda case: bool(case.tags & set(tags))


def refusals(variant: str, op: str, inputs: Inputs, *, grad: bool) -> tuple[Refusal, ...]:
    """Why a variant, named by a person, cannot run this call."""
    low = registry.get_op(op).contract(*inputs.args, **inputs.kwargs)
    recurrence = registry.get_recurrence(low.recurrence)
    tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
    problem = dataclasses.replace(recurrence.problem(tensors, low.options, grad), forced=True)
    return recurrence.variant(variant).static_refusals(problem)


def trainable(variant: str, op: str, inputs: Inputs) -> bool:
    """Whether the variant runs this call with gradients; skips the test if it cannot run it at all."""
    if variant == "auto":
        return True
    against = refusals(variant, op, inputs, grad=False)
    if against:
        pytest.skip("; ".join(r.text() for r in against))
    return not refusals(variant, op, inputs, grad=True)


# -- running -----------------------------------------------------------------------------------------------------------------


def flat(result: tuple[Any, ...]) -> Tensors:
    """(o, state) as named tensors."""
    o, state = result
    if state is None:
        return {"o": o}
    return {"o": o, "state": state} if isinstance(state, torch.Tensor) else {"o": o, "state": state[0], "state.z": state[1]}


def output_grads(outputs: Tensors, seed: int) -> Tensors:
    """A gradient for each output, in its dtype; the same for one seed and shape."""
    found = {}
    for i, (name, x) in enumerate(outputs.items()):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        found[name] = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
    return found


def differentiate(
    function: Callable[[Inputs], Tensors], inputs: Inputs, grads: Tensors | None, *, seed: int = 1, complete: bool = True
) -> tuple[Tensors, Tensors]:
    """Outputs, and the gradient of every floating-point leaf (views stay views: detach keeps strides).

    complete: every output must depend on the leaves and every leaf get a gradient; else zeros stand in.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.leaves().items()}
    outputs = function(inputs.replaced(leaves))
    grads = output_grads(outputs, seed) if grads is None else grads
    weights = {name: grads[name].to(x.dtype) for name, x in outputs.items()}
    reached = [name for name, x in outputs.items() if x.requires_grad]
    assert not complete or reached == list(outputs), f"only {reached} have a gradient"
    found = torch.autograd.grad(
        [outputs[name] for name in reached], list(leaves.values()), [weights[name] for name in reached],
        allow_unused=True, materialize_grads=not complete,
    )  # fmt: skip
    missing = [name for name, x in zip(leaves, found, strict=True) if x is None]
    assert not missing, f"no gradient for {missing}"
    return {name: x.detach() for name, x in outputs.items()}, dict(zip(leaves, found, strict=True))


def runner(op: str, variant: str) -> Callable[[Inputs], Tensors]:
    handle = fd.op(op, mode=variant)
    return lambda inputs: flat(handle(*inputs.args, **inputs.kwargs))


def execute(op: str, variant: str, inputs: Inputs, *, grad: bool, grads: Tensors | None = None) -> tuple[Tensors, Tensors]:
    """Outputs and gradients (none without grad) of a variant."""
    if grad:
        return differentiate(runner(op, variant), inputs, grads)
    with torch.no_grad():
        return runner(op, variant)(inputs), {}


def oracle(op: str, inputs: Inputs, *, grad: bool, used: str | None = None) -> tuple[Tensors, Tensors, Tensors]:
    """Outputs, gradients and output gradients in float64 by autograd, from the very values that the variants get.

    used: the one output that the loss depends on (default: all).
    """
    wide = inputs.replaced({name: x.double() for name, x in inputs.leaves().items()})
    contract, room = registry.get_op(op).contract, room_of(op)
    short = inputs.args[0].shape[1] <= LOOP_UP_TO
    module, config = (room.reference, None) if short else (room.chunk_torch, room.configs.TorchConfig(64))

    def run(call: Inputs) -> Tensors:
        low = contract(*call.args, **call.kwargs)
        out = module.forward(config, low.tensors if low.prepare is None else low.prepare(low.tensors), low.options)
        return flat(low.finish(out) if low.finish is not None else (out.o, out.state if low.options.final_state else None))

    with torch.no_grad():
        plain = run(wide)
    dtypes = {name: inputs.leaves()[main(op)[0] if op == "mamba2" else "v"].dtype if name == "o" else torch.float32 for name in plain}
    grads = {name: x.to(dtypes[name]) for name, x in output_grads({n: plain[n].to(dtypes[n]) for n in plain}, 1).items()}
    if not grad:
        return plain, {}, grads
    run_used = run if used is None else lambda call: {used: run(call)[used]}
    outputs, found = differentiate(run_used, wide, {name: x.double() for name, x in grads.items()}, complete=False)
    return outputs, found, grads


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty and its relatives give with NaN, so that an output that is not written shows."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

        return made

    patch = pytest.MonkeyPatch()
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_empty_strided"))):
        for name in names:
            patch.setattr(owner, name, poison(getattr(owner, name)))
    try:
        yield
    finally:
        patch.undo()


# -- judging -----------------------------------------------------------------------------------------------------------------


def gradient_scales(op: str, inputs: Inputs, grads: Tensors) -> dict[str, float]:
    """What errors of gate gradients are relative to (others: the gradient's own norm)."""
    found: dict[str, float] = room_of(op).cases.gradient_scales(op, inputs, grads)
    return found


def distance(x: torch.Tensor, want: torch.Tensor, scale: float | None = None) -> float:
    """|x - want| / scale, scale = |want| by default; infinite for NaN.

    The scale has a floor: kernels clamp a gate of -inf at -80, so what is zero in the reference may be exp(-80) = 2e-35.
    """
    if want.numel() == 0:
        return 0.0
    error = (x.double() - want.double()).norm().item()
    scale = want.double().norm().item() if scale is None else scale
    return float("inf") if error != error else error / max(scale, 1e-25) if error else 0.0


def judge(
    found: Tensors,
    want: Tensors,
    case: Case,
    *,
    prefix: str = "",
    scales: dict[str, float] | None = None,
    slack: float = 1,
) -> None:
    """Every tensor is within its tolerance; the message lists all that are not."""
    assert found.keys() == want.keys()
    bad, tolerance = [], room_of(case.op).cases.tolerance
    for name, x in found.items():
        assert x.shape == want[name].shape, f"{prefix}{name}: shape {list(x.shape)}, expected {list(want[name].shape)}"
        error, bound = distance(x, want[name], (scales or {}).get(name)), slack * tolerance(case.dtype, prefix + name)
        if not error <= bound:
            bad.append(f"{prefix}{name}: error {error:.2e} > {bound:.2e}")
    assert not bad, "; ".join(bad)


def same(found: Tensors, want: Tensors, what: str) -> None:
    """Bitwise equal."""
    different = [name for name, x in found.items() if not torch.equal(x, want[name])]
    assert not different, f"{what}: {different} differ"


# -- checks ------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def oracle_of(case: Case, device: str, grad: bool) -> tuple[Tensors, Tensors, Tensors]:
    """The oracle of a case, kept while its variants are tested one after the other."""
    return oracle(case.op, case.make(device), grad=grad)


def check_values(variant: str, case: Case, device: str) -> None:
    """Outputs and every gradient, from NaN-poisoned memory, against float64; dtypes and layout as promised."""
    inputs = case.make(device)
    grad = trainable(variant, case.op, inputs)
    outputs, gradients, grads = oracle_of(case, device, grad)
    with poisoned():
        found, found_grads = execute(case.op, variant, inputs, grad=grad, grads=grads)
    leaves = inputs.leaves()
    assert found["o"].dtype == case.dtype
    assert all(x.dtype == torch.float32 for name, x in found.items() if name != "o")
    assert all(x.is_contiguous() for x in found.values())
    assert all(x.dtype == leaves[name].dtype for name, x in found_grads.items())
    judge(found, outputs, case)
    judge(found_grads, gradients, case, prefix="d", scales=gradient_scales(case.op, inputs, gradients) if grad else None)


def _cut(inputs: Inputs, T: int, begin: int, end: int | None) -> Tensors:
    """The leaves with entries per token, from token `begin` up to token `end`."""
    leaves = inputs.leaves()
    return {name: leaves[name][:, begin * n : None if end is None else end * n] for name, n in per_token(inputs, T).items()}


def check_partial_gradients(variant: str, case: Case, device: str) -> None:
    """Gradients when one output is not used, and when one leaf alone wants its gradient (then the same bits as with all)."""
    inputs = case.make(device)
    if not trainable(variant, case.op, inputs):
        pytest.skip("the variant has no backward")
    run = runner(case.op, variant)
    outputs, every, grads = oracle(case.op, inputs, grad=True)
    scales = gradient_scales(case.op, inputs, every)
    for name in outputs if len(outputs) > 1 else ():
        _, want, _ = oracle(case.op, inputs, grad=True, used=name)
        _, found = differentiate(lambda call, name=name: {name: run(call)[name]}, inputs, grads, complete=False)
        judge(found, want, case, prefix="d", scales=scales)
    _, together = execute(case.op, variant, inputs, grad=True, grads=grads)
    for name, leaf in inputs.leaves().items():
        alone = leaf.detach().requires_grad_()
        found = run(inputs.replaced({name: alone}))
        reached = [n for n, x in found.items() if x.requires_grad]
        (gradient,) = torch.autograd.grad([found[n] for n in reached], [alone], [grads[n] for n in reached])
        same({name: gradient}, together, "the gradient of one leaf alone and with the others")


def check_halves(variant: str, case: Case, device: str) -> None:
    """A sequence in two calls, the state carried over, equals one call: outputs, final state, and gradients through both."""
    inputs = case.make(device)
    grad = trainable(variant, case.op, inputs)
    T, cut = case.sizes.T, case.sizes.T // 2 - 4
    run = runner(case.op, variant)

    def in_two(call: Inputs) -> Tensors:
        first = call.replaced(_cut(call, T, 0, cut))
        a = run(first._replace(kwargs={**first.kwargs, "output_final_state": True}))
        second = call.replaced(_cut(call, T, cut, None))
        carried = (a["state"], a["state.z"]) if "state.z" in a else a["state"]
        b = run(second._replace(kwargs={**second.kwargs, "initial_state": carried}))
        return {**b, "o": torch.cat([a["o"], b["o"]], 1)}

    outputs, gradients, grads = oracle(case.op, inputs, grad=grad)
    if grad:
        found, found_grads = differentiate(in_two, inputs, grads)
        judge(found_grads, gradients, case, prefix="d", scales=gradient_scales(case.op, inputs, gradients))
    else:
        found = in_two(inputs)
    judge(found, outputs, case)


def check_pack(variant: str, case: Case, device: str) -> None:
    """A pack equals its sequences one by one; bare cu_seqlens (int32, int64) equal SeqInfo bitwise."""
    inputs = case.make(device)
    grad = trainable(variant, case.op, inputs)
    assert case.lengths is not None
    T, lengths, run = case.sizes.T, case.lengths, runner(case.op, variant)
    ends = [0, *itertools.accumulate(lengths)]
    _, _, grads = oracle(case.op, inputs, grad=False)

    def one_by_one(call: Inputs) -> Tensors:
        leaves, parts = call.leaves(), []
        for n, (begin, end) in enumerate(itertools.pairwise(ends)):
            states = {name: leaves[name][n : n + 1] for name in leaves if name.startswith("initial_state")}
            single = call.replaced({**_cut(call, T, begin, end), **states})
            parts.append(run(single._replace(kwargs={k: x for k, x in single.kwargs.items() if k != "cu_seqlens"})))
        return {name: torch.cat([p[name] for p in parts], 1 if name == "o" else 0) for name in parts[0]}

    whole, whole_grads = execute(case.op, variant, inputs, grad=grad, grads=grads)
    if grad:
        single, single_grads = differentiate(one_by_one, inputs, grads)
        scales = gradient_scales(case.op, inputs, single_grads)
        judge(whole_grads, single_grads, case, prefix="d", scales=scales, slack=2)
    else:
        with torch.no_grad():
            single = one_by_one(inputs)
    judge(whole, single, case, slack=2)
    info = inputs.kwargs["cu_seqlens"]
    for dtype in (torch.int32, torch.int64):
        bare = inputs._replace(kwargs={**inputs.kwargs, "cu_seqlens": info.cu_seqlens.to(dtype)})
        found, found_grads = execute(case.op, variant, bare, grad=grad, grads=grads)
        same(found, whole, f"bare {dtype} cu_seqlens")
        same(found_grads, whole_grads, f"gradients with bare {dtype} cu_seqlens")


def check_repeat(variant: str, case: Case, device: str, runs: int = 2) -> None:
    """The same call gives the same bits."""
    inputs = case.make(device)
    grad = trainable(variant, case.op, inputs)
    first, first_grads = execute(case.op, variant, inputs, grad=grad)
    for _ in range(runs - 1):
        again, again_grads = execute(case.op, variant, inputs, grad=grad)
        same(again, first, "outputs of two runs")
        same(again_grads, first_grads, "gradients of two runs")


def check_causal(variant: str, case: Case, device: str) -> None:
    """Changing token t leaves outputs before t, and other sequences, bitwise equal; outputs from t on change."""
    inputs = case.make(device)
    trainable(variant, case.op, inputs)
    T = case.sizes.T
    lengths = case.lengths or (T,)
    longest = max(range(len(lengths)), key=lambda n: lengths[n])
    begin = sum(lengths[:longest])
    end = begin + lengths[longest]
    before, _ = execute(case.op, variant, inputs, grad=False)
    for t in sorted({begin, begin + 1, begin + (end - begin) // 2, end - 1}):
        edits = {}
        for name, n in per_token(inputs, T).items():
            edits[name] = inputs.leaves()[name].clone()
            edits[name][:, t * n : (t + 1) * n] -= 0.75  # also of gates: they stay below zero
        after, _ = execute(case.op, variant, inputs.replaced(edits), grad=False)
        assert torch.equal(after["o"][:, :t], before["o"][:, :t]), f"token {t} changes outputs before it"
        assert not torch.equal(after["o"][:, t], before["o"][:, t]), f"token {t} does not change its own output"
        assert torch.equal(after["o"][:, end:], before["o"][:, end:]), f"token {t} changes later sequences"
        for name in ("state", "state.z"):
            if name in before and case.lengths:
                others = [n for n in range(len(lengths)) if n != longest]
                assert torch.equal(after[name][others], before[name][others]), f"token {t} changes the {name} of other sequences"


def check_autocast(variant: str, case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Under autocast float32 inputs give what inputs cast by hand give, bitwise, and gradients in the inputs' own dtype."""
    inputs = case.make(device)
    assert case.dtype == torch.float32
    by_hand = inputs.replaced({name: x.to(dtype) for name, x in inputs.leaves().items() if name in main(case.op)})
    grad = trainable(variant, case.op, by_hand)
    want, want_grads = execute(case.op, variant, by_hand, grad=grad)
    grads = output_grads(want, 1)
    with torch.autocast(device.split(":")[0], dtype):
        found, found_grads = execute(case.op, variant, inputs, grad=grad, grads=grads)
    assert found["o"].dtype == dtype
    same(found, want, "outputs under autocast")
    leaves = inputs.leaves()
    assert all(x.dtype == leaves[name].dtype for name, x in found_grads.items())
    same({name: x.to(want_grads[name].dtype) for name, x in found_grads.items()}, want_grads, "gradients under autocast")


def cases_refused_by_all(tag: str, chosen: list[str], device: str, *, grad: bool, room: Room = SCALAR_DECAY) -> list[str]:
    """Cases with a tag that none of these variants would run, with the reasons."""
    found = []
    for case in room.cases.select(tag):
        inputs = case.make(device)
        reasons = {v: refusals(v, case.op, inputs, grad=grad) for v in chosen}
        if all(reasons.values()):
            found.append(f"{case.id}: " + " | ".join(f"{v}: {r[0].text()}" for v, r in reasons.items()))
    return found
