"""`fla-dispatch explain`: what would run for a call that is described by sizes, on a device that need not be here."""

from __future__ import annotations

from .. import dispatch
from . import output


def run(
    op: str,
    device: str | None,
    dtype: str,
    sizes: dict[str, int],
    mode: str,
    packed: bool,
    grad: bool,
    initial_state: bool,
    final_state: bool,
    as_json: bool,
) -> int:
    explanation = dispatch.explain(
        op,
        device=device,
        dtype=dtype,
        mode=mode,
        packed=packed,
        grad=grad,
        initial_state=initial_state,
        output_final_state=final_state,
        **sizes,
    )
    if as_json:
        output.print_json(explanation.to_dict())
    else:
        print(explanation.to_text())
    return 0
