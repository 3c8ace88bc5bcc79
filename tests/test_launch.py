"""The way of a launch past the compiler's own lookup: only where its arguments name one compiled kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from fla_dispatch.kernels._shared import launch as launching
from fla_dispatch.kernels._shared import tape
from fla_dispatch.kernels._shared.launch import launch


class Parameter(NamedTuple):
    name: str
    do_not_specialize: bool = False


class Kernel:
    """Stands in for a compiled function of the arguments (x, y, stride, T) and the constants BT and TMA."""

    params = (Parameter("x"), Parameter("y"), Parameter("stride"), Parameter("T", True), Parameter("BT"), Parameter("TMA"))

    def __init__(self) -> None:
        self.slow: list[tuple[Any, ...]] = []
        self.fast: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            self.slow.append((grid, args, options))
            return Compiled(self)

        return run


class Compiled:
    packed_metadata = ()

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.fast.append((grid, args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setattr(launching, "_compiled", {})
    yield Kernel()
    launching._layout.cache_clear()


X = torch.zeros(64)
CONSTANTS = {"TMA": False, "BT": 32}  # in another order than the parameters


def test_the_second_launch_needs_no_lookup(kernel: Kernel) -> None:
    for T in (7, 9):
        launch(kernel, (5,), (X, None, 16, T), CONSTANTS, 4, 3)
    assert len(kernel.slow) == 1 and kernel.slow[0][2]["num_warps"] == 4
    ((grid, args),) = kernel.fast
    assert grid == (5, 1, 1)
    assert args[0] is X and args[1:] == (None, 16, 9, 32, False)  # constants in the order of the parameters


@pytest.mark.parametrize(
    ("args", "constants", "warps", "stages"),
    [
        ((X.double(), None, 16, 7), CONSTANTS, 4, 3),  # another dtype
        ((X, X, 16, 7), CONSTANTS, 4, 3),  # a tensor where none was
        ((X, None, 16, 7), {**CONSTANTS, "BT": 64}, 4, 3),
        ((X, None, 16, 7), CONSTANTS, 8, 3),
        ((X, None, 16, 7), CONSTANTS, 4, 2),
        ((X[1:], None, 16, 7), CONSTANTS, 4, 3),  # a pointer that is no multiple of 16 bytes
        ((X, None, 24, 7), CONSTANTS, 4, 3),  # a stride that is none
        ((X, None, 1, 7), CONSTANTS, 4, 3),
        ((X, None, 16, 2**31), CONSTANTS, 4, 3),  # 64 bits
        ((X, None, 2**32, 7), CONSTANTS, 4, 3),
    ],
)
def test_whatever_may_be_another_kernel_is_looked_up(
    kernel: Kernel, args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int
) -> None:
    launch(kernel, (5,), (X, None, 16, 7), CONSTANTS, 4, 3)
    launch(kernel, (5,), args, constants, warps, stages)
    assert len(kernel.slow) == 2 and not kernel.fast


def test_unusual_arguments_are_never_remembered(kernel: Kernel) -> None:
    for _ in range(3):
        launch(kernel, (5,), (X[1:], None, 16, 7), CONSTANTS, 4, 3)
    assert len(kernel.slow) == 3 and not launching._compiled


def test_the_interpreter_is_always_called(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *args, **options: self.slow.append(args))
    monkeypatch.delattr(Kernel, "params")
    for _ in range(2):
        launch(kernel, (5,), (X, None, 16, 7), CONSTANTS, 4, 3)
    assert len(kernel.slow) == 2 and not launching._compiled


def test_an_empty_grid_launches_nothing(kernel: Kernel) -> None:
    launch(kernel, (5, 0), (X, None, 16, 7), CONSTANTS, 4, 3)
    assert not kernel.slow


class Launcher:
    """Stands in for Triton's, around a C function."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, launch: Any = "a C function") -> None:
        self.launch = launch

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *args: Any) -> None:
        self.launch(x, y, z, stream, function, False, None, *args)


class Packing(Launcher):
    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *args: Any) -> None:
        self.launch(x, y, z, stream, function, args)


class WithScratch(Launcher):
    global_scratch_size = 64


def test_a_launcher_that_only_adds_arguments_is_passed_by() -> None:
    head = ("function", "metadata", None)
    run = Launcher()
    assert tape._direct(run, head) == (run.launch, ("function", False, None, "metadata", None))
    for other in (Packing(), WithScratch(), print):
        assert tape._direct(other, head) == (other, head)


def test_a_kernel_has_one_name_on_disk_whichever_runs_first() -> None:
    """Else a warmed-up process finds nothing of what another has compiled."""
    code = """
import sys
from fla_dispatch import registry
from fla_dispatch.kernels._shared.launch import settle
registry.load_rooms()
for name in registry.recurrence_names():
    for variant in registry.get_recurrence(name).variants:
        variant.load()
modules = [m for name, m in sorted(sys.modules.items()) if name.startswith("fla_dispatch.kernels")]
kernels = list({id(x): x for m in modules for x in vars(m).values() if hasattr(x, "used_global_vals")}.values())
assert len(kernels) > 10
kernels%s
for kernel in kernels:
    settle(kernel)
print(*sorted(f"{k.__module__}.{k.__name__}={k.cache_key}" for k in kernels))
"""
    found = [
        subprocess.run([sys.executable, "-c", code % order], capture_output=True, text=True, check=True, timeout=120).stdout
        for order in ("", ".reverse()")
    ]
    assert found[0] == found[1] != ""
