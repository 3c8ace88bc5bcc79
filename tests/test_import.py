"""What importing costs and touches: no CUDA, no transformers, no triton, no Dynamo, and little time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

#: Packages that neither `import fla_dispatch` nor touching `fd.op` may load.
FORBIDDEN = ("transformers", "triton", "torch._dynamo", "torch._inductor")


def python(code: str, *args: str) -> str:
    """Output of a fresh interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_touches_nothing() -> None:
    code = """
import json, sys
import torch
before = set(sys.modules)
import fla_dispatch as fd
handle = fd.op("retention")
names = fd.ops()
after = set(sys.modules) - before
print(json.dumps({"modules": sorted(after), "cuda": torch.cuda.is_initialized(), "ops": names}))
"""
    found = json.loads(python(code))
    loaded = [m for m in found["modules"] if any(m == f or m.startswith(f + ".") for f in FORBIDDEN)]
    assert not loaded
    assert not found["cuda"]
    assert "retention" in found["ops"]
    variants = [m for m in found["modules"] if m.endswith(("_triton", "chunk_torch"))]
    assert not variants, "variant modules are imported on first use"


def test_package_alone_needs_no_torch() -> None:
    code = "import sys, fla_dispatch; fla_dispatch.__version__; print('torch' in sys.modules)"
    assert python(code).strip() == "False"


def test_import_time() -> None:
    """Less than a second over torch's own import, best of three: other processes may hold the cores."""
    code = """
import time
import torch
started = time.perf_counter()
import fla_dispatch as fd
fd.op("retention")
print(time.perf_counter() - started)
"""
    assert min(float(python(code)) for _ in range(3)) < 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["doctor", "--help"],
        ["ops", "--help"],
        ["explain", "--help"],
        ["demo", "--help"],
        ["warmup", "--help"],
        ["lock", "--help"],
        ["bench", "--help"],
    ],
)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    """Nothing heavy is loaded for help: that, not a clock, keeps it fast on any machine."""
    code = """
import sys
from fla_dispatch.cli import main
try:
    main()
except SystemExit as leave:
    assert not leave.code
print("LOADED", [m for m in ("torch", "triton", "rich", "numpy") if m in sys.modules])
"""
    assert python(code, *arguments).strip().endswith("LOADED []")
