"""Every kernel of every Triton variant compiles for six architectures with no GPU, and its shared memory fits the device.

Launches are recorded from the variants' own forward and backward on meta tensors, with the config that the device would
get, and compiled. The compiler that is installed is the one that is tested.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fla_dispatch import registry, settings
from fla_dispatch.device import hypothetical
from fla_dispatch.kernels._shared import ahead
from fla_dispatch.kernels._shared.launch import Launch, record
from fla_dispatch.kernels.scalar_decay.cases import Sizes, make_inputs
from fla_dispatch.problem import Problem

if settings.current.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the kernels by interpreted functions", allow_module_level=True)

ARCHS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")
RECURRENCE = registry.get_recurrence("scalar_decay")
VARIANTS = [v.name for v in RECURRENCE.variants if v.language == "triton"]
GLUON = [v.name for v in RECURRENCE.variants if v.language == "gluon"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call to compile for: what decides the code is head dims, dtype, decay, packing, states and grouping, not lengths."""

    op: str
    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    H: int = 16
    HV: int = 16
    B: int = 4
    T: int = 4096
    lengths: tuple[int, ...] | None = None
    states: bool = False
    options: tuple[tuple[str, Any], ...] = ()


PACK = (1000, 0, 1, 3095)

#: Between them: each decay, head dim class (masked, 64, 128, 256), K != V, packing, states, grouping, normaliser, weights, float32.
#: Cut: float16, which compiles to the same instructions as bfloat16; the product of these properties, since the kernels
#: branch on each by itself.
SHAPES = {
    "retention_64": Shape("retention", 64, 64),
    "simple_gla_128_states": Shape("simple_gla", 128, 128, states=True),
    "simple_gla_128_pack_group": Shape("simple_gla", 128, 128, H=4, HV=8, B=1, lengths=PACK, states=True),
    "simple_gla_96_pack": Shape("simple_gla", 96, 96, B=1, lengths=PACK),
    "linear_attn_256": Shape("linear_attn", 256, 256),
    "linear_attn_64_normalized": Shape("linear_attn", 64, 64, states=True, options=(("normalize", True),)),
    "mamba2_128_64": Shape("mamba2", 128, 64, H=1, HV=32),
    "retention_64_float32": Shape("retention", 64, 64, dtype=torch.float32, states=True),
}

#: Shapes that repeat what another shape compiles, in another combination: on one architecture of each vendor only. The other
#: shapes hold every kernel and every class of head dim, so they are compiled everywhere.
COMBINATIONS = ("simple_gla_128_states", "simple_gla_96_pack", "mamba2_128_64")
FULL_ARCHS = ("sm90", "gfx942")
MATRIX = [(name, arch) for name in SHAPES for arch in ARCHS if arch in FULL_ARCHS or name not in COMBINATIONS]

#: Other configs than the default differ from it in tile sizes and stages alone, and variants share their bodies: one shape and one
#: variant per vendor is enough to find tiles that the compiler refuses or that outgrow the device.
OTHER_CONFIGS = [("simple_gla_128_states", "sm90"), ("simple_gla_128_states", "gfx942")]


@functools.cache
def lowered(shape: Shape) -> tuple[Any, Any]:
    """Tensors (on the meta device) and options of the recurrence."""
    op = registry.get_op(shape.op)
    made = make_inputs(
        shape.op, Sizes(shape.B, shape.T, shape.H, shape.HV, shape.K, shape.V), shape.dtype, "meta", lengths=shape.lengths,
        initial_state=shape.states, final_state=shape.states, options=shape.options,
    )  # fmt: skip
    lowering = op.contract(*made.args, **made.kwargs)
    return lowering.prepare(lowering.tensors) if lowering.prepare else lowering.tensors, lowering.options


def problem(shape: Shape, arch: str) -> Problem:
    tensors, options = lowered(shape)
    return dataclasses.replace(RECURRENCE.problem(tensors, options, True), device=hypothetical(arch))


def launches(shape: Shape, variant: str, config: Any) -> list[Launch]:
    """What forward and backward launch, with every gradient wanted that there is."""
    tensors, options = lowered(shape)
    module: Any = RECURRENCE.variant(variant).load()
    with record() as found:
        outputs = module.forward(config, tensors, options)
        arriving = [torch.empty_like(x) if x.dim() > 1 else None for x in outputs[: len(RECURRENCE.output_grads._fields)]]
        wanted = tuple(getattr(tensors, name) is not None for name in RECURRENCE.differentiable)
        module.backward(config, RECURRENCE.residuals(tensors, outputs, options), RECURRENCE.output_grads(*arriving), options, wanted)
    return found


def compile_and_fit(found: list[Launch], arch: str) -> None:
    room = hypothetical(arch).shared_bytes
    for launch in {ahead.launch_key(x): x for x in found}.values():
        compiled = ahead.compile_launch(launch, arch)
        assert compiled.binary
        where = f"{compiled.name} for {arch}, warps {launch.warps}, stages {launch.stages}, {launch.constants}"
        assert compiled.shared <= room, f"{where}: {compiled.shared} B of shared memory, the device has {room} B"


@pytest.mark.parametrize("name, arch", MATRIX)
def test_default_configs(name: str, arch: str) -> None:
    """One test per shape and architecture, so that kernels which variants share compile once."""
    key = problem(SHAPES[name], arch).key()
    for variant in map(RECURRENCE.variant, VARIANTS):
        refusals = variant.static_refusals(key)
        assert not refusals, f"{variant.name} on {arch}: {[r.text() for r in refusals]}"
        compile_and_fit(launches(SHAPES[name], variant.name, variant.configs(key)[0]), arch)


@pytest.mark.parametrize("name", [*SHAPES])
def test_gluon_on_hopper(name: str) -> None:
    """Every config of the variants that are written for sm90, where they take the shape."""
    key = problem(SHAPES[name], "sm90").key()
    for variant in map(RECURRENCE.variant, GLUON):
        for config in () if variant.static_refusals(key) else variant.configs(key):
            compile_and_fit(launches(SHAPES[name], variant.name, config), "sm90")


@pytest.mark.parametrize("name, arch", OTHER_CONFIGS)
def test_other_configs(name: str, arch: str) -> None:
    configs = RECURRENCE.variant("sweep_triton").configs(problem(SHAPES[name], arch).key())
    for config in configs[1:]:
        compile_and_fit(launches(SHAPES[name], "sweep_triton", config), arch)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_lengths_never_recompile(name: str, variant: str) -> None:
    """The compiled code is the same for every length, batch and number of sequences (T = 1 and multiples of 16 included)."""
    shape = SHAPES[name]
    config = RECURRENCE.variant(variant).configs(problem(shape, "sm90").key())[0]
    packs = [(1,), (16, 16), (5, 0, 95), PACK, (64,) * 64]
    if shape.lengths is not None:
        others = [dataclasses.replace(shape, lengths=pack, T=sum(pack)) for pack in packs]
    else:
        others = [dataclasses.replace(shape, B=B, T=T) for B, T in ((1, 1), (2, 16), (1, 17), (3, 1000), (16, 4096), (1, 100_000))]
    expected = {ahead.launch_key(x) for x in launches(shape, variant, config)}
    for other in others:
        assert {ahead.launch_key(x) for x in launches(other, variant, config)} == expected


def kernels_on_disk() -> set[str]:
    """Jitted functions of the room that ask for their program id."""
    room = Path(registry.__file__).parent / "kernels" / RECURRENCE.name
    found = set()
    for path in room.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            jitted = isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
            if jitted and "program_id" in ast.unparse(node):
                found.add(node.name)
    return found


def test_every_kernel_is_in_the_matrix() -> None:
    seen = set()
    for shape in SHAPES.values():
        for variant in map(RECURRENCE.variant, [*VARIANTS, *GLUON]):
            if variant.static_refusals(problem(shape, "sm90").key()):
                continue
            seen |= {x.kernel.__name__ for x in launches(shape, variant.name, variant.configs(problem(shape, "sm90").key())[0])}
    assert seen == kernels_on_disk()
