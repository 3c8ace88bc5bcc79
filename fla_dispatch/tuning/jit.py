"""Ruling out compilation and measurement: what a warmed-up process promises, and how a breach becomes an error.

Loading a compiled kernel from Triton's cache on disk is no compilation. Triton reports compilations to a listener after the
fact; the error is raised there, so the compiled kernel is in the cache and the same call passes next time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import JitError

_depth = 0
_lock = threading.Lock()
_listening = False
_for_good = False


def forbidden() -> bool:
    """Whether compilations and measurements raise now."""
    from .. import settings

    return _depth > 0 or settings.current.no_jit


def check(what: str) -> None:
    """Raise JitError if measurements are ruled out; the tuner asks before it measures."""
    if forbidden():
        raise JitError(
            f"{what}: ruled out by assert_no_jit or the setting no_jit. To fix: warm up this call before (`fla-dispatch warmup`)."
        )


def _compiled(kernel: str) -> None:
    if forbidden():
        raise JitError(
            f"the kernel {kernel} was compiled, which assert_no_jit or the setting no_jit rules out. To fix: warm up this call before "
            "(`fla-dispatch warmup`)."
        )


def _listener(before: Callable[..., Any] | None) -> Callable[..., Any]:
    def listen(*, src: Any, metadata: dict[str, Any], metadata_group: dict[str, Any], times: Any, cache_hit: bool) -> None:
        if before is not None:
            before(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)
        if not cache_hit:
            _compiled(str(metadata.get("name") or getattr(src, "name", "of a variant")))

    return listen


def _hook(before: Callable[..., Any] | None) -> Callable[..., Any]:
    """For a Triton without a listener: its hook before compiling, which cannot tell a binary on disk from none."""

    def hook(*args: Any, **kwargs: Any) -> Any:
        _compiled(str(kwargs.get("repr", "of a variant")))
        return None if before is None else before(*args, **kwargs)

    return hook


def listen() -> bool:
    """Listen to Triton's compilations from now on; False where there is no Triton. Listening costs a compilation nothing."""
    global _listening
    with _lock:
        if _listening:
            return True
        try:
            from triton import knobs
        except ImportError:
            return False
        if hasattr(knobs, "compilation") and hasattr(knobs.compilation, "listener"):
            knobs.compilation.listener = _listener(knobs.compilation.listener)
        elif hasattr(knobs, "runtime") and hasattr(knobs.runtime, "jit_cache_hook"):
            knobs.runtime.jit_cache_hook = _hook(knobs.runtime.jit_cache_hook)
        else:
            raise JitError("this version of Triton reports no compilations, so they cannot be ruled out. To fix: use triton >= 3.5.")
        _listening = True
        return True


@contextlib.contextmanager
def ruled_out() -> Iterator[None]:
    """Any compilation by Triton and any measurement inside the block raises JitError, in every thread."""
    global _depth
    listen()
    with _lock:
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1


def forbid_for_good() -> None:
    """The setting no_jit: listen as soon as something may compile."""
    global _for_good
    if not _for_good:
        listen()
        _for_good = True
