"""Any two variants agree: random shapes, dtypes, gates, packings, states; each variant against float64, so against each other."""

from __future__ import annotations

from typing import Any

import matrix
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fla_dispatch.kernels.scalar_decay.cases import GATED, OP_NAMES, Case, Sizes

VARIANTS = [v for v in matrix.variants() if v != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = st.sampled_from((1, 3, 16, 20, 32))


@st.composite
def calls(draw: Any) -> Case:
    """A call of any op: up to three sequences or rows, up to 90 tokens, odd head dims, grouped heads."""
    op = draw(st.sampled_from(OP_NAMES))
    lengths = draw(st.none() | st.lists(st.sampled_from((0, 1, 2, 15, 16, 17, 31, 33, 64, 65)), min_size=1, max_size=3))
    rows, tokens = (1, sum(lengths)) if lengths is not None else (draw(st.integers(1, 2)), draw(st.integers(0, 90)))
    heads, group = draw(st.sampled_from(((1, 1), (1, 2), (2, 1), (1, 3))))
    options: tuple[tuple[str, Any], ...] = ()
    if op == "linear_attn":
        options = (("normalize", draw(st.booleans())),)
    elif op == "mamba2":
        options = (("gated", draw(st.booleans())), ("dt_limit", draw(st.sampled_from(((0.0, float("inf")), (0.01, 0.2))))))
    else:
        options = draw(st.sampled_from(((), (("scale", 0.5),))))
    longest = tokens if lengths is None else max(lengths)
    alone = ("normalize", True) in options and longest <= 1  # one token normalised by itself: o = v, and dq and dk are rounding alone
    return Case(
        "drawn", op, Sizes(rows, tokens, heads, heads * group, draw(DIMS), draw(DIMS)),
        dtype=draw(st.sampled_from(DTYPES)),
        lengths=None if lengths is None else tuple(lengths),
        regime=draw(st.sampled_from(("mild", "strong", "none", "reset"))) if op in GATED else "mild",
        initial_state=draw(st.booleans()) or alone,
        final_state=draw(st.booleans()),
        fused=draw(st.booleans()),
        options=options,
    )  # fmt: skip


@given(case=calls(), seed=st.integers(0, 3), data=st.data())
@settings(
    max_examples=40, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_variants_agree(case: Case, seed: int, data: st.DataObject) -> None:
    inputs = case.make("cpu", seed=seed)
    variant = data.draw(st.sampled_from([v for v in VARIANTS if not matrix.refusals(v, case.op, inputs, grad=False)]))
    grad = not matrix.refusals(variant, case.op, inputs, grad=True)
    outputs, gradients, grads = matrix.oracle(case.op, inputs, grad=grad)
    with matrix.poisoned():
        found, found_grads = matrix.execute(case.op, variant, inputs, grad=grad, grads=grads)
    matrix.judge(found, outputs, case)
    scales = matrix.gradient_scales(case.op, inputs, gradients) if grad else None
    matrix.judge(found_grads, gradients, case, prefix="d", scales=scales)
