"""Shared by all tests: few threads, since tests run in several processes, one seed for what draws from the global generator, and an
empty store, since the records of whoever runs the tests would decide what they run."""

from __future__ import annotations

import os
import tempfile
import uuid

import pytest
import torch

torch.set_num_threads(1)

# before fla_dispatch is imported, which reads the environment once; child processes inherit it
os.environ["FLA_DISPATCH_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"fla_dispatch_tests_{uuid.uuid4().hex}")
os.environ.pop("FLA_DISPATCH_CACHE_PATH", None)

from fla_dispatch.tuning import store  # noqa: E402

store.SHIPPED = type(store.SHIPPED)(os.environ["FLA_DISPATCH_CACHE_DIR"]) / "nothing_shipped"  # tests/test_shipped.py reads the real one


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
