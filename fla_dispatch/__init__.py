"""Linear attention and state-space recurrences behind one call.

    import fla_dispatch as fd
    o, state = fd.op("retention")(q, k, v)

Names are imported on first use, so that `import fla_dispatch` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from .dispatch import explain, op, ops, use
    from .sequences import SeqInfo

    __version__: str

__all__ = ["SeqInfo", "__version__", "errors", "explain", "op", "ops", "use"]

_HOMES = {"op": "dispatch", "ops": "dispatch", "use": "dispatch", "explain": "dispatch", "SeqInfo": "sequences"}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "errors":
        return importlib.import_module(".errors", __name__)
    if name == "__version__":
        import importlib.metadata

        try:
            return importlib.metadata.version("fla-dispatch")
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            return "0+source"
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
