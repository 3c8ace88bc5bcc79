"""Memory that shows misuse: what a candidate allocates, and what it is given, stands between guard bands, all bytes 0xFF.

0xFF in every byte is NaN in every floating-point dtype: an output that is not written, and a read beyond an input, give NaN;
a write beyond either changes the band.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

#: Bytes on either side; a multiple of every alignment that a compiler specialises on.
BAND = 4096
_FILL = 0xFF

_real_empty = torch.empty


class Guards:
    """Buffers with guard bands, checked together."""

    def __init__(self) -> None:
        self._bands: list[torch.Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised (all 0xFF), contiguous tensor between bands."""
        size = torch.Size(shape).numel() * dtype.itemsize
        padded = -(-size // 16) * 16  # the band behind begins where vectors of 16 bytes end; the bytes between belong to it
        raw = _real_empty(BAND + padded + BAND, dtype=torch.uint8, device=device).fill_(_FILL)
        self._bands += [raw[:BAND], raw[BAND + size :]]
        return raw[BAND : BAND + size].view(dtype).view(shape)

    def place(self, x: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of x between bands."""
        return self.empty(tuple(x.shape), x.dtype, x.device).copy_(x)

    def broken(self) -> int:
        """How many bands were written to; synchronises."""
        if not self._bands:
            return 0
        return int(torch.stack([(band != _FILL).any() for band in self._bands]).sum().item())


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)


@contextlib.contextmanager
def guarded(guards: Guards) -> Iterator[None]:
    """Give what torch.empty and its relatives make guard bands, for code that runs in this thread's process meanwhile.

    Tensors of fewer than two dimensions (placeholders of absent outputs, tables of torch's own) are left alone, and so is
    everything with a layout of its own.
    """

    def take(like: torch.Tensor | None, shape: tuple[int, ...], options: dict[str, Any]) -> torch.Tensor | None:
        dtype = options.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
        device = torch.device(options.get("device") or ("cpu" if like is None else like.device))
        layout = options.get("memory_format")
        if len(shape) < 2 or device.type == "meta" or not dtype.is_floating_point or options.get("out") is not None:
            return None
        if layout not in (None, torch.contiguous_format, torch.preserve_format) or options.get("pin_memory"):
            return None
        if layout is not torch.contiguous_format and like is not None and options.get("strided", False) and not like.is_contiguous():
            return None
        return guards.empty(shape, dtype, device)

    real: dict[tuple[Any, str], Callable[..., torch.Tensor]] = {
        (torch, "empty"): torch.empty,
        (torch, "empty_like"): torch.empty_like,
        (torch.Tensor, "new_empty"): torch.Tensor.new_empty,
    }

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        found = take(None, _shape(size), options) if size else None
        return real[torch, "empty"](*size, **options) if found is None else found

    def empty_like(x: torch.Tensor, **options: Any) -> torch.Tensor:
        found = take(x, tuple(x.shape), {**options, "strided": True})
        return real[torch, "empty_like"](x, **options) if found is None else found

    def new_empty(x: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        found = take(x, _shape(size), options) if size else None
        return real[torch.Tensor, "new_empty"](x, *size, **options) if found is None else found

    made = {"empty": empty, "empty_like": empty_like, "new_empty": new_empty}
    for owner, name in real:
        setattr(owner, name, made[name])
    try:
        yield
    finally:
        for (owner, name), function in real.items():
            setattr(owner, name, function)
