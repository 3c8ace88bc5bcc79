"""The planted variant: chunk_torch, and then whatever its config says. `<kind>_backward` misbehaves in backward alone."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from fla_dispatch.kernels.scalar_decay import chunk_torch
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig

BASE = TorchConfig(32)

#: Kinds that misbehave only at a size that no proof has.
LATE = 300


class CompilationError(Exception):
    """Named like Triton's."""


def spoil(kind: str, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """x after misbehaving; given: an input."""
    if kind == "wrong":
        x = x.clone()
        x.view(-1)[-1] += 1 + x.abs().max()
    elif kind == "slightly_wrong":
        x = x * 1.01
    elif kind == "racy":
        x = x + 1e-9 * torch.rand_like(x)
    elif kind == "racy_and_wrong":
        x = x + torch.rand_like(x)
    elif kind == "unwritten":
        y = x.new_empty(x.shape)
        y[:, :-1] = x[:, :-1]
        x = y
    elif kind in ("outside", "before"):
        y = x.new_empty(x.shape).copy_(x)
        place = y.storage_offset() + (y.numel() if kind == "outside" else -1)
        y.as_strided((1,), (1,), place).fill_(7.0)
        x = y
    elif kind == "changes_input":
        given.view(-1)[0] += 1
    elif kind == "wrong_dtype":
        x = x.double()
    elif kind == "wrong_shape":
        x = x[:, :-1]
    elif kind == "abort":
        os.abort()
    elif kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "leaves":
        os._exit(0)
    elif kind == "hang":
        time.sleep(1000)
    elif kind == "no_memory":
        raise torch.OutOfMemoryError("planted: tried to allocate 1 EiB")
    elif kind == "compile_error":
        raise CompilationError("planted: no such instruction")
    elif kind == "raises":
        raise KeyError("planted")
    elif kind == "late_abort" and given.shape[1] > LATE:
        os.abort()
    elif kind == "late_raises" and given.shape[1] > LATE:
        raise KeyError("planted")
    elif kind == "slow" and given.shape[1] > LATE:
        time.sleep(0.2)
    return x


def forward(config: Any, tensors: Any, options: Any) -> Any:
    out = chunk_torch.forward(BASE, tensors, options)
    return out if config.kind.endswith("_backward") else out._replace(o=spoil(config.kind, out.o, tensors.q))


def backward(config: Any, residuals: Any, grads: Any, options: Any, wanted: tuple[bool, ...]) -> Any:
    found = chunk_torch.backward(BASE, residuals, grads, options, wanted)
    kind = config.kind.removesuffix("_backward")
    return found if kind == config.kind else found._replace(k=spoil(kind, found.k, residuals.tensors.q))
