"""The only reader of environment variables: once, at import, into a frozen record with scoped overrides.

| variable | field | meaning |
|---|---|---|
| `FLA_DISPATCH_USE` | `use` | choices for a whole process: `retention=reference,simple_gla=chunk` |
| `FLA_DISPATCH_CACHE_DIR` | `cache_dir` | where records are kept (default: the user's cache directory) |
| `TRITON_INTERPRET` | `interpret` | Triton's interpreter is on: Triton variants run on a CPU when they are forced |
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from .errors import UnknownNameError


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


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a process was told by its environment."""

    use: tuple[tuple[str, str], ...] = ()
    cache_dir: str | None = None
    interpret: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        env = os.environ
        return cls(
            use=tuple(sorted(parse_use(env.get("FLA_DISPATCH_USE", "")).items())),
            cache_dir=env.get("FLA_DISPATCH_CACHE_DIR") or None,
            interpret=env.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"),
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
