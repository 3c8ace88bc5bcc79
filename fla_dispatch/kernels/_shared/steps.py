"""Checks that contracts of steps share: one token of each row, a pool of states that is updated in place, slots into it.

As in contract.py a good call costs a few comparisons, and words are for bad ones.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from ...errors import bad_call
from .contract import (
    FLOATS,
    QKV,
    Names,
    _bad_device,
    _bad_dtypes,
    _bad_heads,
    _bad_shape,
    _not_tensor,
    _under_autocast,
    autocast_dtype,
    shown,
)

_INDICES = (torch.int32, torch.int64)


def _bad_shapes(where: str, n: Names, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> NoReturn:
    q_dims, v_dims = f"[B, {n.H}, {n.K}]", f"[B, {n.HV}, {n.V}]"
    for name, x, dims in ((n.q, q, q_dims), (n.k, k, q_dims), (n.v, v, v_dims)):
        if x.dim() != 3:
            fix = f"pass {name} with three dimensions {dims}" + (f"; take one token of it with {name}[:, 0]" if x.dim() == 4 else "")
            bad_call(where, f"rank of {name}", expected=f"3, {dims}", got=shown(x), fix=fix)
    if k.shape != q.shape:
        fix = f"give {n.k} the shape of {n.q}; only {n.v} may have more heads"
        bad_call(where, f"shape of {n.k}", expected=f"the shape of {n.q}, {list(q.shape)}", got=str(list(k.shape)), fix=fix)
    if v.shape[0] != q.shape[0]:
        expected = f"B = {q.shape[0]} rows as in {n.q}"
        bad_call(where, f"shape of {n.v}", expected=expected, got=str(list(v.shape)), fix=f"give {n.v} the rows of {n.q}")
    _bad_heads(where, n, *q.shape[1:], *v.shape[1:])


def check_token(
    where: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: Names = QKV
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int, int, torch.dtype, torch.device]:
    """q, k: [B, H, K]; v: [B, HV, V], HV % H == 0, one floating dtype, one device.

    Returns q, k, v, B, K, HV, V, dtype, device; under autocast the three are cast to its dtype.
    """
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        for name, x in ((n.q, q), (n.k, k), (n.v, v)):
            if not isinstance(x, torch.Tensor):
                _not_tensor(where, name, x)
    q_shape, v_shape = q.shape, v.shape
    if len(q_shape) != 3 or len(v_shape) != 3 or k.shape != q_shape:
        _bad_shapes(where, n, q, k, v)
    B, H, K = q_shape
    rows, HV, V = v_shape
    if rows != B or H < 1 or HV < 1 or K < 1 or V < 1 or HV % H:
        _bad_shapes(where, n, q, k, v)
    device = q.device
    if k.device != device:
        _bad_device(where, n.k, k, device, n.q)
    if v.device != device:
        _bad_device(where, n.v, v, device, n.q)
    dtype = q.dtype
    if autocast_dtype(q) is not None:
        q, k, v = _under_autocast(where, n, q, k, v)
        dtype = q.dtype
    if k.dtype is not dtype or v.dtype is not dtype or dtype not in FLOATS:
        _bad_dtypes(where, n, q, k, v)
    return q, k, v, B, K, HV, V, dtype, device


def check_pool(
    where: str,
    name: str,
    x: torch.Tensor,
    shape: tuple[int, ...],
    dims: str,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    like: str,
    rows: int | None,
) -> None:
    """A pool of states: [S, *shape] on this device, of one of these dtypes; S = rows where every row of a batch has its own."""
    if not isinstance(x, torch.Tensor):
        _not_tensor(where, name, x)
    if x.dim() != len(shape) + 1 or x.shape[1:] != shape:
        want = ", ".join(map(str, shape))
        bad_call(where, f"shape of {name}", expected=f"{dims} = [S, {want}]", got=shown(x), fix=f"pass {name} with shape [S, {want}]")
    if rows is not None and x.shape[0] != rows:
        fix = f"pass slots [B], the row of {name} that each row of the batch has, or {name} with {rows} rows"
        bad_call(where, f"rows of {name}", expected=f"S = B = {rows} without slots", got=f"S = {x.shape[0]}", fix=fix)
    if x.device != device:
        _bad_device(where, name, x, device, like)
    if x.dtype not in dtypes:
        fix = f"keep it in {dtypes[0]}: a converted copy would be updated instead of {name}"
        bad_call(where, f"dtype of {name}", expected=" or ".join(map(str, dtypes)), got=str(x.dtype), fix=fix)


def check_pool_layout(where: str, name: str, x: torch.Tensor) -> None:
    """The entries of a slot lie one after the other, and no two slots overlap: the pool may be a slice of a larger one."""
    if x.is_contiguous():
        return
    inner = 1
    for size, stride in zip(x.shape[:0:-1], x.stride()[:0:-1], strict=True):
        if size != 1 and stride != inner:
            break
        inner *= size
    else:
        if x.shape[0] <= 1 or x.stride(0) >= inner:
            return
    fix = f"make the pool contiguous, or a slice of one along other dimensions than those of a slot ({name} is updated in place)"
    bad_call(where, f"layout of {name}", expected="contiguous slots that do not overlap", got=f"strides {list(x.stride())}", fix=fix)


def check_slots(where: str, x: torch.Tensor, B: int, device: torch.device, like: str) -> None:
    """slots [B], int32 or int64. Their values stay on the device: duplicates and rows past the pool are not found."""
    if not isinstance(x, torch.Tensor):
        _not_tensor(where, "slots", x)
    if x.shape != (B,):
        _bad_shape(where, "slots", x, "[B]", (B,))
    if x.dtype not in _INDICES:
        bad_call(where, "dtype of slots", expected="int32 or int64", got=str(x.dtype), fix="convert it with slots.to(torch.int32)")
    if x.device != device:
        _bad_device(where, "slots", x, device, like)


def check_no_grad(where: str, named: tuple[tuple[str, torch.Tensor | None], ...]) -> None:
    """A step overwrites what a gradient would need."""
    if not torch.is_grad_enabled():
        return
    for name, x in named:
        if x is not None and x.requires_grad:
            fix = f"call it under torch.no_grad(), or {where.removesuffix('_step')}, which has gradients and returns a new state"
            bad_call(where, f"gradient of {name}", expected="no tensor that requires one", got="requires_grad=True", fix=fix)
