"""The command line, `fla-dispatch --help`: argument parsing alone, so that help needs no torch.

Each command imports its module when it runs. Exit codes: 0 all is well, 1 something that was expected to work does not,
2 the command line or the call it describes is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FlaDispatchError, UnknownNameError
from .cache import app as _cache
from .preparing import add_to as _add_preparing

# Commands are named apart from their modules (`_doctor`, `doctor`), because importing a module sets its name here.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # importing rich for the help text costs more than everything else that --help does
    pretty_exceptions_enable=False,
    help="Linear attention and state-space recurrences: which kernel runs, why, and whether it is right.",
)

app.add_typer(_cache, name="cache", short_help="The records of what was measured, proven and chosen.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            print(installed("fla-dispatch"))
        except PackageNotFoundError:
            print("not installed (run from its source)")
        raise typer.Exit


@app.command("doctor", short_help="What is here and what can run on it.")
def _doctor(json: Json = False) -> None:
    """What is here: devices, versions, and which variants can run; exits 1 when something expected is broken."""
    from . import doctor as command

    raise typer.Exit(command.run(json))


@app.command("ops", short_help="Every op, its sizes and its variants.")
def _ops(json: Json = False) -> None:
    """Every op with its recurrence, size names and variants."""
    from . import ops as command

    raise typer.Exit(command.run(json))


@app.command("explain", short_help="Which variant would run, and why.")
def _explain(
    op: Annotated[str, typer.Argument(metavar="OP", help="Name of an op, as `fla-dispatch ops` lists them.")],
    device: Annotated[str | None, typer.Option(help="Architecture, here or not: sm90, gfx942, cpu. Default: what is here.")] = None,
    dtype: Annotated[str, typer.Option(help="dtype of the inputs.")] = "bfloat16",
    size: Annotated[list[str] | None, typer.Option(help="A size of the op, NAME=NUMBER; may be repeated.")] = None,
    mode: Annotated[str, typer.Option(help="auto, reference, a family (chunk), or a variant's name.")] = "auto",
    packed: Annotated[bool, typer.Option("--packed", help="Packed sequences (cu_seqlens).")] = False,
    grad: Annotated[bool, typer.Option("--grad", help="With gradients.")] = False,
    initial_state: Annotated[bool, typer.Option("--initial-state", help="With an initial state.")] = False,
    final_state: Annotated[bool, typer.Option("--final-state", help="With the final state returned.")] = False,
    json: Json = False,
) -> None:
    """Which variant would run, why, and why not the others; the device need not be here."""
    from . import explain as command

    sizes = parse_sizes(size or [])
    raise typer.Exit(command.run(op, device, dtype, sizes, mode, packed, grad, initial_state, final_state, json))


@app.command("demo", short_help="Run each op on the device that is here.")
def _demo(
    device: Annotated[str | None, typer.Option(help="A torch device: cpu, cuda, cuda:1. Default: a GPU if there is one.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """Run each op at a realistic size: the variant chosen and why, its error against the reference, and both times."""
    from . import demo as command

    raise typer.Exit(command.run(device, op or [], json))


Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="A module that registers further variants; may be repeated.")]


@app.command("tune", short_help="Measure and prove what is untried on this device.")
def _tune(
    matrix: Annotated[Path | None, typer.Option(help="TOML file of [[keys]] tables: op, dtype, sizes, packed, grad, ...")] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op whose sizes are given; may be repeated.")] = None,
    recurrence: Annotated[str | None, typer.Option(help="Only this recurrence.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Sizes of the ops, NAME=NUMBER,NUMBER; D is every head dim.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="dtype of the inputs; may be repeated. Default: bfloat16.")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Packed sequences (cu_seqlens).")] = False,
    grad: Annotated[bool, typer.Option("--grad", help="With gradients.")] = False,
    initial_state: Annotated[bool, typer.Option("--initial-state", help="With an initial state.")] = False,
    final_state: Annotated[bool, typer.Option("--final-state", help="With the final state returned.")] = False,
    device: Annotated[str | None, typer.Option(help="A torch device. Default: a GPU if there is one.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds after which no new key is begun.")] = 600.0,
    key_ms: Annotated[float, typer.Option(help="Milliseconds of samples for each key.")] = 150.0,
    limit: Annotated[float, typer.Option(help="Seconds of silence after which a candidate is ended.")] = 60.0,
    regime: Annotated[str, typer.Option(help="eager or graph.")] = "eager",
    processes: Annotated[int | None, typer.Option(help="Compile processes. Default: all cores but two.")] = None,
    most: Annotated[int, typer.Option(help="Candidates per key and direction.")] = 12,
    plugin: Plugins = None,
    again: Annotated[bool, typer.Option("--again", help="Measure also what was tried before.")] = False,
    out: Annotated[Path | None, typer.Option(help="A directory that gets the records as packs too.")] = None,
    json: Json = False,
) -> None:
    """Measure and prove what is untried of some keys on this device; every record is kept as soon as it is made."""
    from . import tune as command

    raise typer.Exit(
        command.run(
            recurrence, matrix, op or [], size or [], dtype or [], packed, grad, initial_state, final_state, device, budget, key_ms,
            limit, regime, processes, most, plugin or [], again, out, json,
        )
    )  # fmt: skip


@app.command("verify", short_help="Prove the remembered choices again on this device.")
def _verify(
    recurrence: Annotated[str | None, typer.Option(help="Only this recurrence.")] = None,
    device: Annotated[str | None, typer.Option(help="A torch device. Default: a GPU if there is one.")] = None,
    regime: Annotated[str, typer.Option(help="eager or graph.")] = "eager",
    limit: Annotated[float, typer.Option(help="Seconds of silence after which a candidate is ended.")] = 60.0,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Prove the choice of every record of this device again, once for all records that share a proof; exits 1 if one fails."""
    from . import tune as command

    raise typer.Exit(command.run_verify(device, recurrence, regime, plugin or [], limit, json))


@app.command("bench", short_help="Time, rates and errors of an op's variants, as a page.")
def _bench(
    op: Annotated[str, typer.Option(help="The op.")],
    report: Annotated[Path | None, typer.Option(help="An HTML file to write, which needs nothing else to be shown.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Sizes of the op, NAME=NUMBER,NUMBER; D is every head dim.")] = None,
    dtype: Annotated[str, typer.Option(help="dtype of the inputs.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="A torch device. Default: a GPU if there is one.")] = None,
    variants: Annotated[list[str] | None, typer.Option(help="Variants or families, NAME,NAME. Default: all that may run.")] = None,
    grad: Annotated[bool, typer.Option("--grad", help="Backward too.")] = False,
    regime: Annotated[str, typer.Option(help="eager or graph.")] = "eager",
    seconds: Annotated[float, typer.Option(help="Seconds of samples for each size and direction.")] = 0.5,
    json: Json = False,
) -> None:
    """Measure an op's variants at some sizes against float64 and the device's measured ceilings; exits 1 if one fails or is wrong."""
    from . import bench as command

    raise typer.Exit(command.run(op, report, size or [], dtype, device, variants or [], grad, regime, seconds, json))


_add_preparing(app)


def parse_sizes(texts: list[str]) -> dict[str, int]:
    """`["T=4096", "H=16"]` as a dict."""
    sizes = {}
    for text in texts:
        name, sep, number = text.partition("=")
        if not sep or not name.isidentifier() or not number.isdecimal():
            raise UnknownNameError(f"--size: expected NAME=NUMBER, got {text!r}. To fix: write for example --size T=4096.")
        sizes[name] = int(number)
    return sizes


def main() -> None:
    """Entry point of the command line; errors of the library become one line on stderr and exit code 2."""
    try:
        app()
    except FlaDispatchError as error:
        print(f"fla-dispatch: {error}", file=sys.stderr)
        sys.exit(2)
