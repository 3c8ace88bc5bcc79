"""What stands for a measurement: the text of its key, the environment it was made in, and the hash of the code that ran."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

import fla_dispatch as fd
from fla_dispatch import registry, settings
from fla_dispatch.device import DeviceProfile, hypothetical, known_archs, package_version, profile
from fla_dispatch.problem import Problem
from fla_dispatch.sequences import SeqInfo
from fla_dispatch.tuning.environment import Environment, compiler_version, current, device_slug, memory_class, regime_of, triton_version
from fla_dispatch.tuning.hashing import kernel_hash, module_hash
from fla_dispatch.tuning.records import record_key
from fla_dispatch.tuning.store import split_key

# -- keys --------------------------------------------------------------------------------------------------------------------


def problem(name: str, device: str, convert: Callable[[Any], Any] = lambda x: x, **example: Any) -> Problem:
    """The problem of an op's example call, as eager calls, warmup, tuner and command line all build it."""
    op = registry.get_op(name)
    sizes = {size: 70 if size == "T" else n for size, n in op.sizes.items()}
    args, kwargs = tree_map(convert, op.example(sizes, torch.bfloat16, device, **example))
    low = op.contract(*args, **kwargs)
    recurrence = registry.get_recurrence(low.recurrence)
    return recurrence.problem(low.tensors, low.options, True)


EXAMPLES = [{}, {"lengths": [3, 0, 60, 7]}, {"initial_state": True, "output_final_state": True}]


@pytest.mark.parametrize("example", EXAMPLES, ids=["dense", "packed", "states"])
@pytest.mark.parametrize("name", fd.ops())
def test_key_text_is_the_same_from_real_fake_and_meta_tensors(name: str, example: dict[str, Any]) -> None:
    step = "T" not in registry.get_op(name).sizes
    if step and "lengths" in example:
        pytest.skip("a step has no packs")
    mode = FakeTensorMode()
    faked = []

    def fake(x: Any) -> Any:
        if isinstance(x, SeqInfo):
            return SeqInfo(fake(x.cu_seqlens), fake(x.host), fake(x.segments))
        if isinstance(x, torch.Tensor):
            faked.append(x)
            return mode.from_tensor(x)
        return x

    key = record_key(problem(name, "cpu", **example))
    assert record_key(problem(name, "cpu", fake, **example)) == key and faked
    # meta is no device of its own: whoever describes a call by meta tensors names the device
    meta = dataclasses.replace(problem(name, "meta", **example), device=profile(torch.device("cpu")))
    assert record_key(meta) == key
    expected = meta.key()
    length = 1 if step else 256 if name == "delta_product" else 128  # delta_product has two updates a token
    assert split_key(key)[1] == (expected.BH, length, expected.N, expected.mean_length)


# -- environments ------------------------------------------------------------------------------------------------------------


def device(**changes: Any) -> DeviceProfile:
    return dataclasses.replace(hypothetical("sm90"), **changes)


@pytest.mark.parametrize("arch", known_archs())
@pytest.mark.parametrize("regime", ["eager", "graph"])
def test_directories_are_environments(arch: str, regime: str) -> None:
    env = current(hypothetical(arch), regime)
    assert Environment.parse(env.directory) == env and env.arch == arch
    assert env.directory.count("/") == 1 and env.directory == env.directory.lower()


def test_a_device_described_is_the_device_that_is_here() -> None:
    """Explaining for an H200 elsewhere finds the records of an H200: names differ by vendor, memory by what is reserved."""
    real = device(name="NVIDIA H200", memory_bytes=150_109_880_320)
    assert device_slug(real) == device_slug(hypothetical("sm90")) == "h200-sm90-132u-144g"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85 << 30},
        {"name": "NVIDIA H200 MIG 1g.18gb", "units": 16, "memory_bytes": 18 << 30},
        {"units": 114},
        {"arch": "sm100"},
        {"memory_bytes": 96 << 30},
    ],
)
def test_other_devices_and_partitions_are_apart(changes: dict[str, Any]) -> None:
    assert device_slug(device(**changes)) != device_slug(device())


def test_slugs_are_plain_names() -> None:
    assert device_slug(device(name="Intel(R) Data Center GPU Max 1550", arch="xe")).startswith("data_center_gpu_max_1550-xe-")
    assert device_slug(device(name="AMD Instinct MI300X", arch="gfx942")).startswith("mi300x-gfx942-")
    assert device_slug(device(name="??", vendor="nvidia")).startswith("nvidia-sm90-")


@pytest.mark.parametrize(
    ("gib", "expected"), [(7.8, 8), (11.9, 12), (15.7, 16), (23.6, 24), (39.4, 40), (79.1, 80), (139.8, 144), (191.5, 192)]
)
def test_memory_class(gib: float, expected: int) -> None:
    assert memory_class(int(gib * 2**30)) == expected


def test_toolchain(tmp_path: Path) -> None:
    numbers = package_version("triton")
    assert triton_version() == ("none" if numbers is None else ".".join(map(str, numbers)))
    assert current(torch.device("cpu")).triton == current(torch.device("cpu")).compiler == "none"
    assembler = tmp_path / "ptxas"
    assembler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.7'\n")
    assembler.chmod(0o755)
    before = current(hypothetical("sm90"))
    with settings.override(ptxas=str(assembler)):
        assert compiler_version(hypothetical("sm90")) == "ptxas12.9.7"
        assert before.differences(current(hypothetical("sm90"))) == {"compiler": (before.compiler, "ptxas12.9.7")}
    with settings.override(ptxas=str(tmp_path / "nowhere")):
        assert compiler_version(hypothetical("sm90")) == "ptxasunknown"
    assert current(hypothetical("sm90")) == before and before.compiler.startswith("ptxas1")


def test_regimes() -> None:
    captured = dataclasses.replace(problem("retention", "cpu"), capture=True)
    assert regime_of(captured) == "graph" and regime_of(dataclasses.replace(captured, capture=False)) == "eager"
    with pytest.raises(ValueError, match="eager, graph"):
        current(hypothetical("sm90"), "warm")


# -- hashes ------------------------------------------------------------------------------------------------------------------

KERNEL = '''"""Equation (1)."""
import triton
import triton.language as tl

from .parts import HALF, body, unused
from . import launcher

LOG2E = tl.constexpr(1.44)
SPARE: tl.constexpr = 7


@triton.jit(do_not_specialize=["T"])
def kernel(x, T, BT: tl.constexpr):
    """What it does."""
    body(x, T * LOG2E, BT)  # a comment


def forward(config, tensors, options):
    launcher.launch(kernel, HALF)


def backward(config, residuals, grads, options, wanted: int):
    return forward(config, residuals, options)


def elsewhere():
    return unused() + SPARE
'''
PARTS = """import triton

HALF = 0.5


@triton.jit
def deepest(x):
    return x + 1


@triton.jit
def body(x, s, BT):
    return deepest(x) * s


def unused():
    return 1
"""
LAUNCHER = "def launch(kernel, half: float) -> None:\n    kernel[(1,)](half, num_warps=4)\n"

Hash = Callable[..., str]
_numbers = itertools.count()


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hash]:
    """hashed(kernel=..., parts=..., **more files) -> the hash of a variant in a new package with these sources."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(kernel: str = KERNEL, parts: str = PARTS, launcher: str = LAUNCHER, **others: str) -> str:
        name = f"hashed_{next(_numbers)}"  # sources are parsed once per process, by name
        (tmp_path / name).mkdir()
        for file, text in {"__init__": "", "kernel": kernel, "parts": parts, "launcher": launcher, **others}.items():
            (tmp_path / name / f"{file}.py").write_text(text)
        importlib.invalidate_caches()
        found = module_hash(f"{name}.kernel")
        assert len(found) == 24 and name not in sys.modules and f"{name}.kernel" not in sys.modules, "hashed without importing"
        return found

    yield write


def edit(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def test_hash_is_the_same_for_the_same_code(hashed: Hash) -> None:
    assert hashed() == hashed()


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"kernel": edit(KERNEL, "  # a comment", "")}, id="comment"),
        pytest.param({"kernel": edit(KERNEL, "What it does", "Other words")}, id="docstring"),
        pytest.param({"kernel": edit(KERNEL, '    """What it does."""\n', "")}, id="no_docstring"),
        pytest.param({"kernel": edit(KERNEL, "Equation (1)", "Equation (2)")}, id="module_docstring"),
        pytest.param({"kernel": edit(KERNEL, "body(x, T * LOG2E, BT)", "body(\n        x,\n        (T * LOG2E), BT,\n    )")}, id="format"),
        pytest.param({"kernel": edit(KERNEL, '(do_not_specialize=["T"])', "")}, id="decorator"),
        pytest.param({"parts": edit(PARTS, "@triton.jit\ndef deepest", "@other\n@triton.jit\ndef deepest")}, id="callee_decorator"),
        pytest.param({"kernel": "\n\n" + KERNEL}, id="lines"),
        pytest.param({"kernel": edit(KERNEL, "wanted: int", "wanted: bool")}, id="type_of_host_code"),
        pytest.param({"kernel": edit(KERNEL, "SPARE: tl.constexpr = 7", "SPARE: tl.constexpr = 8")}, id="constant_out_of_reach"),
        pytest.param({"parts": edit(PARTS, "return 1\n", "return 2\n")}, id="function_out_of_reach"),
        pytest.param({"parts": PARTS + "\n\ndef added():\n    return 3\n"}, id="function_added"),
        pytest.param({"kernel": edit(KERNEL, "import triton\n", "import math\nimport triton\n")}, id="import_added"),
        pytest.param(
            {"parts": edit(PARTS, "@triton.jit\ndef deepest(x):\n    return x + 1\n", "from .deep import deepest\n"),
             "deep": "import triton\n@triton.jit\ndef deepest(x):\n    return x + 1\n"},
            id="callee_moved_to_another_file",
        ),
        pytest.param({"parts": "HALF = 0.5" + edit(PARTS, "HALF = 0.5\n", "").replace("import triton", "\nimport triton")}, id="order"),
        pytest.param(
            {"kernel": edit(KERNEL, "from .parts import HALF, body, unused", "from .hub import *"), "hub": "from .parts import *\n"},
            id="stars",
        ),
    ],
)  # fmt: skip
def test_hash_does_not_change(hashed: Hash, files: dict[str, str]) -> None:
    assert hashed(**files) == hashed()


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"kernel": edit(KERNEL, "T * LOG2E", "T / LOG2E")}, id="kernel"),
        pytest.param({"kernel": edit(KERNEL, "BT: tl.constexpr", "BT")}, id="type_of_compiled_code"),
        pytest.param({"parts": edit(PARTS, "deepest(x) * s", "deepest(x) + s")}, id="callee"),
        pytest.param({"parts": edit(PARTS, "x + 1", "x + 2")}, id="callee_of_callee"),
        pytest.param({"parts": edit(PARTS, "x + 1", "x + 1.0")}, id="int_to_float"),
        pytest.param({"kernel": edit(KERNEL, "constexpr(1.44)", "constexpr(1.45)")}, id="constant"),
        pytest.param({"parts": edit(PARTS, "HALF = 0.5", "HALF = 0.25")}, id="constant_of_another_file"),
        pytest.param({"launcher": edit(LAUNCHER, "num_warps=4", "num_warps=8")}, id="launcher"),
        pytest.param({"kernel": edit(KERNEL, "return forward(config, residuals, options)", "return None")}, id="backward"),
        pytest.param({"parts": edit(PARTS, "HALF = 0.5", "HALF = 0.5\nHALF += 1")}, id="constant_bound_again"),
        pytest.param({"parts": edit(PARTS, "HALF = 0.5", "if True:\n    HALF = 0.25\nelse:\n    HALF = 0.5")}, id="constant_in_a_branch"),
    ],
)
def test_hash_changes(hashed: Hash, files: dict[str, str]) -> None:
    assert hashed(**files) != hashed()


def test_imports_in_circles_end(hashed: Hash) -> None:
    assert hashed(parts="from .ring import HALF, body, unused\n", ring="from .parts import HALF, body, unused\n") != hashed()


def test_a_variant_without_source_has_no_hash_to_agree_with(hashed: Hash) -> None:
    assert module_hash("no.such.module") == module_hash("itertools") == "unknown"


def test_hashes_of_the_registered_variants() -> None:
    """All known, all different, and taken without loading a kernel."""
    code = """
import sys
from fla_dispatch.tuning.hashing import module_hash
names = ["sweep_triton", "sweep_gluon", "chunk_triton", "states_triton", "parallel_triton", "recurrent_triton", "chunk_torch", "reference"]
print(*[module_hash(f"fla_dispatch.kernels.scalar_decay.{name}") for name in names])
assert not {"torch", "triton"} & set(sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.split()
    variants = registry.get_recurrence("scalar_decay").variants
    assert found == [kernel_hash(v) for v in variants if v.module.startswith("fla_dispatch.")]
    assert len(set(found)) == len(found) == 8 and "unknown" not in found
