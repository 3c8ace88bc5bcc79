"""assert_no_jit and the setting no_jit: a compilation or a measurement raises; what is cached passes; nothing needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from planting import qkv

import fla_dispatch as fd
from fla_dispatch import settings
from fla_dispatch.errors import JitError
from fla_dispatch.testing import assert_no_jit
from fla_dispatch.tuning import jit

#: Compiles one kernel for an H200: ruled out, then as it comes, then from Triton's cache; a listener of others is still called.
COMPILE = """
import sys
import triton, triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fla_dispatch.errors import JitError
from fla_dispatch.testing import assert_no_jit

@triton.jit
def doubled(p_x, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_x + o, tl.load(p_x + o) * 2)

def compile(n):
    return triton.compile(ASTSource(doubled, {"p_x": "*fp32", "N": "constexpr"}, {"N": n}), target=GPUTarget("cuda", 90, 32))

heard = []
if hasattr(knobs, "compilation"):
    knobs.compilation.listener = lambda **event: heard.append(event["cache_hit"])
compile(64)
with assert_no_jit():
    compile(64)  # in Triton's cache
    try:
        compile(128)
    except JitError as error:
        assert "doubled" in str(error), error
    else:
        sys.exit("a compilation passed")
compile(256)
assert heard == [False, True, False, False], heard
"""


@pytest.mark.skipif(settings.current.interpret, reason="nothing is compiled under the interpreter")
def test_compilations_raise(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "compiling.py"
    file.write_text(COMPILE)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "FLA_DISPATCH_NO_JIT": ""}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


def test_measurements_raise() -> None:
    jit.check("measuring")
    with assert_no_jit():
        with assert_no_jit():
            pass
        with pytest.raises(JitError, match=r"measuring.*warmup"):
            jit.check("measuring")
    jit.check("measuring")


def test_every_thread_is_covered() -> None:
    found = []
    with assert_no_jit():
        thread = threading.Thread(target=lambda: found.append(jit.forbidden()))
        thread.start()
        thread.join()
    assert found == [True] and not jit.forbidden()


def test_a_call_that_would_be_tuned_raises() -> None:
    """The policy tune measures inside a call, so it is ruled out; a call that needs no measurement passes."""
    with assert_no_jit():
        fd.op("retention")(*qkv(70))
    with settings.override(miss="tune"), assert_no_jit(), pytest.raises(JitError):
        fd.op("retention")(*qkv(140))


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with settings.override(no_jit=True):
        fd.op("retention")(*qkv(71))
        assert jit.forbidden()
        with settings.override(miss="tune"), pytest.raises(JitError):
            fd.op("retention")(*qkv(280))
    assert not jit.forbidden()
