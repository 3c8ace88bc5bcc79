"""Time over T of retention at B = 8, H = 32, D = 128: ours, FLA and PyTorch's SDPA, as an SVG for the README.

python -m benchmarks.plot results/peers.json docs/images/retention.svg
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
from typing import Any

#: Label, colour and marker; colours after Okabe and Ito, which the colour-blind tell apart, darkened where they are read as text.
LABELS = {
    "ours": ("fla_dispatch", "#007a5a", "o"),
    "fla": ("FLA", "#c24f00", "s"),
    "sdpa_flash": ("SDPA flash", "#0072b2", "^"),
    "sdpa_cudnn": ("SDPA cuDNN", "#a8577e", "v"),
}
SOFTMAX = ("sdpa_flash", "sdpa_cudnn")  # dashed: they compute another function
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
        heights = apart([points[-1][1] for points in found.values()], 1.8)
        for (name, points), height in zip(found.items(), heights, strict=True):
            label, color, marker = LABELS[name]
            if name == "fla":
                label = f"{label} {version}".rstrip()
            width, dash = 2.4 if name == "ours" else 1.5, "--" if name in SOFTMAX else "-"
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4.5, linewidth=width, linestyle=dash)
            weight = "bold" if name == "ours" else "normal"
            place = points[-1][0] * 1.2, height
            axis.annotate(label, place, color=color, va="center", fontsize=9, fontweight=weight, annotation_clip=False)
        ticks = sorted({T for points in found.values() for T, _ in points})
        axis.set(title=title, xlabel="T, tokens of each sequence", xscale="log", yscale="log", xlim=(ticks[0] * 0.8, ticks[-1] * 6))
        axis.set_xticks(ticks, [str(T) if T < 1024 else f"{T // 1024}K" for T in ticks])
        axis.minorticks_off()
        axis.grid(True, color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms per call (median, lower is better)")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    what = f"retention, B = {BATCH[0]}, H = {BATCH[1]}, D = {BATCH[2]}, bfloat16, {machine.get('device', '')}".removesuffix(", ")
    figure.suptitle(f"{what}; dashed: PyTorch's softmax attention on tensors of the same shape", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2]))


if __name__ == "__main__":
    main()
