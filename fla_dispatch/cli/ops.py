"""`fla-dispatch ops`: every op with its recurrence, sizes and variants."""

from __future__ import annotations

from .. import registry
from . import output


def document() -> list[dict[str, object]]:
    """One record per op, as `--json` prints it."""
    found: list[dict[str, object]] = []
    for name in registry.op_names():
        op = registry.get_op(name)
        variants = registry.get_recurrence(op.recurrence).variants
        found.append(
            {
                "name": name,
                "summary": op.summary,
                "recurrence": op.recurrence,
                "sizes": dict(op.sizes),
                "variants": [{"name": v.name, "family": v.family, "summary": v.summary} for v in variants],
            }
        )
    return found


def run(as_json: bool) -> int:
    if as_json:
        output.print_json(document())
        return 0
    out = output.console()
    rows = []
    for name in registry.op_names():
        op = registry.get_op(name)
        rows.append([name, op.recurrence, " ".join(f"{size}={n}" for size, n in op.sizes.items()), op.summary])
    out.print(output.table("ops", ["op", "recurrence", "sizes (defaults of explain)", "what it is"], rows))
    for name in registry.recurrence_names():
        rows = [[v.name, v.family, v.summary] for v in registry.get_recurrence(name).variants]
        out.print(output.table(f"variants of {name}", ["variant", "family", "what it is"], rows))
    return 0
