"""The step's kernel compiles for six architectures with no GPU, with every config, and never again for another batch or pool."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from steps import TRITON, Sizes, make_inputs, recurrence_of

from fla_dispatch import registry, settings
from fla_dispatch.device import hypothetical
from fla_dispatch.kernels._shared import ahead
from fla_dispatch.kernels._shared import launch as launching
from fla_dispatch.kernels._shared.launch import Launch, record

if settings.current.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the kernels by interpreted functions", allow_module_level=True)

ARCHS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")
(NAME,) = TRITON


@dataclasses.dataclass(frozen=True)
class Shape:
    """A step to compile for."""

    op: str
    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32
    H: int = 8
    HV: int = 32
    pool: str = "slots"
    fused: bool = False
    options: tuple[tuple[str, Any], ...] = ()


#: Between them: each decay, the normaliser, masked and full head dims, each pool, what mamba2 folds in, the normalisation; of the delta
#: rules each decay, weight and gate, a removal key that is read early, and several updates.
SHAPES = {
    "retention_128": Shape("retention_step", 128, 128),
    "simple_gla_256_narrow": Shape("simple_gla_step", 256, 256, state_dtype=torch.bfloat16, fused=True),
    "linear_attn_96_normalized": Shape("linear_attn_step", 96, 80, dtype=torch.float16, options=(("normalize", True), ("qk_l2norm", True))),
    "mamba2_128_64": Shape("mamba2_step", 128, 64, H=1),
    "mamba2_gated": Shape("mamba2_step", 128, 64, H=1, pool="none", options=(("gated", True), ("dt_limit", (0.01, 0.5)))),
    "linear_attn_16_float32": Shape("linear_attn_step", 16, 16, dtype=torch.float32, pool="none"),
    "delta_64": Shape("delta_step", 64, 64, pool="none", options=(("use_beta_sigmoid", True),)),
    "gated_delta_128": Shape("gated_delta_step", 128, 128),
    "gated_delta_128_raw": Shape("gated_delta_step", 128, 128, fused=True, options=(("raw", True), ("allow_neg_eigval", True))),
    "kda_128_bounded": Shape("kda_step", 128, 128, options=(("raw", True), ("lower_bound", -5.0))),
    "kda_96_80_raw": Shape("kda_step", 96, 80, dtype=torch.float32, options=(("raw", True),)),
    "comba_256_narrow": Shape("comba_step", 256, 256, dtype=torch.float16, state_dtype=torch.bfloat16, fused=True),
    "delta_product_128_64": Shape("delta_product_step", 128, 64, fused=True, options=(("raw", True), ("num_householder", 3))),
}


@functools.cache
def lowered(shape: Shape, B: int = 64, heads: int = 1) -> tuple[Any, Any]:
    sizes = Sizes(B, shape.H * heads, shape.HV * heads, shape.K, shape.V)
    made = make_inputs(
        shape.op, sizes, shape.dtype, "meta", state_dtype=shape.state_dtype, pool=shape.pool, fused=shape.fused, options=shape.options
    )
    low = registry.get_op(shape.op).contract(*made.args, **made.kwargs)
    return low.tensors, low.options


def configs(shape: Shape, arch: str) -> tuple[Any, ...]:
    recurrence = recurrence_of(shape.op)
    key = dataclasses.replace(recurrence.problem(*lowered(shape), False), device=hypothetical(arch)).key()
    refusals = recurrence.variant(NAME).static_refusals(key)
    assert not refusals, [r.text() for r in refusals]
    return recurrence.variant(NAME).configs(key)


def launched(shape: Shape, config: Any, B: int = 64, heads: int = 1) -> Launch:
    module: Any = recurrence_of(shape.op).variant(NAME).load()
    with record() as found:
        module.forward(config, *lowered(shape, B, heads))
    (launch,) = found  # one launch, whatever is folded in
    return launch


def compile_and_fit(shape: Shape, config: Any, arch: str) -> None:
    compiled = ahead.compile_launch(launched(shape, config), arch)
    assert compiled.binary and compiled.shared <= hypothetical(arch).shared_bytes


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SHAPES)
def test_default_configs(name: str, arch: str) -> None:
    compile_and_fit(SHAPES[name], configs(SHAPES[name], arch)[0], arch)


@pytest.mark.parametrize("arch", ["sm90", "gfx942"])
@pytest.mark.parametrize("name", ["retention_128", "gated_delta_128_raw"])
def test_other_configs(name: str, arch: str) -> None:
    found = configs(SHAPES[name], arch)
    assert len(found) >= 5
    for config in found[1:]:
        compile_and_fit(SHAPES[name], config, arch)


@pytest.mark.parametrize("name", SHAPES)
def test_batches_never_recompile(name: str) -> None:
    """The compiled code is the same for every number of rows, slots and heads."""
    config = configs(SHAPES[name], "sm90")[0]
    expected = ahead.launch_key(launched(SHAPES[name], config))
    for B, heads in ((1, 1), (2, 1), (17, 1), (256, 1), (1000, 1), (64, 3)):
        found = launched(SHAPES[name], config, B, heads)
        assert found.grid != launched(SHAPES[name], config).grid
        assert ahead.launch_key(found) == expected


@pytest.mark.parametrize("name", SHAPES)
def test_calls_find_their_kernel(name: str) -> None:
    """None needs the compiler's own lookup, which takes longer than all the rest: no stride of a usual call is specialised on as 1."""
    config = configs(SHAPES[name], "sm90")[0]
    keys = {
        launching._key(x.kernel, x.args, x.constants, x.warps, x.stages) for x in (launched(SHAPES[name], config, B) for B in (1, 2, 64))
    }
    assert len(keys) == 1 and None not in keys


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_is_copied(name: str) -> None:
    """Tensors go to the kernel as they came, slices of a projection and of a pool included; the output alone is new."""
    tensors, options = lowered(SHAPES[name], 64, 1)
    given = {id(x) for x in tensors if x is not None}
    arguments = launched(SHAPES[name], configs(SHAPES[name], "sm90")[0]).args
    new = [x for x in arguments if isinstance(x, torch.Tensor) and id(x) not in given]
    assert len(new) == (2 if options.decay in ("retention", "lightning") else 1)
