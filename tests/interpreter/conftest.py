"""These tests need TRITON_INTERPRET=1 before triton is imported, hence a process of their own: `make test-interpreter`."""

from __future__ import annotations

from fla_dispatch.device import interpreting

collect_ignore_glob = [] if interpreting() else ["test_*.py"]
