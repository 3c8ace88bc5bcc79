"""`fla-dispatch tune` and `verify`: measure and prove what is untried on this device, and prove again what is remembered."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..device import default_device, profile
from ..errors import CallError, UnknownNameError
from . import output

if TYPE_CHECKING:
    from ..problem import Problem
    from ..tuning.search import Event, Tuner


def device_of(name: str | None) -> torch.device:
    """The torch device of a command, with its index."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnknownNameError(f"--device: {error}") from error
    return torch.device(device.type, 0) if device.type != "cpu" and device.index is None else device


def parse_values(texts: list[str]) -> dict[str, list[int]]:
    """`["T=64,4096", "H=16"]` as lists of numbers."""
    found = {}
    for text in texts:
        name, sep, numbers = text.partition("=")
        parts = numbers.split(",")
        if not sep or not name.isidentifier() or not all(p.isdecimal() for p in parts):
            raise UnknownNameError(
                f"--size: expected NAME=NUMBER or NAME=NUMBER,NUMBER, got {text!r}. To fix: write for example --size T=64,4096."
            )
        found[name] = [int(p) for p in parts]
    return found


def _keys(
    recurrence: str | None, matrix: Path | None, ops: list[str], row: dict[str, Any], device: torch.device
) -> dict[str, list[Problem]]:
    from ..tuning.keys import by_recurrence, expand, read_keys

    if (matrix is None) == (not ops):
        raise CallError("tune: expected --matrix FILE or --op NAME, got both or neither. To fix: give one of them.")
    pairs = expand({"op": ops, **row}, profile(device)) if matrix is None else read_keys(matrix, profile(device))
    found = by_recurrence(pairs)
    return found if recurrence is None else {name: keys for name, keys in found.items() if name == recurrence}


def run(
    recurrence: str | None,
    matrix: Path | None,
    ops: list[str],
    sizes: list[str],
    dtypes: list[str],
    packed: bool,
    grad: bool,
    initial_state: bool,
    final_state: bool,
    device: str | None,
    budget: float,
    key_ms: float,
    limit: float,
    regime: str,
    processes: int | None,
    most: int,
    plugins: list[str],
    again: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    """Tune; 1 when a key has no record with a choice afterwards."""
    import importlib
    import time

    from ..tuning.candidates import recurrence_of
    from ..tuning.search import Tuner

    for name in plugins:
        importlib.import_module(name)
    where = device_of(device)
    switches = {"packed": packed, "grad": grad, "initial_state": initial_state, "final_state": final_state}
    keys = _keys(recurrence, matrix, ops, {**parse_values(sizes), "dtype": dtypes or ["bfloat16"], **switches}, where)
    began, report = time.monotonic(), []
    for name, found in keys.items():
        with output.progress() as progress:
            task = progress.add_task(name, total=None)

            def show(event: Event, task: Any = task, progress: Any = progress) -> None:
                progress.update(task, completed=event.done, total=event.total, description=f"{event.stage} {event.text}"[:90])

            tuner = Tuner(
                recurrence_of(name), found, device=where, budget_seconds=budget - (time.monotonic() - began), key_seconds=key_ms * 1e-3,
                regime=regime, processes=processes, plugins=plugins, limit_seconds=limit, again=again, most=most, out=out,
                progress=show,
            )  # fmt: skip
            tuner.run()
        report.append(_report(name, tuner))
    if as_json:
        output.print_json(report)
    else:
        for part in report:
            _print(part)
    return 0 if report and all(part["keys"] == part["done"] + part["known"] and not part["failures"] for part in report) else 1


def _report(name: str, tuner: Tuner) -> dict[str, Any]:
    chosen = collections.Counter(
        f"{r.direction} {r.choice.variant}" if r.choice else f"{r.direction} nothing" for r in tuner.records.values()
    )
    outcomes: dict[tuple[str, str], Any] = {
        (o.fingerprint, o.status): o for r in tuner.records.values() for o in r.outcomes if o.status != "ok"
    }
    return {
        "recurrence": name,
        "environment": tuner.environment.directory,
        "keys": tuner.done + tuner.known + tuner.left_out,
        "done": tuner.done,
        "known": tuner.known,
        "records": len(tuner.records),
        "chosen": dict(sorted(chosen.items())),
        "rejected": [{"candidate": c, "status": s, "detail": o.detail} for (c, s), o in sorted(outcomes.items())],
        "failures": [{"key": k, "detail": d} for k, d in tuner.failures],
        "seconds": tuner.seconds,
        "compiled": {"ahead": 0 if tuner.crew is None else tuner.crew.count, "late": tuner.late},
    }


def _print(part: dict[str, Any]) -> None:
    console = output.console()
    spent = ", ".join(f"{stage} {output.seconds(s)}" for stage, s in part["seconds"].items())
    compiled = part["compiled"]
    console.print(f"{part['recurrence']} on {part['environment']}")
    console.print(
        f"  {part['done']} keys measured, {part['known']} known, {part['keys'] - part['done'] - part['known']} left; "
        f"{part['records']} records; {spent}; {compiled['ahead']} kernels compiled ahead, {sum(compiled['late'].values())} late"
    )
    for name, count in part["chosen"].items():
        console.print(f"  {count:5d}  {name}")
    if part["rejected"]:
        rows = [(r["status"], r["candidate"], r["detail"][:100]) for r in part["rejected"]]
        console.print(output.table("rejected candidates", ("status", "candidate", "detail"), rows))
    for failure in part["failures"]:
        console.print(f"  failed: {failure['key']}: {failure['detail']}")


def run_verify(device: str | None, recurrence: str | None, regime: str, plugins: list[str], limit: float, as_json: bool) -> int:
    """Prove again; 1 when a record's choice fails."""
    import importlib

    from ..tuning.verify import verify

    for name in plugins:
        importlib.import_module(name)
    with output.progress() as progress:
        task = progress.add_task("verify", total=None)
        found = verify(
            device=device_of(device), recurrence=recurrence, regime=regime, plugins=plugins, limit_seconds=limit,
            progress=lambda done, total, text: progress.update(task, completed=done, total=total, description=text[:90]),
        )  # fmt: skip
    rows = [
        {
            "key": v.record.key,
            "direction": v.record.direction,
            "choice": v.record.choice.fingerprint,
            "status": v.status,
            "detail": v.detail,
        }
        for v in found
        if v.record.choice is not None
    ]
    if as_json:
        output.print_json(rows)
    else:
        counts = collections.Counter(row["status"] for row in rows)
        output.console().print(", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "no records of this device")
        bad = [(r["status"], r["choice"], r["direction"], r["key"], r["detail"]) for r in rows if r["status"] != "ok"]
        if bad:
            output.console().print(output.table("", ("status", "choice", "direction", "key", "detail"), bad))
    return 1 if any(row["status"] not in ("ok", "stale", "gone") for row in rows) else 0
