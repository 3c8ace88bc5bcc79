"""The kernels of the delta room compile for six architectures with no GPU, fit the device, and never again for another length."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rooms import DELTA
from shapes import ARCHS, PACK, Shape, check_every_kernel, check_lengths, compile_and_fit, launches, problem

from fla_dispatch import settings

if settings.current.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the kernels by interpreted functions", allow_module_level=True)

RECURRENCE = DELTA.recurrence
VARIANTS = DELTA.variants("triton")
GLUON = DELTA.variants("gluon")

#: Between them: each decay, a key of its own read early, masked and full head dims, K != V, packing, states, grouping, float32.
SHAPES = {
    "delta_64": Shape("delta", 64, 64),
    "gated_delta_128_states": Shape("gated_delta", 128, 128, states=True),
    "kda_128_pack_group": Shape("kda", 128, 128, H=4, HV=8, B=1, lengths=PACK, states=True),
    "comba_96_80_pack": Shape("comba", 96, 80, B=1, lengths=PACK),
    "delta_product_256": Shape("delta_product", 256, 256, options=(("num_householder", 3),)),
    "gated_delta_128_segments": Shape("gated_delta", 128, 128, H=8, HV=8, B=1, T=32768, states=True),
    "kda_32_float32": Shape("kda", 32, 32, dtype=torch.float32, states=True),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SHAPES)
def test_default_configs(name: str, arch: str) -> None:
    key = problem(SHAPES[name], arch).key()
    for variant in map(RECURRENCE.variant, VARIANTS):
        refusals = variant.static_refusals(key)
        assert not refusals, f"{variant.name} on {arch}: {[r.text() for r in refusals]}"
        compile_and_fit(launches(SHAPES[name], variant.name, variant.configs(key)[0]), arch)


@pytest.mark.parametrize("arch", ["sm90", "gfx942"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_configs(variant: str, arch: str) -> None:
    found = RECURRENCE.variant(variant).configs(problem(SHAPES["gated_delta_128_states"], arch).key())
    assert len(found) >= 4
    for config in found[1:]:
        compile_and_fit(launches(SHAPES["gated_delta_128_states"], variant, config), arch)


@pytest.mark.parametrize("name", ["gated_delta_128_states", "comba_96_80_pack"])
def test_gluon_on_hopper(name: str) -> None:
    """The inverses of each number of keys, with and without scores; the other kernels are chunk_triton's."""
    key = problem(SHAPES[name], "sm90").key()
    for variant in map(RECURRENCE.variant, GLUON):
        assert not variant.static_refusals(key)
        found = {config.scores: config for config in variant.configs(key)}
        for config in found.values():
            ours = [launch for launch in launches(SHAPES[name], variant.name, config) if launch.kernel.is_gluon()]
            assert ours
            compile_and_fit(ours, "sm90")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_lengths_never_recompile(name: str, variant: str) -> None:
    if RECURRENCE.variant(variant).static_refusals(problem(SHAPES[name], "sm90").key()):
        pytest.skip("refused")
    check_lengths(SHAPES[name], variant)


def test_every_kernel_is_in_the_matrix() -> None:
    check_every_kernel(RECURRENCE, SHAPES, [*VARIANTS, *GLUON])
