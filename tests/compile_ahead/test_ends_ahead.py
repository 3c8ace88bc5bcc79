"""The kernels around mamba2's recurrence compile for six architectures with no GPU, without spills, and never again for another length."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from fla_dispatch import settings
from fla_dispatch.kernels._shared import ahead
from fla_dispatch.kernels._shared.launch import Launch, record

if settings.current.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the kernels by interpreted functions", allow_module_level=True)

from fla_dispatch.kernels.scalar_decay.ends import pairs

ARCHS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")


def launched(B: int, T: int, H: int, P: int, dtype: torch.dtype) -> list[Launch]:
    """Both directions of both pairs, dt and z slices of a projection."""
    whole = torch.empty(B, T, 2 * H * P + 16 + H, dtype=dtype, device="meta")
    z, dt = whole[..., : H * P].unflatten(-1, (H, P)), whole[..., -H:]
    o = torch.empty(B, T, H, P, dtype=dtype, device="meta")
    A, bias = torch.empty(H, device="meta"), torch.empty(H, device="meta")
    wide = torch.empty(B, T, H, device="meta")
    steps, gate = pairs.steps(True, (0.001, math.inf)), pairs.gate(dtype)
    with record() as found:
        steps.forward(dt, A, bias)
        steps.backward((dt, A, bias), (wide, wide), (True, True, True))
        gate.forward(o, z)
        gate.backward((o, z), (o,), (True, True))
    assert len(found) == 4
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("H", "P", "dtype"), [(64, 64, torch.bfloat16), (24, 80, torch.float32)])
def test_they_compile(H: int, P: int, dtype: torch.dtype, arch: str) -> None:
    for launch in launched(2, 300, H, P, dtype):
        compiled = ahead.compile_launch(launch, arch)
        assert compiled.binary and compiled.shared <= 16384


def test_lengths_never_recompile() -> None:
    expected = [ahead.launch_key(x) for x in launched(2, 300, 64, 64, torch.bfloat16)]
    for B, T in ((1, 1), (1, 17), (16, 4096)):
        assert [ahead.launch_key(x) for x in launched(B, T, 64, 64, torch.bfloat16)] == expected
