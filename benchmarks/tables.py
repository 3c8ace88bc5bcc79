"""Markdown tables of benchmark results, as docs/measured.md shows them.

python -m benchmarks.tables benchmarks/results/h200/scalar_decay.json
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any


def _ms(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}" if x < 10 else f"{x:.1f}"


def scalar_decay(content: dict[str, Any]) -> str:
    """One row per op, shape and mode."""
    lines = [
        "| op | (B, T, H, D) | mode | forward ms | graph | % | fwd + bwd ms | graph | % | error | ran |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in content["rows"]:
        ran = dict.fromkeys((r["forward"]["variant"], r["backward"]["variant"]))
        lines.append(
            f"| {r['op']} | {', '.join(map(str, r['shape']))} | {r['mode']} | {_ms(r['forward_ms'])} | {_ms(r['forward_graph_ms'])} "
            f"| {r['forward_percent']:.0f} | {_ms(r['both_ms'])} | {_ms(r['both_graph_ms'])} | {r['both_percent']:.0f} "
            f"| {r['error']:.1e} | {' / '.join(ran)} |"
        )
    return "\n".join(lines)


def overhead(content: dict[str, Any]) -> str:
    """Microseconds per call of each way, and what it costs over the launcher."""
    lines = ["| call | way | us | over the launcher |", "|---|---|---|---|"]
    for case, ways in content["overhead"].items():
        for way, us in ways.items():
            lines.append(f"| {case} | {way} | {us:.2f} | {us - ways['launcher']:+.2f} |")
    return "\n".join(lines)


def main() -> None:
    for name in sys.argv[1:]:
        content = json.loads(pathlib.Path(name).read_text())
        print(f"`{name}`: {content.get('machine', content.get('setup'))}\n")
        print((overhead if "overhead" in content else scalar_decay)(content) + "\n")


if __name__ == "__main__":
    main()
