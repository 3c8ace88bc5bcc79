"""Markdown tables of benchmark results, as docs/measured.md shows them.

python -m benchmarks.tables benchmarks/results/h200/peers.json
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


def _form(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)


def _gradient_error(errors: dict[str, float]) -> str:
    found = [(e, name) for name, e in errors.items() if name.startswith("d")]
    return "-" if not found else f"{max(found)[0]:.1e} ({max(found)[1]})"


def peers(content: dict[str, Any]) -> str:
    """Two tables, calls of many tokens and steps of one, a row per case and library; then what refused or failed.

    x floor: the eager time over that of the fewest bytes; of: what `bounds.training_bytes` allows.
    """
    lines = [
        "| op | (B, T, H, D) | library | forward ms | graph | x floor | fwd + bwd ms | graph | x floor | extra MiB | of | host us "
        "| error of o | of gradients |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    steps = [
        "| step | (B, H, D) | library | ms | TB/s | graph | TB/s | host us | error of o | of state |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for r in content["rows"]:
        shape, library, errors = r["shape"], r["library"], r.get("errors", {})
        where = ", ".join(map(str, shape)) + (f", N = {r['state']}" if r.get("state") else "")
        if r["decode"]:
            ways = [r.get(way) for way in ("forward_ms", "forward_graph_ms")]
            both = [f"{_form(ms, '.4f')} | {_form(None if ms is None else r['state_bytes'] / ms / 1e9, '.2f')}" for ms in ways]
            steps.append(
                f"| {r['op']} | {shape[0]}, {shape[2]}, {shape[3]} | {library} | {' | '.join(both)} "
                f"| {_form(r.get('forward_host_us'), '.1f')} "
                f"| {_form(errors.get('o'), '.1e')} | {_form(errors.get('state'), '.1e')} |"
            )
        else:
            host = " / ".join(_form(r.get(f"{d}_host_us"), ".0f") for d in ("forward", "both"))
            times = [
                f"{_ms(r.get(f'{d}_ms'))} | {_ms(r.get(f'{d}_graph_ms'))} | {_form(r.get(f'{d}_over_floor'), '.2f')}"
                for d in ("forward", "both")
            ]
            lines.append(
                f"| {r['op']} | {where} | {library} | {' | '.join(times)} | {_form(r.get('both_peak_mib'), '.0f')} "
                f"| {_form(r.get('bound_mib'), '.0f')} | {host} | {_form(errors.get('o'), '.1e')} | {_gradient_error(errors)} |"
            )
        cell = f"{r['op']}{' step' if r['decode'] else ''} ({where}), {library}"
        notes += [f"- {cell}: {what}: {text}" for what, text in r["problems"].items()]
    return "\n".join([*lines, "", *steps, "", *notes]).rstrip()


def first_call(content: dict[str, Any]) -> str:
    """A row per process: its first call, the one after, and what was compiled."""
    lines = ["| process | first call s | second call s | kernels compiled |", "|---|---|---|---|"]
    for name, r in content["processes"].items():
        if "calls" in r:  # warmup
            what = f"{r['keys']} keys, {r['measured']} measured, {r['records']} records"
            lines.append(f"| {name} ({what}) | {r['wall_s']:.1f} in all | | {r['compiled']} |")
        else:
            times = [_form(r.get("first_s"), ".3f"), _form(r.get("second_s"), ".4f")]
            problem = f" ({r['problem']})" if "problem" in r else ""
            lines.append(f"| {name}{problem} | {' | '.join(times)} | {r['compiled']} |")
    return "\n".join(lines)


def table(content: dict[str, Any]) -> str:
    if "overhead" in content:
        return overhead(content)
    if "processes" in content:
        return first_call(content)
    return (peers if "library" in content["rows"][0] else scalar_decay)(content)


def main() -> None:
    for name in sys.argv[1:]:
        content = json.loads(pathlib.Path(name).read_text())
        print(f"`{name}`: {content.get('machine', content.get('setup'))}\n")
        print(table(content) + "\n")


if __name__ == "__main__":
    main()
