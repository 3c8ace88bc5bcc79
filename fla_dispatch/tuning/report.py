"""The page of a measurement: one HTML file with its pictures and its data inside, which loads nothing and runs nothing.

Needs matplotlib and jinja2 (the extra `report`), so nothing else imports this module at its top.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html.j2")

#: Colours that differ for every kind of colour vision (Okabe and Ito), and a marker each, since colour alone is not enough.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vPX"
_LINES = ("-", "--", ":", "-.")
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fla-dispatch", "font.family": "sans-serif", "font.size": 9, "axes.grid": True,
               "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}  # fmt: skip

Row = dict[str, Any]


def page(document: dict[str, Any]) -> str:
    """The HTML of a document that `bench.measure` made."""
    rows: list[Row] = document["rows"]
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(duration=_duration, number=_number, error=_error, sizes=_sizes)
    timed = [row for row in rows if row["tflop_per_s"]]
    with matplotlib.rc_context(_STYLE):
        roofline = Markup(_svg(_roofline(timed, directions, document["ceilings"]), "roofline")) if timed else ""
        times = Markup(_svg(_times(timed, directions), "times")) if timed else ""
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        document=document, rows=sorted(rows, key=_order), groups=_error_tables(rows, directions), roofline=roofline, times=times,
        data=Markup(embedded(document)), same=_shared(rows),
    )  # fmt: skip


def embedded(document: dict[str, Any]) -> str:
    """The document as JSON that may stand inside a script element: no text of it can end the element."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _order(row: Row) -> tuple[Any, ...]:
    return row["direction"] == "backward", tuple(row["sizes"].values()), row["median_us"] or float("inf")


def _varying(rows: list[Row]) -> list[str]:
    """Names of sizes that are not the same in all rows."""
    return [name for name in (rows[0]["sizes"] if rows else ()) if len({row["sizes"][name] for row in rows}) > 1]


def _shared(rows: list[Row]) -> str:
    """The sizes that all rows have."""
    varying = _varying(rows)
    return " ".join(f"{name}={n}" for name, n in (rows[0]["sizes"] if rows else {}).items() if name not in varying)


def _length(rows: list[Row]) -> str:
    """The size that tokens are counted by: T, or the rows of a step."""
    return "T" if "T" in rows[0]["sizes"] else "B"


def _sizes(row: Row, rows: list[Row]) -> str:
    return " ".join(f"{name}={row['sizes'][name]}" for name in _varying(rows) or [_length(rows)])


def _error_tables(rows: list[Row], directions: list[str]) -> list[dict[str, Any]]:
    """One table for each direction: its outputs or gradients, the rows that have errors, and the tolerances (one dtype, so one each)."""
    found = []
    for direction in directions:
        judged = sorted((row for row in rows if row["direction"] == direction and row["errors"]), key=_order)
        tolerances = {name: x for row in judged for name, x in row["tolerances"].items()}
        found.append({"direction": direction, "names": list(tolerances), "rows": judged, "tolerances": tolerances})
    return found


def _duration(us: float | None) -> str:
    if us is None:
        return "–"
    unit, scale = next(((u, n) for u, n in (("s", 1e6), ("ms", 1e3)) if us >= n), ("µs", 1.0))
    return f"{us / scale:.3g} {unit}"


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}"


def _error(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.1e}"


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element for an HTML page: no prologue, no metadata, no namespaces, and ids that are its own."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)  # it would hold for the whole page; the page has its own
    return re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)


def _axes(directions: list[str], height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.4 * len(directions), height), layout="constrained")
    grid = figure.subplots(1, len(directions), squeeze=False)
    return figure, list(grid[0])


def _look(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each variant, the same in both pictures."""
    names = sorted({row["variant"] for row in rows})
    return {name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]} for i, name in enumerate(names)}


def _legend(figure: Figure, grid: list[Axes]) -> None:
    """One legend for all axes, below them: inside it would cover points."""
    found = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=4, fontsize=8)


def _roofline(rows: list[Row], directions: list[str], top: dict[str, float]) -> Figure:
    """TFLOP/s over operations per byte; TB/s are the diagonals, of which the ceiling's is drawn. Larger markers are more tokens."""
    figure, grid = _axes(directions, 4.2)
    looks, T = _look(rows), _length(rows)
    lengths = sorted({row["sizes"][T] for row in rows})
    copy, product = top["copy_tb_per_s"], top["matmul_tflop_per_s"]
    ridge = product / copy
    for axes, direction in zip(grid, directions, strict=True):
        here = [row for row in rows if row["direction"] == direction]
        intensities = [row["flops"] / row["bytes"] for row in here] + [ridge]
        low, high = min(intensities) / 3, max(intensities) * 3
        axes.plot([low, ridge, high], [low * copy, product, product], color="#555555", linewidth=1.2, label="measured ceiling")
        axes.annotate(f"copy {copy:.3g} TB/s", (low, low * copy), xytext=(10, -2), textcoords="offset points", fontsize=8)
        axes.annotate(
            f"matrix product {product:.3g} TFLOP/s", (high, product), xytext=(0, 4), textcoords="offset points", fontsize=8, ha="right"
        )
        for name, look in looks.items():
            mine = [row for row in here if row["variant"] == name]
            axes.scatter(
                [row["flops"] / row["bytes"] for row in mine], [row["tflop_per_s"] for row in mine],
                [18 + 70 * (lengths.index(row["sizes"][T]) + 1) / len(lengths) for row in mine],
                color=look["color"], marker=look["marker"], alpha=0.7, label=name,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title=direction)
    _legend(figure, grid)
    return figure


def _times(rows: list[Row], directions: list[str]) -> Figure:
    """Median time over T, one line for each variant and each combination of the other sizes that vary."""
    figure, grid = _axes(directions, 4.2)
    looks, T = _look(rows), _length(rows)
    others = [name for name in _varying(rows) if name != T]
    groups = list(dict.fromkeys(tuple(row["sizes"][name] for name in others) for row in rows))
    for axes, direction in zip(grid, directions, strict=True):
        for name, look in looks.items():
            for i, group in enumerate(groups):
                mine = [row for row in rows if row["direction"] == direction and row["variant"] == name]
                mine = sorted((r for r in mine if tuple(r["sizes"][n] for n in others) == group), key=lambda r: r["sizes"][T])
                label = " ".join([name, *(f"{n}={x}" for n, x in zip(others, group, strict=True))])
                if mine:
                    points = [r["sizes"][T] for r in mine], [r["median_us"] for r in mine]
                    axes.plot(*points, linestyle=_LINES[i % len(_LINES)], markersize=4, linewidth=1.2, label=label, **look)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel=f"{T} ({'tokens' if T == 'T' else 'rows'})", ylabel="median time (µs)", title=direction)
        axes.set_xticks(sorted({row["sizes"][T] for row in rows}))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.minorticks_off()
    _legend(figure, grid)
    return figure
