"""Every scalar-decay op and variant, forward and forward + backward, on a GPU, with error and percent of copy bandwidth.

    python -m benchmarks.scalar_decay --out results [--variants sweep_triton,chunk_triton] [--ops retention]

Percent: the time that the fewest bytes would take at the measured copy bandwidth (inputs once, outputs once, for forward;
for forward + backward also q, k, v, do and the three gradients once), over the measured time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import pathlib
from typing import Any

import torch

import fla_dispatch as fd
from fla_dispatch.kernels.scalar_decay.cases import Inputs, Sizes, make_inputs

from .bounds import floor_bytes
from .common import copy_bandwidth, eager_ms, graph_ms, machine, op_of, options_of, write

SHAPES = ((4, 4096, 16, 128), (8, 2048, 32, 64), (1, 32768, 8, 128))
OPS = ("retention", "lightning_attn", "linear_attn", "linear_attn normalized", "simple_gla", "mamba2")
VARIANTS = ("auto", "sweep_triton", "chunk_triton", "recurrent_triton", "chunk_torch")


def inputs_of(label: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Inputs:
    B, T, H, D = shape
    op = op_of(label)
    sizes = Sizes(B, T, 1 if op == "mamba2" else H, H, D, D)
    found = make_inputs(op, sizes, dtype, "cuda", options=options_of(label))
    leaves = {name: x.detach().requires_grad_() for name, x in found.leaves().items()}
    return found.replaced(leaves)


def error(label: str, shape: tuple[int, ...], mode: str) -> float:
    """Relative error of the output against float64 (the reference) on the same sizes with 300 tokens."""
    B, _, H, D = shape
    short = inputs_of(label, (B, 300, H, D))
    op = op_of(label)
    with torch.no_grad():
        o, _ = fd.op(op, mode=mode)(*short.args, **short.kwargs)
        wide = short.replaced({name: x.double() for name, x in short.leaves().items()})
        want, _ = fd.op(op, mode="reference")(*wide.args, **wide.kwargs)
    return float((o.double() - want).norm() / want.norm())


def measure(label: str, shape: tuple[int, ...], mode: str, ceiling: float, rep: int = 60) -> dict[str, Any]:
    op = fd.op(op_of(label), mode=mode)
    found = inputs_of(label, shape)
    leaves = list(found.leaves().values())
    with torch.no_grad():
        o, _ = op(*found.args, **found.kwargs)
    do = torch.randn_like(o)
    explained = op.explain(*found.args, **found.kwargs)
    plain = found.replaced({name: x.detach() for name, x in found.leaves().items()})

    def forward() -> object:
        with torch.no_grad():
            return op(*plain.args, **plain.kwargs)

    def both() -> object:
        return torch.autograd.grad(op(*found.args, **found.kwargs)[0], leaves, do)

    fewest = [b / ceiling * 1e3 for b in floor_bytes(op_of(label), found)]
    row: dict[str, Any] = {"op": label, "shape": shape, "mode": mode, "error": error(label, shape, mode)}
    row["forward"] = {"variant": explained.forward[0], "config": explained.forward[1]}
    row["backward"] = {"variant": explained.backward[0], "config": explained.backward[1]}
    for name, call, floor in (("forward_ms", forward, fewest[0]), ("both_ms", both, fewest[1])):
        row[name] = eager_ms(call, rep)
        row[name.replace("ms", "graph_ms")] = graph_ms(call, rep) if "torch" not in mode else None
        row[name.replace("ms", "percent")] = 100 * floor / (row[name.replace("ms", "graph_ms")] or row[name])
    return row


def _warm(job: tuple[str, tuple[int, ...], str]) -> str:
    """Compile what a measurement will launch (into Triton's cache), in a process of its own."""
    label, shape, mode = job
    found = inputs_of(label, shape)
    o, _ = fd.op(op_of(label), mode=mode)(*found.args, **found.kwargs)
    torch.autograd.grad(o, list(found.leaves().values()), torch.randn_like(o))
    torch.cuda.synchronize()
    return label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--rep", type=int, default=60, help="milliseconds of repetition per timing")
    parser.add_argument("--processes", type=int, default=8)
    given = parser.parse_args()
    jobs = list(itertools.product(given.ops.split(","), SHAPES, given.variants.split(",")))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.processes, mp_context=context) as pool:
        list(pool.map(_warm, [j for j in jobs if "torch" not in j[2]]))
    ceiling = copy_bandwidth()
    print(machine(), f"copy {ceiling / 1e12:.2f} TB/s")
    print(
        f"{'op':24}{'(B, T, H, D)':22}{'mode':18}{'forward':>9}{'graph':>8}{'%':>5}{'fwd+bwd':>10}{'graph':>8}{'%':>5}{'error':>9}  chosen"
    )
    rows = []
    for label, shape, mode in jobs:
        row = measure(label, shape, mode, ceiling, given.rep)
        rows.append(row)
        graphs = [f"{row[k]:8.3f}" if row[k] else f"{'-':>8}" for k in ("forward_graph_ms", "both_graph_ms")]
        print(
            f"{label:24}{shape!s:22}{mode:18}{row['forward_ms']:9.3f}{graphs[0]}{row['forward_percent']:5.0f}"
            f"{row['both_ms']:10.3f}{graphs[1]}{row['both_percent']:5.0f}{row['error']:9.1e}"
            f"  {row['forward']['variant']} / {row['backward']['variant']}",
            flush=True,
        )
        write(given.out, "scalar_decay", copy_bandwidth=ceiling, rows=rows)


if __name__ == "__main__":
    main()
