"""The kernels before the delta rules compile for six architectures with no GPU, and never again for another length."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fla_dispatch import settings
from fla_dispatch.kernels._shared import ahead
from fla_dispatch.kernels._shared.launch import Launch, record

if settings.current.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the kernels by interpreted functions", allow_module_level=True)

from fla_dispatch.kernels.delta.raw import pairs

ARCHS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")


def launched(
    B: int, T: int, H: int, K: int, dtype: torch.dtype, *, channel: bool, removal: bool, n: int = 1, bounded: bool = False
) -> list[Launch]:
    """Both directions of both pairs; q, k and p are slices of a projection, parameters and gradients of outputs as layers have them."""

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    whole = empty(B, T * n, 3 * H * K, kind=dtype).unflatten(2, (3, H, K)).unbind(2)
    q, k, p = empty(B, T, H, K, kind=dtype), whole[1], whole[2] if removal else None
    logits, raw = empty(B, T * n, H, kind=dtype), empty(B, T, H, *([K] if channel else []), kind=dtype)
    A_log, bias = empty(H), empty(H, *([K] if channel else []))
    rows, vectors = pairs.rows(removal), pairs.vectors(True, "bounded" if bounded else "softplus", n > 1, -5.0)
    with record() as found:
        units = rows.forward(q, k, p)
        rows.backward((q, k, p), units, (True, True, removal))
        outputs = vectors.forward(logits, raw, A_log, bias)
        vectors.backward((logits, raw, A_log, bias), outputs, (True, True, True, True))
    assert len(found) == 4
    return found


CALLS = {
    "kda": lambda B, T: launched(B, T, 16, 128, torch.bfloat16, channel=True, removal=False),
    "bounded": lambda B, T: launched(B, T, 3, 100, torch.float32, channel=True, removal=False, bounded=True),
    "comba": lambda B, T: launched(B, T, 16, 256, torch.bfloat16, channel=False, removal=True),
    "delta_product": lambda B, T: launched(B, T, 6, 20, torch.float16, channel=False, removal=False, n=3, bounded=True),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CALLS)
def test_they_compile(name: str, arch: str) -> None:
    for launch in CALLS[name](2, 300):
        compiled = ahead.compile_launch(launch, arch)
        assert compiled.binary and compiled.shared <= 32768


@pytest.mark.parametrize("name", CALLS)
def test_lengths_never_recompile(name: str) -> None:
    expected = [ahead.launch_key(x) for x in CALLS[name](2, 300)]
    for B, T in ((1, 1), (1, 17), (16, 4096)):
        assert [ahead.launch_key(x) for x in CALLS[name](B, T)] == expected
