"""What the transforms of a call keep for backward."""

from __future__ import annotations

from typing import Any

import torch

from fla_dispatch import registry


def kept_bytes(op: str, inputs: Any) -> int:
    """Bytes of the storages that `prepare` saves for backward, each counted once (its outputs are the recurrence's to keep)."""
    call = inputs.replaced({name: x.detach().requires_grad_() for name, x in inputs.leaves().items()})
    low = registry.get_op(op).contract(*call.args, **call.kwargs)
    assert low.prepare is not None
    found: dict[int, torch.UntypedStorage] = {}

    def seen(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
        low.prepare(low.tensors)
    return sum(x.nbytes() for x in found.values())
