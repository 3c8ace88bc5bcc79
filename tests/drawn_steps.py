"""Steps as Hypothesis draws them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from steps import DELTA_STEP, GATED, SCALAR_STEP, Case, Sizes, StepRoom, make_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _scalar_options(draw: Any, op: str) -> tuple[tuple[str, Any], ...]:
    if op == "mamba2_step":
        return tuple(draw(st.sampled_from(((), (("gated", True), ("dt_limit", (0.01, 0.2))), (("plain", True),)))))
    options = (("qk_l2norm", draw(st.booleans())), *draw(st.sampled_from(((), (("scale", 0.5),)))))
    return (*options, ("normalize", draw(st.booleans()))) if op == "linear_attn_step" else options


def _delta_options(draw: Any, op: str) -> tuple[tuple[str, Any], ...]:
    options = draw(st.sampled_from(((), (("scale", 0.5),), (("use_qk_l2norm", True),), (("raw", True),))))
    if ("raw", True) in options:
        options = (*options, ("allow_neg_eigval", draw(st.booleans())))
        if op in GATED:
            options = (*options, *draw(st.sampled_from(((), (("lower_bound", -5.0),), (("dt_bias", None),)))))
    return (*options, ("num_householder", draw(st.integers(1, 3)))) if op == "delta_product_step" else options


@st.composite
def drawn(draw: Any, room: StepRoom) -> Case:
    """A step of any op of a room: groups, head dims up to 256, every dtype of tokens and pools, slots with gaps and padding, layouts."""
    op = draw(st.sampled_from(room.cases.OP_NAMES))
    H, group = draw(st.sampled_from(((1, 1), (1, 2), (2, 1), (1, 3))))
    dims = st.integers(16, 256) | st.sampled_from((1, 16, 33, 64, 100, 256))
    options = {SCALAR_STEP.name: _scalar_options, DELTA_STEP.name: _delta_options}[room.name](draw, op)
    return Case(
        make_inputs, "drawn", op, Sizes(draw(st.integers(0, 5)), H, H * group, draw(dims), draw(dims)), dtype=draw(st.sampled_from(DTYPES)),
        state_dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))), pool=draw(st.sampled_from(("none", "slots", "padded"))),
        regime=draw(st.sampled_from(("mild", "strong", "none", "reset"))) if op in GATED else "mild", fused=draw(st.booleans()),
        options=options,
    )  # fmt: skip
