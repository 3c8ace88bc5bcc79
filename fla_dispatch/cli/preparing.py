"""`fla-dispatch warmup | lock`: their options, needing no torch; the commands are imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="An op; may be repeated.")]
Workload = Annotated[Path | None, typer.Option(help="TOML file of [[call]] tables, see docs/tuning.md.")]
DType = Annotated[list[str] | None, typer.Option(help="dtype of the inputs; may be repeated. Default: bfloat16.")]
Heads = Annotated[int | None, typer.Option(help="Query heads.")]
ValueHeads = Annotated[int | None, typer.Option(help="Value heads, where they are more.")]
HeadDim = Annotated[int | None, typer.Option(help="Head dim of queries, keys and values.")]
ValueDim = Annotated[int | None, typer.Option(help="Head dim of values, where it is another.")]
StateDim = Annotated[int | None, typer.Option(help="State dim N of Mamba-2.")]
StateDType = Annotated[str, typer.Option("--state-dtype", help="dtype of the pools of steps: float32 or bfloat16.")]
Size = Annotated[list[str] | None, typer.Option(help="Any other size of the op, NAME=NUMBER; may be repeated.")]
Batch = Annotated[str | None, typer.Option(help="Sequences of a call: 8 or 1,8. Default: 8 in training, 1,8 in serving.")]
Length = Annotated[
    str | None, typer.Option(help="Tokens of a sequence: 4096, 64,4096 or 64:4096. Default: 4096 in training, 64:4096 in serving.")
]
Train = Annotated[bool, typer.Option("--train", help="Calls with gradients (the default).")]
Serve = Annotated[bool, typer.Option("--serve", help="Prefill with states, and decode, as a call and as a step.")]
Packed = Annotated[str, typer.Option(help="dense, packed or both.")]
Device = Annotated[str | None, typer.Option(help="A torch device. Default: a GPU if there is one.")]


def add_to(app: typer.Typer) -> None:
    """Register both commands."""
    app.command("warmup", short_help="Measure and compile all that a model will call.")(_warmup)
    app.command("lock", short_help="Write down what is decided, or compare with what was.")(_lock)


def _warmup(
    op: Ops = None,
    workload: Workload = None,
    dtype: DType = None,
    heads: Heads = None,
    value_heads: ValueHeads = None,
    head_dim: HeadDim = None,
    value_dim: ValueDim = None,
    state_dim: StateDim = None,
    state_dtype: StateDType = "float32",
    size: Size = None,
    batch: Batch = None,
    length: Length = None,
    train: Train = False,
    serve: Serve = False,
    packed: Packed = "dense",
    device: Device = None,
    budget: Annotated[float, typer.Option(help="Seconds after which no new key is measured.")] = 600.0,
    strict: Annotated[bool, typer.Option("--strict", help="Then prove that nothing would be measured or compiled; exit 1 if so.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Measure and compile nothing: list what is left, exit 1 if anything.")] = False,
    json: Json = False,
) -> None:
    """Measure what is missing for the calls of a model, launch each once so that its kernels are compiled, and say what is left."""
    from . import warmup as command

    words: dict[str, int | str | None] = {
        "heads": heads, "value_heads": value_heads, "head_dim": head_dim, "value_dim": value_dim, "state_dim": state_dim,
        "state_dtype": state_dtype,
    }  # fmt: skip
    uses = ["train"] * train + ["serve"] * serve
    calls = command.calls_of(op or [], uses, dtype or [], words, size or [], batch, length, packed, workload)
    raise typer.Exit(command.run(calls, device, budget, check, strict, json))


def _lock(
    path: Annotated[Path, typer.Argument(help="The lock file.")] = Path("fla-dispatch.lock"),
    workload: Workload = None,
    op: Ops = None,
    dtype: DType = None,
    heads: Heads = None,
    head_dim: HeadDim = None,
    size: Size = None,
    batch: Batch = None,
    length: Length = None,
    train: Train = False,
    serve: Serve = False,
    packed: Packed = "dense",
    device: Device = None,
    add: Annotated[bool, typer.Option("--add", help="Keep the file's decisions of other devices.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing: say which decisions differ, exit 1 if any.")] = False,
    json: Json = False,
) -> None:
    """Write the decision for every recorded key of this device, and for the calls that are named; FLA_DISPATCH_LOCK puts it in force."""
    from . import lock as command
    from .warmup import calls_of

    words: dict[str, int | None] = {"heads": heads, "head_dim": head_dim}
    uses = ["train"] * train + ["serve"] * serve
    named = bool(op or workload)
    calls = calls_of(op or [], uses, dtype or [], words, size or [], batch, length, packed, workload) if named else []
    raise typer.Exit(command.run(path, calls, device, add, check, json))
