"""For tests and start-up checks of programs that use this library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def assert_no_jit() -> Iterator[None]:
    """Nothing is compiled or measured inside the block: any Triton compilation and any measurement raises JitError.

    Kernels that Triton loads from its cache on disk are no compilation. The block covers the whole process, and kernels of other
    libraries too. The setting FLA_DISPATCH_NO_JIT=1 does the same for a whole process from its first call on.
    """
    from .tuning import jit

    with jit.ruled_out():
        yield
