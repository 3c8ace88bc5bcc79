"""The only reader of environment variables: once, at import, into a frozen record with scoped overrides.

| variable | field | meaning |
|---|---|---|
| `FLA_DISPATCH_USE` | `use` | choices for a whole process: `retention=reference,simple_gla=chunk` |
| `FLA_DISPATCH_CACHE_DIR` | `cache_dir` | where records are kept (default: the user's cache directory) |
| `FLA_DISPATCH_CACHE_PATH` | `cache_path` | directories with records that are read, never written (a site's), joined as in `PATH` |
| `FLA_DISPATCH_MISS` | `miss` | what a call does that no record is found for: `estimate` (default), `tune` or `error` |
| `FLA_DISPATCH_LOCK` | `lock` | a lock file whose decisions are made again, or refused with a difference |
| `FLA_DISPATCH_NO_JIT` | `no_jit` | any compilation or measurement raises |
| `TRITON_PTXAS_PATH` | `ptxas` | Triton's own: the assembler it calls (also `TRITON_PTXAS_BLACKWELL_PATH`, `ptxas_blackwell`) |
| `TRITON_INTERPRET` | `interpret` | Triton's interpreter is on: Triton variants run on a CPU when they are forced |
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from .errors import UnknownNameError, nearest


def parse_use(text: str) -> dict[str, str]:
    """`"retention=reference,simple_gla=chunk"` as a dict."""
    choices = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, sep, choice = part.partition("=")
        if not sep or not name.strip() or not choice.strip():
            raise UnknownNameError(
                f"FLA_DISPATCH_USE: expected OP=CHOICE pairs separated by commas, got {part!r}. "
                "To fix: write for example FLA_DISPATCH_USE=retention=reference."
            )
        choices[name.strip()] = choice.strip()
    return choices


#: What a call may do that no record is found for.
MISS_POLICIES = ("estimate", "tune", "error")


def parse_miss(text: str) -> str:
    """A miss policy; empty means `estimate`."""
    if text and text not in MISS_POLICIES:
        raise UnknownNameError(f"FLA_DISPATCH_MISS: {nearest(text, list(MISS_POLICIES))}, got {text!r}.")
    return text or "estimate"


def _switch(text: str) -> bool:
    return text.lower() in ("1", "true", "on", "yes")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a process was told by its environment."""

    use: tuple[tuple[str, str], ...] = ()
    cache_dir: str | None = None
    cache_path: tuple[str, ...] = ()
    miss: str = "estimate"
    lock: str | None = None
    no_jit: bool = False
    ptxas: str | None = None
    ptxas_blackwell: str | None = None
    interpret: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        env = os.environ
        return cls(
            use=tuple(sorted(parse_use(env.get("FLA_DISPATCH_USE", "")).items())),
            cache_dir=env.get("FLA_DISPATCH_CACHE_DIR") or None,
            cache_path=tuple(filter(None, env.get("FLA_DISPATCH_CACHE_PATH", "").split(os.pathsep))),
            miss=parse_miss(env.get("FLA_DISPATCH_MISS", "")),
            lock=env.get("FLA_DISPATCH_LOCK") or None,
            no_jit=_switch(env.get("FLA_DISPATCH_NO_JIT", "")),
            ptxas=env.get("TRITON_PTXAS_PATH") or None,
            ptxas_blackwell=env.get("TRITON_PTXAS_BLACKWELL_PATH") or None,
            interpret=_switch(env.get("TRITON_INTERPRET", "")),
        )


#: The settings in force. Read this attribute; change it through `override` only.
current = Settings.from_environment()

#: Counts changes of the settings, so that caches of decisions know when they are stale.
epoch = 0


@contextlib.contextmanager
def override(**fields: object) -> Iterator[Settings]:
    """Replace some settings for a `with` block (process-wide; meant for tests and tools)."""
    global current, epoch
    before = current
    current = dataclasses.replace(before, **fields)  # type: ignore[arg-type]
    epoch += 1
    try:
        yield current
    finally:
        current = before
        epoch += 1
