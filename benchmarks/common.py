"""What the benchmarks share: timing (eager and CUDA graph), the machine's measured ceiling, and where results go."""

from __future__ import annotations

import datetime
import importlib
import json
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import torch
import triton

import fla_dispatch as fd
from fla_dispatch import registry


def op_of(label: str) -> str:
    """The op of a label: the op alone, or with ` normalized` after it."""
    return label.split()[0]


def options_of(label: str) -> tuple[tuple[str, Any], ...]:
    """Keyword arguments of the op that a label stands for."""
    return (("normalize", True),) if label.endswith(" normalized") else ()


def room_of(label: str) -> Any:
    """The recurrence of a label's op."""
    return registry.get_recurrence(registry.get_op(op_of(label)).recurrence)


def cases_of(label: str) -> Any:
    """The module of its room that makes inputs and knows what errors are relative to."""
    return importlib.import_module(f"fla_dispatch.kernels.{room_of(label).name}.cases")


def eager_ms(call: Callable[[], object], rep: int = 60) -> float:
    """Median milliseconds of a call that the host issues, L2 flushed between calls."""
    return float(triton.testing.do_bench(call, warmup=15, rep=rep, return_mode="median"))


def graph_ms(call: Callable[[], object], rep: int = 60) -> float:
    """Median milliseconds of a replay of the call's CUDA graph, L2 flushed between replays: the kernels without the host."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return float(triton.testing.do_bench(graph.replay, warmup=10, rep=rep, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, read plus written: the ceiling that percentages refer to."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), warmup=20, rep=100, return_mode="median")
    return 2 * source.numel() / (float(ms) * 1e-3)


def machine() -> dict[str, Any]:
    """What a measured row must say of its machine."""
    p = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.date.today().isoformat(),
        "device": p.name,
        "units": p.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "fla_dispatch": fd.__version__,
    }


def write(out: pathlib.Path, name: str, **content: Any) -> None:
    """Write results; a run that is cut meanwhile leaves the file of before."""
    out.mkdir(parents=True, exist_ok=True)
    if "machine" not in content:
        content = {"machine": machine(), **content}
    new = out / f"{name}.json.new"
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(out / f"{name}.json")
