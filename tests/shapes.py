"""Calls to compile for devices that need not be here, of any room whose recurrence has gradients, and what is checked of them."""

from __future__ import annotations

import ast
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from rooms import room_of

from fla_dispatch import registry
from fla_dispatch.device import hypothetical
from fla_dispatch.kernels._shared import ahead
from fla_dispatch.kernels._shared.launch import Launch, record
from fla_dispatch.problem import Problem

ARCHS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")
PACK = (1000, 0, 1, 3095)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call to compile for: what decides the code is head dims, dtype, decay, packing, states and grouping, not lengths."""

    op: str
    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    H: int = 16
    HV: int = 16
    B: int = 4
    T: int = 4096
    lengths: tuple[int, ...] | None = None
    states: bool = False
    options: tuple[tuple[str, Any], ...] = ()


def recurrence_of(shape: Shape) -> registry.Recurrence:
    return registry.get_recurrence(registry.get_op(shape.op).recurrence)


@functools.cache
def lowered(shape: Shape) -> tuple[Any, Any]:
    """Tensors (on the meta device) and options of the recurrence."""
    op, cases = registry.get_op(shape.op), room_of(shape.op).cases
    made = cases.make_inputs(
        shape.op, cases.Sizes(shape.B, shape.T, shape.H, shape.HV, shape.K, shape.V), shape.dtype, "meta", lengths=shape.lengths,
        initial_state=shape.states, final_state=shape.states, options=shape.options,
    )  # fmt: skip
    lowering = op.contract(*made.args, **made.kwargs)
    return lowering.prepare(lowering.tensors) if lowering.prepare else lowering.tensors, lowering.options


def problem(shape: Shape, arch: str) -> Problem:
    tensors, options = lowered(shape)
    return dataclasses.replace(recurrence_of(shape).problem(tensors, options, True), device=hypothetical(arch))


def launches(shape: Shape, variant: str, config: Any) -> list[Launch]:
    """What forward and backward launch, with every gradient wanted that there is."""
    tensors, options = lowered(shape)
    recurrence = recurrence_of(shape)
    module: Any = recurrence.variant(variant).load()
    with record() as found:
        outputs = module.forward(config, tensors, options)
        arriving = [torch.empty_like(x) if x.dim() > 1 else None for x in outputs[: len(recurrence.output_grads._fields)]]
        wanted = tuple(getattr(tensors, name) is not None for name in recurrence.differentiable)
        module.backward(config, recurrence.residuals(tensors, outputs, options), recurrence.output_grads(*arriving), options, wanted)
    return found


def compile_and_fit(found: list[Launch], arch: str) -> None:
    room = hypothetical(arch).shared_bytes
    for launch in {ahead.launch_key(x): x for x in found}.values():
        compiled = ahead.compile_launch(launch, arch)
        assert compiled.binary
        where = f"{compiled.name} for {arch}, warps {launch.warps}, stages {launch.stages}, {launch.constants}"
        assert compiled.shared <= room, f"{where}: {compiled.shared} B of shared memory, the device has {room} B"


def check_lengths(shape: Shape, variant: str) -> None:
    """The compiled code is the same for every length, batch and number of sequences (T = 1 and multiples of 16 included)."""
    config = recurrence_of(shape).variant(variant).configs(problem(shape, "sm90").key())[0]
    packs = [(1,), (16, 16), (5, 0, 95), PACK, (64,) * 64]
    if shape.lengths is not None:
        others = [dataclasses.replace(shape, lengths=pack, T=sum(pack)) for pack in packs]
    else:
        others = [dataclasses.replace(shape, B=B, T=T) for B, T in ((1, 1), (2, 16), (1, 17), (3, 1000), (16, 4096), (1, 100_000))]
    expected = {ahead.launch_key(x) for x in launches(shape, variant, config)}
    for other in others:
        assert {ahead.launch_key(x) for x in launches(other, variant, config)} == expected


#: Folders of rooms whose kernels run around a recurrence; they have tests of their own.
AROUND = ("ends", "raw")


def kernels_on_disk(room: str) -> set[str]:
    """Jitted functions of a room, or of a folder of one, that ask for their program id."""
    folder = Path(registry.__file__).parent / "kernels" / room
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            jitted = isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
            if jitted and "program_id" in ast.unparse(node):
                found.add(node.name)
    return found


def check_every_kernel(recurrence: registry.Recurrence, shapes: dict[str, Shape], variants: list[str]) -> None:
    """What the variants launch for these shapes are all kernels of the room."""
    seen = set()
    for shape in shapes.values():
        key = problem(shape, "sm90").key()
        for variant in map(recurrence.variant, variants):
            if not variant.static_refusals(key):
                seen |= {x.kernel.__name__ for x in launches(shape, variant.name, variant.configs(key)[0])}
    around = set().union(*(kernels_on_disk(f"{recurrence.name}/{folder}") for folder in AROUND))
    assert seen == kernels_on_disk(recurrence.name) - around
