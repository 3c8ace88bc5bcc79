"""Remembered calls: they launch exactly what the whole road does, and only where everything that the whole road looks at is equal."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

import fla_dispatch as fd
from benchmarks.stubbed import stubbed
from fla_dispatch import registry, settings
from fla_dispatch.errors import CallError
from fla_dispatch.kernels._shared import tape
from fla_dispatch.kernels._shared.step_cases import Sizes
from fla_dispatch.kernels.delta_step.cases import make_inputs as delta_steps
from fla_dispatch.kernels.scalar_step.cases import make_inputs as scalar_steps

if settings.current.interpret:
    pytest.skip("launches are stubbed, and the interpreter has none", allow_module_level=True)


class Seen(NamedTuple):
    """One launch: the grid, and arguments with addresses for tensors."""

    grid: tuple[int, ...]
    args: tuple[Any, ...]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Seen]]:
    found: list[Seen] = []

    def launched(*given: Any) -> None:
        args = tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given[9:])
        found.append(Seen(given[:3], args))

    monkeypatch.setattr("fla_dispatch.dispatch.memory._memories", {})
    with stubbed(launched):
        yield found


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tape.Tape]:
    """The tapes that were played, in order."""
    found: list[tape.Tape] = []
    plain = tape.Tape.__call__

    def call(self: tape.Tape, given: Any) -> Any:
        result = plain(self, given)
        if result is not None:
            found.append(self)
        return result

    monkeypatch.setattr(tape.Tape, "__call__", call)
    return found


def same_launches(found: list[Seen], expected: list[Seen], known: set[int]) -> None:
    """Launches are equal up to where buffers lie: one address of the one stands for one of the other. known: of given tensors."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.grid == b.grid and len(a.args) == len(b.args)
        for x, y in zip(a.args, b.args, strict=True):
            if x in known or y in known or not (isinstance(x, int) and x > 1 << 32):
                assert x == y or (x != x and y != y)


def addresses(*tensors: Any) -> set[int]:
    return {x.data_ptr() for x in tensors if isinstance(x, torch.Tensor)}


def qkv(B: int = 1, T: int = 70, H: int = 2, D: int = 32, *, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(B, T, H, D, dtype=torch.float16).requires_grad_(grad) for _ in range(3)]


def step(op: str = "retention_step", B: int = 3, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = scalar_steps(op, Sizes(B, 2, 2, 32, 32), torch.bfloat16, "cpu", pool="slots", **options)
    return x.args, x.kwargs


STEPS: dict[str, Callable[[], Any]] = {
    "linear_attn_step": lambda: scalar_steps("linear_attn_step", Sizes(3, 2, 4, 32, 64), torch.bfloat16, "cpu", pool="slots"),
    "linear_attn_step normalized": lambda: scalar_steps(
        "linear_attn_step", Sizes(3, 2, 2, 32, 64), torch.bfloat16, "cpu", pool="none", options=(("normalize", True),)
    ),
    "retention_step": lambda: scalar_steps("retention_step", Sizes(3, 2, 4, 32, 64), torch.bfloat16, "cpu", pool="slots", fused=True),
    "lightning_attn_step": lambda: scalar_steps("lightning_attn_step", Sizes(3, 2, 4, 32, 64), torch.bfloat16, "cpu", pool="slots"),
    "simple_gla_step": lambda: scalar_steps("simple_gla_step", Sizes(1, 2, 4, 32, 64), torch.bfloat16, "cpu", pool="slots"),
    "mamba2_step": lambda: scalar_steps("mamba2_step", Sizes(3, 2, 4, 32, 64), torch.bfloat16, "cpu", pool="slots"),
    "gated_delta_step": lambda: delta_steps(
        "gated_delta_step", Sizes(3, 2, 4, 32, 64), torch.bfloat16, "cpu", pool="slots", fused=True, options=(("raw", True),)
    ),
    "kda_step": lambda: delta_steps("kda_step", Sizes(3, 2, 2, 32, 64), torch.bfloat16, "cpu", pool="none"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_repeated_step_launches_what_the_first_did(name: str, seen: list[Seen], played: list[tape.Tape]) -> None:
    inputs = STEPS[name]()
    handle = fd.op(name.split()[0], mode="step_triton")
    given = [y for x in (*inputs.args, *inputs.kwargs.values()) for y in (x if isinstance(x, tuple) else (x,))]
    runs = []
    with torch.no_grad():
        for _ in range(4):
            seen.clear()
            versions = [x._version for x in inputs.states().values()]
            o = handle(*inputs.args, **inputs.kwargs)
            assert [x._version for x in inputs.states().values()] > versions
            runs.append((list(seen), (o.shape, o.stride(), o.dtype), o))
            assert o.data_ptr() in seen[-1].args
            assert len(seen) == 1
    assert len(played) == 2
    for launches, layout, _ in runs[1:]:
        same_launches(launches, runs[0][0], addresses(*given))
        assert layout == runs[0][1]
    assert len({o.data_ptr() for *_, o in runs}) == 4


CALLS = [
    ("retention", "chunk_triton"), ("simple_gla", "sweep_triton"), ("simple_gla", "recurrent_triton"), ("linear_attn", "chunk_triton"),
    ("delta", "chunk_triton"), ("gated_delta", "chunk_triton"), ("gated_delta", "recurrent_triton"), ("kda", "recurrent_triton"),
]  # fmt: skip


def arguments(op: str, grad: bool) -> list[torch.Tensor]:
    q, k, v = qkv(grad=grad)
    shape = q.shape if op == "kda" else q.shape[:3]
    g, beta = (torch.rand(s).requires_grad_(grad) for s in (shape, q.shape[:3]))
    return [q, k, v, *{"simple_gla": [g], "gated_delta": [g, beta], "kda": [g, beta], "delta": [beta]}.get(op, [])]


@pytest.mark.parametrize(("op", "mode"), CALLS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("final_state", [False, True])
def test_a_repeated_call_launches_what_the_first_did(
    op: str, mode: str, grad: bool, final_state: bool, seen: list[Seen], played: list[tape.Tape]
) -> None:
    handle, args = fd.op(op, mode=mode), arguments(op, grad)
    do = torch.randn_like(args[2])
    runs = []
    for _ in range(4):
        seen.clear()
        o, state = handle(*args, output_final_state=final_state)
        assert (state is not None) is final_state
        layouts = [(x.shape, x.stride(), x.dtype, x.requires_grad) for x in (o, state) if x is not None]
        if grad:
            layouts += [(x.shape, x.stride(), x.dtype) for x in torch.autograd.grad(o, args, do)]
        runs.append((list(seen), layouts))
    for launches, layouts in runs[1:]:
        same_launches(launches, runs[0][0], addresses(*args, do))
        assert layouts == runs[0][1]
    assert len(played) >= 2


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("op", "options"), [("gated_delta", {"use_qk_l2norm": True, "use_beta_sigmoid": True}), ("mamba2", {})])
def test_calls_that_torch_prepares_play_tapes_of_what_is_left(
    op: str, options: dict[str, Any], grad: bool, seen: list[Seen], played: list[tape.Tape]
) -> None:
    handle = fd.op(op, mode="chunk_triton")
    if op == "mamba2":
        found = registry.get_op(op)
        args, options = found.example(
            {**found.sizes, "B": 1, "T": 70, "H": 2, "P": 32, "N": 32}, torch.float16, "cpu", seed=0, requires_grad=grad
        )
    else:
        args = tuple(arguments(op, grad))
    wanted = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    runs = []
    for _ in range(4):
        seen.clear()
        o, _ = handle(*args, **options)
        if grad:
            torch.autograd.grad(o, wanted, torch.ones_like(o), allow_unused=True)
        runs.append((list(seen), (o.shape, o.stride(), o.dtype, o.requires_grad)))
    for launches, layout in runs[1:]:
        same_launches(launches, runs[0][0], set())
        assert layout == runs[0][1]
    assert len(played) >= 2


def test_tensors_elsewhere_are_read_where_they_are(seen: list[Seen], played: list[tape.Tape]) -> None:
    handle = fd.op("retention", mode="chunk_triton")
    for _ in range(3):
        args = qkv()
        seen.clear()
        handle(*args)
        assert addresses(*args) <= {x for one in seen for x in one.args}
    assert len(played) == 1


def test_slices_of_one_tensor_may_move_against_each_other(seen: list[Seen], played: list[tape.Tape]) -> None:
    handle = fd.op("retention", mode="chunk_triton")
    whole = torch.randn(1, 70, 6, 32, dtype=torch.float16)
    parts = [whole[:, :, i : i + 2] for i in (0, 2, 4)]
    for order in ((0, 1, 2), (0, 1, 2), (0, 1, 2), (2, 0, 1)):
        args = [parts[i] for i in order]
        seen.clear()
        handle(*args)
        assert [x for x in seen[-1].args if x in addresses(*parts)] == [x.data_ptr() for x in args]
    assert len(played) == 2


# -- what is not alike -------------------------------------------------------------------------------------------------------


def remembered(*, grad: bool = False) -> tuple[Any, list[torch.Tensor]]:
    """A handle that remembers a call, and its arguments."""
    handle, args = fd.op("retention", mode="chunk_triton"), qkv(grad=grad)
    for _ in range(3):
        handle(*args)
    return handle, args


def unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


OTHERS: dict[str, Callable[[list[torch.Tensor]], tuple[list[Any], dict[str, Any]]]] = {
    "length": lambda x: ([y[:, :60].contiguous() for y in x], {}),
    "rows": lambda x: ([y.view(1, 35, 4, 32) for y in x], {}),
    "strides": lambda x: ([y.transpose(1, 2).contiguous().transpose(1, 2) for y in x], {}),
    "dtype": lambda x: ([y.float() for y in x], {}),
    "address": lambda x: ([unaligned(x[0]), *x[1:]], {}),
    "one tensor twice": lambda x: ([x[0], x[0], x[2]], {}),
    "gradient": lambda x: ([x[0], x[1], x[2].clone().requires_grad_()], {}),
    "parameter": lambda x: ([torch.nn.Parameter(x[0], requires_grad=False), *x[1:]], {}),
    "option": lambda x: (x, {"output_final_state": True}),
    "scale": lambda x: (x, {"scale": 0.25}),
    "state": lambda x: (x, {"initial_state": torch.zeros(1, 2, 32, 32)}),
    "pack": lambda x: (x, {"cu_seqlens": torch.tensor([0, 30, 70], dtype=torch.int32)}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_call_takes_the_whole_road(other: str, seen: list[Seen], played: list[tape.Tape]) -> None:
    handle, args = remembered()
    played.clear()
    args, kwargs = OTHERS[other](args)
    handle(*args, **kwargs)
    assert not played
    handle(*qkv())
    assert len(played) == 1


def test_packs_are_never_remembered(seen: list[Seen], played: list[tape.Tape]) -> None:
    handle, args = fd.op("retention", mode="chunk_triton"), qkv()
    for cu in ([0, 30, 70], [0, 30, 70], [0, 30, 70], [0, 20, 70]):
        handle(*args, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
    assert not played
    with pytest.raises(CallError, match="cu_seqlens"):
        handle(*args, cu_seqlens=torch.tensor([0, 40, 30], dtype=torch.int32))


def test_modes_take_the_whole_road(seen: list[Seen], played: list[tape.Tape]) -> None:
    handle, args = remembered()
    played.clear()
    with torch.inference_mode():
        handle(*args)
    with torch.no_grad():
        handle(*args)
    with torch.autocast("cpu", torch.float16):
        handle(*args)
    with fd.use(retention="recurrent"):
        handle(*args)
    with settings.override(miss="estimate"):
        handle(*args)
    torch.use_deterministic_algorithms(True)
    try:
        handle(*args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not played


@pytest.mark.parametrize(
    "queue",
    [
        tape.Queue(lambda: None, lambda: True, lambda index: 0),  # a graph is being captured
        tape.Queue(lambda: 1, lambda: False, lambda index: 0),  # another device is current
    ],
)
def test_captures_and_other_devices_take_the_whole_road(
    queue: tape.Queue, seen: list[Seen], played: list[tape.Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tape.QUEUES, "cpu", tape.Queue(lambda: queue.device(), lambda: queue.capturing(), lambda index: 0))
    here, queue = queue, tape.QUEUES["cpu"]._replace(device=lambda: None, capturing=lambda: False)
    handle, args = remembered()
    assert len(played) == 1
    queue = here
    handle(*args)
    assert len(played) == 1


def test_hooks_of_launches_are_called(seen: list[Seen], played: list[tape.Tape]) -> None:
    handle, args = remembered()
    played.clear()
    chain = tape._hooks().launch_enter_hook
    told: list[Any] = []
    chain.add(told.append)
    try:
        handle(*args)
    finally:
        chain.remove(told.append)
    assert not played


def test_wrong_calls_raise_as_ever(seen: list[Seen], played: list[tape.Tape]) -> None:
    args, kwargs = step()
    handle = fd.op("retention_step", mode="step_triton")
    with torch.no_grad():
        for _ in range(3):
            handle(*args, **kwargs)
        assert len(played) == 1
        q, k, v, state = args
        for wrong in ((q[:2], k, v, state), (q, k.float(), v, state), (q, k, v, state.transpose(2, 3)), (q, k, None, state)):
            for _ in range(3):
                with pytest.raises(CallError):
                    handle(*wrong, **kwargs)
        with pytest.raises(CallError, match="scale"):
            handle(*args, **kwargs, scale=True)
    for _ in range(3):
        with pytest.raises(CallError, match="gradient of q"):
            handle(q.clone().requires_grad_(), k, v, state, **kwargs)
    assert len(played) == 1


def test_options_that_are_equal_but_of_another_type_are_other_options(seen: list[Seen], played: list[tape.Tape]) -> None:
    args, kwargs = step()
    handle = fd.op("retention_step", mode="step_triton")
    with torch.no_grad():
        for _ in range(3):
            handle(*args, **kwargs, qk_l2norm=True)
        for _ in range(3):
            with pytest.raises(CallError, match="qk_l2norm"):
                handle(*args, **kwargs, qk_l2norm=1)


def test_the_backward_compares_what_comes_back(seen: list[Seen], played: list[tape.Tape]) -> None:
    handle, args = fd.op("retention", mode="chunk_triton"), qkv(grad=True)
    do = torch.randn_like(args[2])
    for _ in range(4):
        torch.autograd.grad(handle(*args)[0], args, do)
    played.clear()
    other = do.transpose(1, 2).contiguous().transpose(1, 2)
    for coming in (other, unaligned(do)):
        torch.autograd.grad(handle(*args)[0], args, coming)
    assert len(played) == 2  # the forwards


def test_nothing_of_a_call_is_kept(seen: list[Seen], played: list[tape.Tape]) -> None:
    handle, args = remembered(grad=True)
    torch.autograd.grad(handle(*args)[0], args, torch.randn_like(args[2]))
    torch.autograd.grad(handle(*args)[0], args, torch.randn_like(args[2]))
    gone = [weakref.ref(x) for x in args]
    del args
    gc.collect()
    assert [x() for x in gone] == [None] * 3
    assert played and handle


def test_a_function_that_computes_with_torch_has_no_tape(seen: list[Seen]) -> None:
    x = torch.randn(4, 4)
    for run, fault in (
        (lambda: (x + 1,), "aten.add"),
        (lambda: (torch.empty(4),), "no launch"),
        (lambda: (x,), "no buffer"),
        (lambda: (torch.empty(4).sum(),), "aten.sum"),
    ):
        with tape.Watch([x]) as watch:
            result = run()
        assert watch.tape(result) is None and fault in watch.fault


def test_a_memory_has_a_bound(seen: list[Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fla_dispatch.dispatch.memory.MOST", 4)
    handle = fd.op("retention", mode="chunk_triton")
    for T in range(1, 20):
        handle(*qkv(T=T))
        assert sum(len(form.calls) for form in handle.memory._forms.values() if form is not None) <= 4


def test_a_bound_handle_plays_tapes(seen: list[Seen], played: list[tape.Tape]) -> None:
    handle, args = fd.op("retention", mode="chunk_triton"), qkv()
    bound = handle.bind(*args)
    runs = []
    for _ in range(4):
        seen.clear()
        bound(*args)
        runs.append(list(seen))
    assert len(played) == 2
    for launches in runs[1:]:
        same_launches(launches, runs[0], addresses(*args))
    with pytest.raises(CallError, match="bound call"):
        bound(*qkv(T=60))
