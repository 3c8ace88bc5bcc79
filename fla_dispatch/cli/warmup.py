"""`fla-dispatch warmup`: measure what is missing for a model's calls, compile their kernels, and prove that nothing is left."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device import profile
from ..dispatch import warm
from ..errors import CallError
from . import output, parse_sizes
from .tune import device_of

if TYPE_CHECKING:
    from ..tuning.search import Event
    from ..tuning.warmup import Call


def calls_of(
    ops: list[str], uses: list[str], dtypes: list[str], words: dict[str, Any], sizes: list[str], batch: str | None,
    length: str | None, layout: str, workload: Path | None,
) -> list[Call]:  # fmt: skip
    """The calls that a command line names. Raises CallError, UnknownNameError."""
    from ..tuning.warmup import model_calls, parse_numbers, read_workload

    if (workload is None) == (not ops):
        raise CallError("expected --workload FILE or --op NAME, got both or neither. To fix: give one of them.")
    if workload is not None:
        return read_workload(workload)
    found: dict[Call, None] = {}
    for op in ops:
        for use in uses or ["train"]:
            for dtype in dtypes or ["bfloat16"]:
                calls = model_calls(
                    op, use, dtype=dtype, sizes=parse_sizes(sizes), layout=layout,
                    batch=None if batch is None else parse_numbers(batch, "--batch"),
                    lengths=None if length is None else parse_numbers(length, "--length"), **words,
                )  # fmt: skip
                found.update(dict.fromkeys(calls))
    return list(found)


def run(calls: list[Call], device: str | None, budget: float, check: bool, strict: bool, as_json: bool) -> int:
    """Warm up; 1 when something is left that was asked to be done."""
    where = device_of(device)
    keys = list(dict.fromkeys(call.key(profile(where)) for call in calls))
    began = time.monotonic()
    before = warm.missing(keys)
    seconds: dict[str, float] = {}
    left: list[warm.Left] = []
    if not check:
        _tune(before, where, budget)
        seconds["measure"] = time.monotonic() - began
        left += _launch(calls, where)
        seconds["compile"] = time.monotonic() - began - seconds["measure"]
    after = warm.missing(before)
    if check or strict:
        left += [x for x in warm.what_is_left(calls, where) if x not in left]
    document: dict[str, Any] = {
        "device": profile(where).name,
        "calls": len(calls),
        "keys": len(keys),
        "missing": len(before),
        "measured": len(before) - len(after),
        "left": [x._asdict() for x in left],
        "still_missing": [key.text() for key in after],
        "seconds": {**seconds, "all": time.monotonic() - began},
    }
    if as_json:
        output.print_json(document)
    else:
        _print(document)
    return 1 if left or (after and not check) else 0


def _tune(todo: list[Any], device: Any, budget: float) -> None:
    """Measure with a line of progress: the key in hand, its best so far, how many are done, and the time that is left."""
    from rich.progress import TimeRemainingColumn

    if not todo:
        return
    with output.progress() as progress:
        progress.columns = (*progress.columns, TimeRemainingColumn())
        task = progress.add_task("measure", total=len(todo))

        def show(event: Event) -> None:
            progress.update(task, completed=event.done, total=event.total, description=f"{event.stage} {event.text}"[:90])

        warm.tune_missing(todo, device, budget, show)


def _launch(calls: list[Call], device: Any) -> list[warm.Left]:
    with output.progress() as progress:
        task = progress.add_task("launch", total=len(calls))

        def show(call: Call) -> None:
            progress.update(task, advance=1, description=f"launch {call.text()}"[:90])

        return warm.launch_all(calls, device, each=show)


def _print(d: dict[str, Any]) -> None:
    console = output.console()
    console.print(f"{d['device']}: {d['calls']} calls, {d['keys']} keys; {d['missing']} were not measured, {d['measured']} of them are now")
    console.print(", ".join(f"{name} {output.seconds(s)}" for name, s in d["seconds"].items()))
    if d["left"]:
        console.print(output.table("left", ("what", "call", "detail"), [(x["what"], x["call"], x["detail"][:160]) for x in d["left"]]))
    for key in d["still_missing"]:
        console.print(f"not measured: {key}")
    if not d["left"] and not d["still_missing"]:
        console.print("nothing is left to measure or to compile for these calls")
