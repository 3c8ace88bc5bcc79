"""`fla-dispatch bench`: time, rates and errors of an op's variants as a table, a JSON document or one HTML page that needs nothing else."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import registry
from ..dispatch.tiers import Decision, check_choice, decide
from ..errors import CallError
from ..problem import Problem
from . import output
from .tune import device_of, parse_values

if TYPE_CHECKING:
    from ..tuning.bench import Pick

#: What a page is made with; the extra `report` of this package.
PACKAGES = ("matplotlib", "jinja2")


def run(
    op: str,
    report: Path | None,
    sizes: list[str],
    dtype: str,
    device: str | None,
    variants: list[str],
    grad: bool,
    regime: str,
    seconds: float,
    as_json: bool,
) -> int:
    """Measure; 1 when a variant that is not refused fails or is wrong, and when nothing is measured."""
    from ..tuning.bench import measure
    from ..tuning.environment import REGIMES
    from ..tuning.keys import dtype_of, whole_sizes

    recurrence = registry.get_recurrence(registry.get_op(op).recurrence)
    if regime not in REGIMES:
        raise CallError(f"bench: --regime: expected {' or '.join(REGIMES)}, got {regime!r}. To fix: name one of these.")
    if not dtype_of(dtype).is_floating_point:
        raise CallError(f"bench: --dtype: expected a floating-point dtype, got {dtype}. To fix: name for example bfloat16.")
    if report is not None:
        check_report(report)
    names = [name for text in variants for name in text.split(",")]
    for name in names:
        if name not in {v.name for v in recurrence.variants}:
            check_choice(recurrence, name, "bench: --variants")
    names = [v.name for v in recurrence.variants if v.name in names or v.family in names] if names else []
    values = parse_values(sizes)
    wholes = [whole_sizes(op, dict(zip(values, numbers, strict=True))) for numbers in itertools.product(*values.values())]
    for whole in wholes:
        if not whole["B"] * whole.get("T", 1):
            got = " ".join(f"{name}={whole[name]}" for name in ("B", "T") if name in whole)
            raise CallError(f"bench: --size: expected tokens to measure, got {got}. To fix: give each at least 1.")
    with output.progress() as progress:
        task = progress.add_task("bench", total=None)
        document = measure(
            op, wholes, dtype, device_of(device), lambda key: picks(recurrence.name, key, names, grad), grad=grad, regime=regime,
            seconds=seconds, progress=lambda text, done, total: progress.update(task, description=text, completed=done, total=total),
        )  # fmt: skip
    if report is not None:
        from ..tuning.report import page

        report.write_text(page(document), encoding="utf-8")
    if as_json:
        output.print_json(document)
    else:
        _print(document, report)
    rows = document["rows"]
    return 0 if any(r["median_us"] for r in rows) and all(r["status"] in ("ok", "refused") for r in rows) else 1


def check_report(path: Path) -> None:
    """Raise CallError before anything is measured where the page could not be written."""
    gone = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if gone:
        raise CallError(f"bench: --report needs {' and '.join(gone)}. To fix: pip install 'fla-dispatch[report]'.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise CallError(f"bench: --report {path}: expected a file in a directory that exists. To fix: make the directory, or name another.")


def picks(recurrence: str, key: Problem, names: list[str], grad: bool) -> list[Pick]:
    """What runs for a Key: each variant with the config that it gets when it is named, and which one a call takes by itself.

    Without names, all that nothing refuses, the reference only where there is no other.
    """
    from ..tuning.bench import DIRECTIONS, Pick

    r = registry.get_recurrence(recurrence)
    alone = decide(r, key, None)
    names = names or [v.variant.name for v in alone.considered if not v.refusals and v.variant.name != "reference"] or ["reference"]
    found = []
    for name in names:
        one = decide(r, key, name)
        for direction in DIRECTIONS[: 2 if grad else 1]:
            candidate, taken = _of(one, direction), _of(alone, direction)
            if candidate is None:
                reasons = [refusal.text() for v in one.considered for refusal in (v.refusals or v.partial)]
                found.append(Pick(name, direction, refusal="; ".join(reasons) or one.reason))
            else:
                chosen = taken is not None and taken.variant.name == name and taken.config == candidate.config
                found.append(Pick(name, direction, candidate.config, chosen=chosen))
    return found


def _of(decision: Decision, direction: str) -> Any:
    return decision.forward if direction == "forward" else decision.backward


def _print(document: dict[str, Any], report: Path | None) -> None:
    console = output.console()
    top, device = document["ceilings"], document["device"]
    console.print(
        f"{document['op']}, {document['dtype']}, {document['regime']}, on {device['name']} ({device['arch']}): copy "
        f"{top['copy_tb_per_s']:.3g} TB/s, matrix product {top['matmul_tflop_per_s']:.3g} TFLOP/s, both measured"
    )
    sizes = {name: [r["sizes"][name] for r in document["rows"]] for name in document["rows"][0]["sizes"]}
    console.print(" ".join(f"{name}={found[0]}" for name, found in sizes.items() if len(set(found)) == 1))
    varying = [name for name, found in sizes.items() if len(set(found)) > 1]
    rows, styles = [], []
    for r in document["rows"]:
        numbers = [output.seconds(None if r["median_us"] is None else r["median_us"] * 1e-6)]
        numbers += ["-" if r[name] is None else f"{r[name]:.3g}" for name in ("tb_per_s", "tflop_per_s")]
        numbers.append("-" if r["share"] is None else f"{r['share']:.0%}")
        worst = [x for x in r["errors"].values() if x is not None]
        error = "not finite" if len(worst) < len(r["errors"]) else f"{max(worst):.1e}" if worst else "-"
        what = [" ".join(f"{n}={r['sizes'][n]}" for n in varying), r["direction"], r["variant"] + (" *" if r["chosen"] else "")]
        rows.append([*what, *numbers, error, f"{r['status']}: {r['detail'][:60]}" if r["detail"] else r["status"]])
        styles.append(None if r["status"] == "ok" else "dim" if r["status"] == "refused" else "red")
    columns = ("sizes", "", "variant", "time", "TB/s", "TFLOP/s", "of ceiling", "error", "status")
    console.print(output.table("", columns, rows, styles=styles))
    console.print("*: what a call takes by itself" + (f"; {report} written" if report else ""))
