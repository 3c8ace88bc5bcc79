"""Steps as Hypothesis draws them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from fla_dispatch.kernels.scalar_step.cases import GATED, OP_NAMES, Case, Sizes, make_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def drawn(draw: Any) -> Case:
    """A step of any op: groups, odd head dims up to 256, every dtype of tokens and pools, slots with gaps and padding, layouts."""
    op = draw(st.sampled_from(OP_NAMES))
    H, group = draw(st.sampled_from(((1, 1), (1, 2), (2, 1), (1, 3))))
    dims = st.integers(16, 256) | st.sampled_from((1, 16, 33, 64, 100, 256))
    options: tuple[tuple[str, Any], ...] = ()
    if op == "mamba2_step":
        options = draw(st.sampled_from(((), (("gated", True), ("dt_limit", (0.01, 0.2))), (("plain", True),))))
    else:
        options = (("qk_l2norm", draw(st.booleans())), *draw(st.sampled_from(((), (("scale", 0.5),)))))
    if op == "linear_attn_step":
        options = (*options, ("normalize", draw(st.booleans())))
    return Case(
        make_inputs, "drawn", op, Sizes(draw(st.integers(0, 5)), H, H * group, draw(dims), draw(dims)), dtype=draw(st.sampled_from(DTYPES)),
        state_dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))), pool=draw(st.sampled_from(("none", "slots", "padded"))),
        regime=draw(st.sampled_from(("mild", "strong", "none", "reset"))) if op in GATED else "mild", fused=draw(st.booleans()),
        options=options,
    )  # fmt: skip
