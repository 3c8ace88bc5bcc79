"""What commands print with: JSON documents, rich tables and a progress line. rich is imported on first use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def console(*, stderr: bool = False) -> Console:
    """A console that takes text as it is: kernel names and shapes hold brackets, which are no markup."""
    import sys

    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 140  # a pipe has no width of its own; this one keeps a variant on one line
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Sequence[str | None] | None = None) -> Table:
    """A plain table; styles colour whole rows."""
    from rich import box
    from rich.table import Table

    made = Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row, style in zip(rows, styles or [None] * len(rows), strict=True):
        made.add_row(*row, style=style)
    return made


def progress() -> Progress:
    """A progress line on stderr, so that stdout can be piped."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
    )


def seconds(value: float | None) -> str:
    """A duration for people: `0.412 ms`, `1.31 s`."""
    if value is None:
        return "-"
    unit, scale = next(((u, n) for u, n in (("s", 1.0), ("ms", 1e-3)) if value >= n), ("us", 1e-6))
    return f"{value / scale:.3g} {unit}"
