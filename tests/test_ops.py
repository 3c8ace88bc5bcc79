"""Contracts: what a good call lowers to, and the error of every bad one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fla_dispatch.errors import CallError
from fla_dispatch.kernels.scalar_decay import ops, recurrence
from fla_dispatch.kernels.scalar_decay.cases import GATED, OP_NAMES, Inputs, Sizes, make_inputs
from fla_dispatch.sequences import SeqInfo

SIZES = Sizes(2, 6, 2, 4, 8, 16)
ONE_ROW = Sizes(1, 6, 2, 4, 8, 16)
LENGTHS = (2, 0, 4)
QKV = {op: ("C", "B", "x") if op == "mamba2" else ("q", "k", "v") for op in OP_NAMES}


def contract(op: str) -> Callable[..., Any]:
    return getattr(ops, op)


def make(op: str, sizes: Sizes = SIZES, **changes: Any) -> Inputs:
    return make_inputs(op, sizes, changes.pop("dtype", torch.float32), **changes)


def wrong(op: str, inputs: Inputs, *parts: str, **kwargs: Any) -> None:
    """The call raises, and its message names the op, what was expected, what came and what to do."""
    with pytest.raises(ValueError) as caught:
        low = contract(op)(*inputs.args, **{**inputs.kwargs, **kwargs})
        recurrence.check(low.tensors, low.options)
    text = str(caught.value)
    assert isinstance(caught.value, CallError)
    for part in ("expected ", "got ", "To fix: ", *parts):
        assert part in text, text


def change(inputs: Inputs, **edits: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    leaves = inputs.leaves()
    return inputs.replaced({name: edit(leaves[name]) for name, edit in edits.items()})


each_op = pytest.mark.parametrize("op", OP_NAMES)


@each_op
@pytest.mark.parametrize("role", range(3))
def test_wrong_rank(op: str, role: int) -> None:
    name = QKV[op][role]
    wrong(op, change(make(op), **{name: lambda x: x[0]}), f"{op}: rank of {name}", "unsqueeze(0)")
    wrong(op, change(make(op), **{name: lambda x: x[None]}), f"{op}: rank of {name}")


@each_op
def test_wrong_sizes(op: str) -> None:
    q, k, v = QKV[op]
    wrong(op, change(make(op), **{k: lambda x: x[:, :, :1]}), f"shape of {k}")
    wrong(op, change(make(op), **{k: lambda x: x[..., :-1]}), f"shape of {k}")
    wrong(op, change(make(op), **{v: lambda x: x[:1]}), f"shape of {v}")
    wrong(op, change(make(op), **{v: lambda x: x[:, :-1]}), f"shape of {v}")
    wrong(op, change(make(op), **{v: lambda x: x[:, :, :3]}), "heads", "multiple")
    wrong(op, change(make(op), **{v: lambda x: x[:, :, :0]}), "head sizes")
    wrong(op, change(make(op), **{q: lambda x: x[..., :0], k: lambda x: x[..., :0]}), "head sizes")
    wrong(op, change(make(op), **{q: lambda x: x[:, :, :0], k: lambda x: x[:, :, :0]}), "head sizes")


@each_op
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_not_floating(op: str, dtype: torch.dtype) -> None:
    q, k, v = QKV[op]
    wrong(op, change(make(op), **{name: lambda x: x.to(dtype) for name in (q, k, v)}), f"dtype of {q}", str(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        wrong(op, change(make(op), **{k: lambda x: x.to(dtype)}), f"dtype of {k}", str(dtype))


@each_op
@pytest.mark.parametrize("role", range(3))
def test_unequal_dtypes(op: str, role: int) -> None:
    inputs = change(make(op, dtype=torch.bfloat16), **{QKV[op][role]: lambda x: x.float()})
    wrong(op, inputs, "of one dtype", "autocast")
    with torch.autocast("cpu", torch.bfloat16):
        low = contract(op)(*inputs.args, **inputs.kwargs)
    assert {x.dtype for x in low.tensors[:3]} == {torch.bfloat16}


@each_op
def test_autocast_casts_all_three(op: str) -> None:
    inputs = make(op)
    with torch.autocast("cpu", torch.bfloat16):
        low = contract(op)(*inputs.args, **inputs.kwargs)
    assert [x.dtype for x in low.tensors[:3]] == [torch.bfloat16] * 3
    assert low.tensors.g is None or low.tensors.g.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        low = contract(op)(*make(op, dtype=torch.float64).args, **make(op, dtype=torch.float64).kwargs)
    assert [x.dtype for x in low.tensors[:3]] == [torch.float64] * 3


@each_op
def test_mixed_devices(op: str) -> None:
    for name in (*QKV[op][1:], *(("g",) if op == "simple_gla" else ())):
        wrong(op, change(make(op), **{name: lambda x: x.to("meta")}), f"device of {name}", "meta")
    inputs = make(op, initial_state=True)
    wrong(op, change(inputs, initial_state=lambda x: x.to("meta")), "device of initial_state")
    wrong(op, make(op, ONE_ROW), "device of cu_seqlens", "from_cu_seqlens", cu_seqlens=torch.tensor([0, 6]).to("meta"))
    wrong(op, make(op, ONE_ROW), "device of cu_seqlens", "from_lengths", cu_seqlens=SeqInfo.from_lengths([6], "meta"))
    on_device = make(op, ONE_ROW, device="meta")  # host lengths beside device data
    wrong(op, on_device, "device of cu_seqlens", "SeqInfo.from_cu_seqlens", cu_seqlens=torch.tensor([0, 6]))


@each_op
def test_not_a_tensor(op: str) -> None:
    for i, name in enumerate(("x", "dt", "A", "B", "C") if op == "mamba2" else ("q", "k", "v")):
        args = list(make(op).args)
        args[i] = None
        wrong(op, Inputs(tuple(args), make(op).kwargs), name, "torch.Tensor")


@each_op
@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([1, 6], "a first entry of 0"),
        ([0, 4, 2, 6], "never decrease"),
        ([0, 5], "a last entry of T = 6"),
        ([0, 7], "a last entry of T = 6"),
    ],
)
def test_wrong_lengths(op: str, values: list[int], what: str) -> None:
    for dtype in (torch.int32, torch.int64):
        wrong(op, make(op, ONE_ROW), what, cu_seqlens=torch.tensor(values, dtype=dtype))


@each_op
def test_wrong_packing(op: str) -> None:
    wrong(op, make(op), "B = 1", "got B = 2", cu_seqlens=torch.tensor([0, 6]))
    wrong(op, make(op), "B = 1", cu_seqlens=SeqInfo.from_lengths([6]))
    wrong(op, make(op, ONE_ROW), "dtype of cu_seqlens", cu_seqlens=torch.tensor([0.0, 6.0]))
    wrong(op, make(op, ONE_ROW), "shape of cu_seqlens", cu_seqlens=torch.tensor([[0, 6]]))
    wrong(op, make(op, ONE_ROW), "shape of cu_seqlens", cu_seqlens=torch.tensor([], dtype=torch.int64))
    wrong(op, make(op, ONE_ROW), "cu_seqlens", "a list", cu_seqlens=[0, 6])
    wrong(op, make(op, ONE_ROW), "a last entry of T = 6", cu_seqlens=SeqInfo.from_lengths([2, 3]))


@each_op
def test_wrong_state(op: str) -> None:
    inputs = make(op, initial_state=True)
    wrong(op, change(inputs, initial_state=lambda x: x[:1]), "shape of initial_state", "= [2, 4, 8, 16]")
    wrong(op, change(inputs, initial_state=lambda x: x.mT), "shape of initial_state")
    wrong(op, change(inputs, initial_state=lambda x: x[:, :2]), "shape of initial_state")
    wrong(op, change(inputs, initial_state=lambda x: x.bfloat16()), "dtype of initial_state", "torch.float32")
    wrong(op, change(inputs, initial_state=lambda x: x.double()), "dtype of initial_state", "torch.float32")
    wrong(op, make(op), "initial_state", initial_state=[1.0])
    packed = make(op, ONE_ROW, lengths=LENGTHS, initial_state=True)
    wrong(op, change(packed, initial_state=lambda x: x[:1]), "shape of initial_state", "= [3, 4, 8, 16]")
    double = make(op, dtype=torch.float64, initial_state=True)
    wrong(op, change(double, initial_state=lambda x: x.float()), "dtype of initial_state", "torch.float64")


@pytest.mark.parametrize("op", [op for op in OP_NAMES if op != "mamba2"])
def test_wrong_scale(op: str) -> None:
    for scale in (torch.tensor(1.0), "1", True):
        wrong(op, make(op), "scale", "Python float", scale=scale)


@pytest.mark.parametrize(
    ("op", "flag"),
    [*((op, "output_final_state") for op in OP_NAMES), ("linear_attn", "normalize"), ("mamba2", "dt_softplus")],
)
@pytest.mark.parametrize("value", ["no", 1, None, torch.tensor(True)], ids=["text", "number", "None", "tensor"])
def test_wrong_flags(op: str, flag: str, value: Any) -> None:
    wrong(op, make(op), flag, "True or False", **{flag: value})


def test_wrong_gates() -> None:
    inputs = make("simple_gla")
    wrong("simple_gla", change(inputs, g=lambda x: x[..., :2]), "shape of g", "= [2, 6, 4]")
    wrong("simple_gla", change(inputs, g=lambda x: x[..., None]), "shape of g")
    wrong("simple_gla", change(inputs, g=lambda x: x.bfloat16()), "dtype of g", "torch.float32")
    wrong("simple_gla", change(inputs, g=lambda x: x.long()), "dtype of g")
    wrong("simple_gla", change(inputs, g=lambda x: x.double()), "dtype of g")
    wrong("simple_gla", change(make("simple_gla", dtype=torch.bfloat16), g=lambda x: x.half()), "dtype of g", "torch.bfloat16")
    wrong("simple_gla", Inputs((*inputs.args[:3], None), {}), "g", "linear_attn")


def test_wrong_normalized_state() -> None:
    plain = make("linear_attn", initial_state=True)
    pair = make("linear_attn", initial_state=True, options=(("normalize", True),))
    wrong("linear_attn", plain, "LinearState", normalize=True)
    wrong("linear_attn", pair, "normalize=False", normalize=False)
    S, z = pair.kwargs["initial_state"]
    wrong("linear_attn", pair, "initial_state.z", initial_state=(S, z[:1]))
    wrong("linear_attn", pair, "initial_state.z", initial_state=(S, None))
    wrong("linear_attn", pair, "initial_state.S", initial_state=(None, z))
    wrong("linear_attn", pair, "initial_state", initial_state=(S[:1], z))
    wrong("linear_attn", pair, "LinearState", initial_state=(S, z, z))


@pytest.mark.parametrize(("layer_idx", "num_layers"), [(-1, 4), (4, 4), (0, 0), (1.0, 4), (0, None)])
def test_wrong_layer(layer_idx: Any, num_layers: Any) -> None:
    wrong("lightning_attn", make("lightning_attn"), "layer_idx", layer_idx=layer_idx, num_layers=num_layers)


def test_wrong_mamba2_parameters() -> None:
    inputs = make("mamba2", options=(("gated", True),))
    wrong("mamba2", change(inputs, dt=lambda x: x[..., :2]), "shape of dt", "= [2, 6, 4]")
    wrong("mamba2", change(inputs, A=lambda x: x[:2]), "shape of A", "[H] = [4]")
    wrong("mamba2", change(inputs, A=lambda x: x[None]), "shape of A")
    wrong("mamba2", change(inputs, D=lambda x: x[:2]), "shape of D", "[H, P]")
    wrong("mamba2", change(inputs, D=lambda x: x[:, None]), "shape of D", "[H, P] = [4, 16]")
    wrong("mamba2", change(inputs, z=lambda x: x[..., :2]), "shape of z")
    wrong("mamba2", change(inputs, dt_bias=lambda x: x[:2]), "shape of dt_bias")
    for name in ("dt", "A", "D", "z", "dt_bias"):
        wrong("mamba2", change(inputs, **{name: lambda x: x.long()}), f"dtype of {name}")
        wrong("mamba2", change(inputs, **{name: lambda x: x.to("meta")}), f"device of {name}")
    for limit in ((0.1, 0.01), (0.1,), None, (math.nan, 1.0), ("0", 1)):
        wrong("mamba2", inputs, "dt_limit", dt_limit=limit)


@each_op
def test_lowering_of_a_good_call(op: str) -> None:
    inputs = make(op, ONE_ROW, lengths=LENGTHS, initial_state=True, final_state=True, fused=True)
    low = contract(op)(*inputs.args, **inputs.kwargs)
    t, o = low.tensors, low.options
    leaves, info = inputs.leaves(), inputs.kwargs["cu_seqlens"]
    assert low.recurrence == "scalar_decay"
    assert all(x is leaves[name] for x, name in zip(t[:3], QKV[op], strict=True))  # nothing is copied or cast
    assert t.h0 is leaves["initial_state"]
    assert (t.cu is info.cu_seqlens, t.host is info.host, t.segments is info.segments) == (True, True, True)
    assert o.final_state is True
    assert o.scale == (1.0 if op == "mamba2" else 8**-0.5)
    expected = {"linear_attn": "none", "retention": "retention", "lightning_attn": "lightning"}
    assert o.decay == expected.get(op, "token")
    assert (t.g is not None) == (op in GATED)
    assert o.rate == (0.75 if op == "lightning_attn" else 0.0)


@each_op
def test_host_lengths_are_their_own_host_copy(op: str) -> None:
    cu = torch.tensor([0, 2, 6])
    low = contract(op)(*make(op, ONE_ROW).args, **make(op, ONE_ROW).kwargs, cu_seqlens=cu)
    assert low.tensors.cu is cu and low.tensors.host is cu and low.tensors.segments is None
    on_meta = make(op, ONE_ROW, device="meta")
    low = contract(op)(*on_meta.args, **on_meta.kwargs, cu_seqlens=cu.to("meta"))
    assert low.tensors.host is None


def test_scale_is_taken() -> None:
    assert ops.retention(*make("retention").args, scale=2).options.scale == 2.0
    assert isinstance(ops.retention(*make("retention").args, scale=2).options.scale, float)


def test_a_skip_per_head_is_part_of_the_recurrence() -> None:
    inputs, gated = make("mamba2"), make("mamba2", options=(("gated", True),))
    low = ops.mamba2(*inputs.args, **inputs.kwargs)
    assert low.tensors.skip is inputs.kwargs["D"] and low.finish is None
    low = ops.mamba2(*gated.args, **gated.kwargs)
    assert low.tensors.skip is gated.kwargs["D"] and low.finish is not None
    for D, finishes in ((None, False), (torch.ones(4, 16), True)):
        low = ops.mamba2(*inputs.args, **{**inputs.kwargs, "D": D})
        assert low.tensors.skip is None and (low.finish is not None) == finishes


def test_gates_may_have_qs_dtype() -> None:
    inputs = change(make("simple_gla", dtype=torch.bfloat16), g=lambda x: x.bfloat16())
    assert ops.simple_gla(*inputs.args).tensors.g.dtype == torch.bfloat16
    half = change(make("simple_gla", dtype=torch.float16), g=lambda x: x.half())
    with torch.autocast("cpu", torch.bfloat16):
        low = ops.simple_gla(*half.args)
    assert (low.tensors.q.dtype, low.tensors.g.dtype) == (torch.bfloat16, torch.float32)


def test_normalized_state_is_a_named_tuple() -> None:
    inputs = make("linear_attn", initial_state=True, final_state=True, options=(("normalize", True),))
    low = ops.linear_attn(*inputs.args, **inputs.kwargs)
    S, z = inputs.kwargs["initial_state"]
    assert low.tensors.h0 is S and low.tensors.z0 is z and low.options.normalize
    assert low.finish is not None
    o, state = low.finish((1, 2, 3, 4))
    assert (o, state.S, state.z) == (1, 2, 3)
    assert ops.linear_attn(*inputs.args, normalize=True).finish is None


@pytest.mark.parametrize("op", OP_NAMES)
def test_contracts_are_traceable(op: str) -> None:
    """One graph without breaks; the lengths stay symbols."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def traced(args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        low = contract(op)(*args, **kwargs)
        t = low.tensors if low.prepare is None else low.prepare(low.tensors)
        return t.q + 1, t.v * low.options.scale, (t.q if t.g is None else t.g) - 1

    for T in (7, 9, 33):
        inputs = make(op, Sizes(2, T, 2, 4, 8, 16), initial_state=True)
        traced(inputs.args, inputs.kwargs)
    assert len(graphs) == 1
    for lengths in ((3, 4), (5, 4, 3), (9, 1, 1, 7)):
        packed = make(op, Sizes(1, sum(lengths), 2, 4, 8, 16), lengths=lengths)
        traced(packed.args, packed.kwargs)
    assert len(graphs) == 2
    torch._dynamo.reset()


def test_packs_beyond_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fewer than 2\^31"):
        SeqInfo.from_cu_seqlens(torch.tensor([0, 2**32 + 33]))
    with pytest.raises(ValueError, match=r"fewer than 2\^31"):
        SeqInfo.from_lengths([2**31, 5])
