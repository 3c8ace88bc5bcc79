"""500 lengths and 500 packings on a GPU: after one dense and one packed call of each bucket nothing is compiled, forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import matrix
import pytest
import torch
from lengths import Shape, dense, firsts, packed

import fla_dispatch as fd
from fla_dispatch.kernels.scalar_decay.cases import Inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What Triton compiles, or takes from its cache on disk, inside the block."""
    from triton import knobs

    found: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **facts: found.append(facts["repr"])
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before


@pytest.mark.parametrize("variant", [*matrix.variants("triton"), *matrix.variants("gluon")])
def test_lengths_and_packings_compile_nothing(variant: str) -> None:
    handle = fd.op("simple_gla", mode=variant)

    def step(shape: Shape) -> None:
        args, kwargs = shape.call(64, torch.bfloat16, "cuda", grad=True)
        if matrix.refusals(variant, "simple_gla", Inputs(args, kwargs), grad=True):
            with torch.no_grad():
                handle(*args, **kwargs)
        else:
            o, _ = handle(*args, **kwargs)
            torch.autograd.grad(o, args, torch.ones_like(o))

    for shape in firsts():
        step(shape)
    for shape in (*dense(), *packed()):
        with compilations() as compiled:
            step(shape)
        assert not compiled, (shape, compiled)
    torch.cuda.synchronize()
