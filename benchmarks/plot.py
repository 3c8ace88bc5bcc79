"""Time over T of retention at B = 8, H = 32, D = 128: ours, FLA and PyTorch's SDPA, as an SVG for the README.

python -m benchmarks.plot results/peers.json docs/images/retention.svg
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
from typing import Any

LABELS = {
    "ours": ("fla_dispatch", "#0b6e4f"),
    "fla": ("FLA", "#c2571a"),
    "sdpa_flash": ("SDPA, flash", "#5b6c8f"),
    "sdpa_cudnn": ("SDPA, cuDNN", "#8d6b94"),
}
BATCH = (8, 32, 128)  # B, H, D


def series(content: dict[str, Any], what: str) -> dict[str, list[tuple[int, float]]]:
    """(T, eager milliseconds) by library, in order of T."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in LABELS}
    for r in content["rows"]:
        B, T, H, D = r["shape"]
        if r["op"] == "retention" and (B, H, D) == BATCH and not r["decode"] and r.get(what) is not None:
            found[r["library"]].append((T, r[what]))
    return {name: sorted(points) for name, points in found.items() if points}


def apart(values: list[float], factor: float) -> list[float]:
    """Heights for labels on a logarithmic axis: near the values, in their order, each at least `factor` above the one below."""
    order = sorted(range(len(values)), key=values.__getitem__)
    out = list(values)
    for low, high in itertools.pairwise(order):
        out[high] = max(out[high], out[low] * factor)
    return out


def draw(content: dict[str, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "fla_dispatch", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    machine = content.get("machine", {})
    version = machine.get("flash-linear-attention") or machine.get("fla-core") or ""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.9), sharey=True, layout="constrained")
    for axis, what, title in zip(axes, ("forward_ms", "both_ms"), ("forward", "forward + backward"), strict=True):
        found = series(content, what)
        if not found:
            raise SystemExit(f"no {what} of retention at B, H, D = {BATCH}")
        heights = apart([points[-1][1] for points in found.values()], 1.55)
        for (name, points), height in zip(found.items(), heights, strict=True):
            label, color = LABELS[name]
            if name == "fla":
                label = f"{label} {version}".rstrip()
            axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3.5, linewidth=2.2 if name == "ours" else 1.5)
            weight = "bold" if name == "ours" else "normal"
            axis.annotate(label, (points[-1][0] * 1.15, height), color=color, va="center", fontsize=9, fontweight=weight)
        ticks = sorted({T for points in found.values() for T, _ in points})
        axis.set(title=title, xlabel="tokens", xscale="log", yscale="log", xlim=(ticks[0] * 0.8, ticks[-1] * 5))
        axis.set_xticks(ticks, [str(T) if T < 1024 else f"{T // 1024}K" for T in ticks])
        axis.minorticks_off()
        axis.grid(True, color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("milliseconds")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.suptitle(f"retention, B = 8, H = 32, D = 128, bfloat16, {machine.get('device', '')} (softmax attention for scale)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2]))


if __name__ == "__main__":
    main()
