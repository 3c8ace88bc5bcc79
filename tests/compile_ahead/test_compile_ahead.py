"""Every kernel of every Triton variant compiles for six architectures with no GPU, and its shared memory fits the device.

Launches are recorded from the variants' own forward and backward on meta tensors, with the config that the device would
get, and compiled. The compiler that is installed is the one that is tested.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from shapes import ARCHS, PACK, Shape, check_every_kernel, check_lengths, compile_and_fit, launches, problem

from fla_dispatch import registry, settings

if settings.current.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the kernels by interpreted functions", allow_module_level=True)

RECURRENCE = registry.get_recurrence("scalar_decay")
VARIANTS = [v.name for v in RECURRENCE.variants if v.language == "triton"]
PARTIAL = ("states_triton", "parallel_triton")  #: may refuse a shape: head dims, normaliser, lengths, packing
GLUON = [v.name for v in RECURRENCE.variants if v.language == "gluon"]


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
    "simple_gla_128_short": Shape("simple_gla", 128, 128, T=100, states=True),
    "mamba2_128_64_short": Shape("mamba2", 128, 64, H=1, HV=32, T=100),
    "retention_64_float32": Shape("retention", 64, 64, dtype=torch.float32, states=True),
}

#: Shapes that repeat what another shape compiles, in another combination: on one architecture of each vendor only. The other
#: shapes hold every kernel and every class of head dim, so they are compiled everywhere.
COMBINATIONS = ("simple_gla_128_states", "simple_gla_96_pack", "mamba2_128_64", "mamba2_128_64_short")
FULL_ARCHS = ("sm90", "gfx942")
MATRIX = [(name, arch) for name in SHAPES for arch in ARCHS if arch in FULL_ARCHS or name not in COMBINATIONS]

#: Other configs than the default differ from it in tile sizes and stages alone, and variants share their bodies: one shape and one
#: variant per vendor is enough to find tiles that the compiler refuses or that outgrow the device.
OTHER_CONFIGS = [("simple_gla_128_states", "sm90"), ("simple_gla_128_states", "gfx942")]


@pytest.mark.parametrize("name, arch", MATRIX)
def test_default_configs(name: str, arch: str) -> None:
    """One test per shape and architecture, so that kernels which variants share compile once."""
    key = problem(SHAPES[name], arch).key()
    for variant in map(RECURRENCE.variant, VARIANTS):
        refusals = variant.static_refusals(key)
        assert not refusals or variant.name in PARTIAL, f"{variant.name} on {arch}: {[r.text() for r in refusals]}"
        if not refusals:
            compile_and_fit(launches(SHAPES[name], variant.name, variant.configs(key)[0]), arch)


@pytest.mark.parametrize(("variant", "least"), [("states_triton", 6), ("parallel_triton", 2)])
def test_partial_variants_take_their_shapes(variant: str, least: int) -> None:
    assert sum(not RECURRENCE.variant(variant).static_refusals(problem(shape, "sm90").key()) for shape in SHAPES.values()) >= least


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
    if variant in PARTIAL and RECURRENCE.variant(variant).static_refusals(problem(SHAPES[name], "sm90").key()):
        pytest.skip("refused")
    check_lengths(SHAPES[name], variant)


def test_every_kernel_is_in_the_matrix() -> None:
    check_every_kernel(RECURRENCE, SHAPES, [*VARIANTS, *GLUON])
