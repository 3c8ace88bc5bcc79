"""Shared by all tests: few threads, since tests run in several processes, and one seed for what draws from the global generator."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
