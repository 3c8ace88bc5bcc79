"""Times of what layers do before the delta rules, by its kernels and in torch, on a GPU.

    python -m benchmarks.transforms [--out results]

Columns: shape, op, what is transformed, by what, direction (forward, or forward and backward of all outputs), median us of a CUDA graph's
replay behind a flushed L2 cache, the fewest megabytes that move, and the part of a copy's bandwidth that is reached with them.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from fla_dispatch.kernels._shared.delta_contract import Gate
from fla_dispatch.kernels.delta import transforms
from fla_dispatch.kernels.delta.cases import Inputs, Sizes, make_inputs

from .common import copy_bandwidth, graph_ms, machine, write

SHAPES = {"4_4096_16_128": Sizes(4, 4096, 16, 16, 128, 128), "8_2048_32_128": Sizes(8, 2048, 32, 32, 128, 128)}
OPS = ("gated_delta", "kda", "comba")


def parts(op: str, x: Inputs) -> dict[str, tuple[list[torch.Tensor], Callable[[], tuple[Any, ...]]]]:
    """rows and vectors of a call: their leaves, and a function that computes them."""
    y = {n: t.detach().requires_grad_() for n, t in x.leaves().items()}
    gate = Gate(y["A_log"], y["dt_bias"], None)
    first = [y[n] for n in ("q", "k", "p") if n in y]
    second = [y[n] for n in ("beta", "g", "A_log", "dt_bias")]
    return {
        "rows": (first, lambda: tuple(z for z in transforms.unit_rows(y["q"], y["k"], y.get("p"), torch.float32) if z is not None)),
        "vectors": (second, lambda: transforms.vectors(y["beta"], False, y["g"], gate, torch.float32)),
    }


def size(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    top, rows = copy_bandwidth(), []
    fused = transforms.fusable
    for shape, sizes in SHAPES.items():
        for op in OPS:
            x = make_inputs(op, sizes, torch.bfloat16, "cuda", options=(("raw", True),))
            for part in ("rows", "vectors"):
                for way in ("kernels", "torch"):
                    transforms.fusable = fused if way == "kernels" else lambda *tensors: False
                    leaves, compute = parts(op, x)[part]
                    with torch.no_grad():  # a graph of autograd that lives here would tie the leaves to this stream, not to a capture's
                        outputs = compute()
                    arriving = [torch.randn_like(z) for z in outputs]

                    def forward(compute: Any = compute) -> object:
                        with torch.no_grad():
                            return compute()

                    def both(compute: Any = compute, leaves: Any = leaves, arriving: Any = arriving) -> object:
                        return torch.autograd.grad(compute(), leaves, arriving)

                    once = size(leaves) + size(outputs)
                    for direction, call, moved in (("forward", forward, once), ("both", both, 2 * once + size(leaves))):
                        us = graph_ms(call) * 1e3
                        row = {"shape": shape, "op": op, "part": part, "way": way, "direction": direction, "us": us}
                        row |= {"mb": moved / 1e6, "of_copy": moved / (us * 1e-6) / top}
                        rows.append(row)
                        print(*[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()], flush=True)
    if given.out is not None:
        write(given.out, "transforms", machine=machine(), rows=rows)


if __name__ == "__main__":
    main()
