"""Checks that contracts share: tensors per token, gates, states, packing, scale. Cheap for good calls, wordy for bad ones.

Each check does a few comparisons of facts that torch holds on the host (no tensor is created, read or synchronised) and
calls a function that words the error only when one of them fails. All of it is plain Python that torch.compile traces.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import torch

from ...errors import bad_call
from ...sequences import SeqInfo

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)
_INDICES = (torch.int32, torch.int64)

#: What a contract passes down for cu_seqlens: device tensor, host tensor and segment table, each or none.
Packing = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Names:
    """How an op calls its query, key and value tensors and their sizes, for messages."""

    q: str = "q"
    k: str = "k"
    v: str = "v"
    H: str = "H"
    HV: str = "HV"
    K: str = "K"
    V: str = "V"


QKV = Names()


def shown(x: object) -> str:
    """A value in a message: shape, dtype and device of a tensor, else its type."""
    if isinstance(x, torch.Tensor):
        return f"shape {list(x.shape)}, {str(x.dtype).removeprefix('torch.')} on {x.device}"
    return f"a {type(x).__name__}"


def _not_tensor(where: str, name: str, x: object) -> NoReturn:
    bad_call(where, name, expected="a torch.Tensor", got=shown(x), fix=f"pass {name} as a tensor")


def _bad_heads(where: str, n: Names, H: int, K: int, HV: int, V: int) -> NoReturn:
    if H < 1 or HV < 1 or K < 1 or V < 1:
        got = f"{n.H} = {H}, {n.K} = {K}, {n.HV} = {HV}, {n.V} = {V}"
        bad_call(where, "head sizes", expected="heads and head dims >= 1", got=got, fix="pass tensors with at least one head and channel")
    bad_call(
        where, "heads", expected=f"{n.HV} (heads of {n.v}) to be a multiple of {n.H} (heads of {n.q} and {n.k})",
        got=f"{n.HV} = {HV}, {n.H} = {H}", fix=f"repeat or drop heads so that {n.HV} % {n.H} == 0",
    )  # fmt: skip


def _bad_shapes(where: str, n: Names, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> NoReturn:
    q_dims, v_dims = f"[B, T, {n.H}, {n.K}]", f"[B, T, {n.HV}, {n.V}]"
    for name, x, dims in ((n.q, q, q_dims), (n.k, k, q_dims), (n.v, v, v_dims)):
        if x.dim() != 4:
            fix = f"pass {name} with four dimensions {dims}" + ("; add the batch dimension with unsqueeze(0)" if x.dim() == 3 else "")
            bad_call(where, f"rank of {name}", expected=f"4, {dims}", got=shown(x), fix=fix)
    if k.shape != q.shape:
        fix = f"give {n.k} the shape of {n.q}; only {n.v} may have more heads"
        bad_call(where, f"shape of {n.k}", expected=f"the shape of {n.q}, {list(q.shape)}", got=str(list(k.shape)), fix=fix)
    if v.shape[:2] != q.shape[:2]:
        expected = f"[B, T] = {list(q.shape[:2])} as in {n.q}"
        bad_call(where, f"shape of {n.v}", expected=expected, got=str(list(v.shape)), fix=f"give {n.v} the batch and length of {n.q}")
    _bad_heads(where, n, *q.shape[2:], *v.shape[2:])


def _bad_dtypes(where: str, n: Names, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> NoReturn:
    for name, x in ((n.q, q), (n.k, k), (n.v, v)):
        if x.dtype not in FLOATS:
            expected = "bfloat16, float16, float32 or (mode='reference') float64"
            bad_call(where, f"dtype of {name}", expected=expected, got=str(x.dtype), fix=f"convert {name} with {name}.to(torch.bfloat16)")
    bad_call(
        where, "dtypes", expected=f"{n.q}, {n.k} and {n.v} of one dtype", got=f"{q.dtype}, {k.dtype}, {v.dtype}",
        fix=f"convert them to one dtype, e.g. {n.k}.to({n.q}.dtype), or call under torch.autocast, which casts all three",
    )  # fmt: skip


def _bad_device(where: str, name: str, x: torch.Tensor, device: torch.device, like: str) -> NoReturn:
    bad_call(
        where, f"device of {name}", expected=f"{device}, where {like} is", got=str(x.device), fix=f"move it with {name}.to('{device}')"
    )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device, None when it is off."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def check_qkv(
    where: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: Names = QKV
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int, int, int, torch.dtype, torch.device]:
    """q, k: [B, T, H, K]; v: [B, T, HV, V], HV % H == 0, one floating dtype, one device.

    Returns q, k, v, B, T, K, HV, V, dtype, device. Under autocast the three are cast to its dtype (float64 is left alone,
    as in torch).
    """
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        for name, x in ((n.q, q), (n.k, k), (n.v, v)):
            if not isinstance(x, torch.Tensor):
                _not_tensor(where, name, x)
    q_shape, v_shape = q.shape, v.shape
    if len(q_shape) != 4 or len(v_shape) != 4 or k.shape != q_shape:
        _bad_shapes(where, n, q, k, v)
    B, T, H, K = q_shape
    rows, length, HV, V = v_shape
    if rows != B or length != T or H < 1 or HV < 1 or K < 1 or V < 1 or HV % H:
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
    return q, k, v, B, T, K, HV, V, dtype, device


def _under_autocast(where: str, n: Names, *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dtype = autocast_dtype(qkv[0])
    if any(x.dtype not in FLOATS for x in qkv):
        _bad_dtypes(where, n, *qkv)
    if dtype is None or any(x.dtype == torch.float64 for x in qkv):
        return qkv
    return tuple(x.to(dtype) for x in qkv)


def _bad_shape(where: str, name: str, x: torch.Tensor, dims: str, shape: tuple[int, ...]) -> NoReturn:
    bad_call(where, f"shape of {name}", expected=f"{dims} = {list(shape)}", got=shown(x), fix=f"pass {name} with shape {list(shape)}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_companion(
    where: str, name: str, x: torch.Tensor, shape: tuple[int, ...], dims: str, dtype: torch.dtype, device: torch.device, like: str
) -> torch.Tensor:
    """A gate, weight or parameter: this shape, on this device, float32 or this dtype, that of `like` (float64 beside float64).

    Returns x; under autocast a half-precision x of another dtype than autocast's is cast to float32.
    """
    if not isinstance(x, torch.Tensor):
        _not_tensor(where, name, x)
    if x.shape != shape:
        _bad_shape(where, name, x, dims, shape)
    if x.device != device:
        _bad_device(where, name, x, device, like)
    have = x.dtype
    if have is not dtype and (have is not torch.float32 or dtype is torch.float64):
        if have in _HALVES and dtype in _HALVES and autocast_dtype(x) is dtype:
            return x.float()
        expected = f"{dtype}" if _wide(dtype) == dtype else f"{_wide(dtype)} or {like}'s {dtype}"
        fix = f"convert it with {name}.to({_wide(dtype)})"
        bad_call(where, f"dtype of {name}", expected=expected, got=str(have), fix=fix)
    return x


def check_state(
    where: str, name: str, x: torch.Tensor, shape: tuple[int, ...], dims: str, dtype: torch.dtype, device: torch.device, like: str
) -> None:
    """An initial state: this shape, on this device, float32 (float64 beside `like` of float64)."""
    if not isinstance(x, torch.Tensor):
        _not_tensor(where, name, x)
    if x.shape != shape:
        _bad_shape(where, name, x, dims, shape)
    if x.device != device:
        _bad_device(where, name, x, device, like)
    if x.dtype is not _wide(dtype):
        fix = f"keep states in {_wide(dtype)}: {name}.to({_wide(dtype)})"
        bad_call(where, f"dtype of {name}", expected=f"{_wide(dtype)}, whatever the dtype of {like}", got=str(x.dtype), fix=fix)


def check_scale(where: str, scale: float) -> float:
    """A factor of q that the caller chose."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        bad_call(
            where, "scale", expected="a Python float or None", got=shown(scale), fix="pass a number (a tensor would have to be read back)"
        )
    return float(scale)


def check_flag(where: str, what: str, value: bool) -> None:
    """A switch: what merely counts as true would be a guess."""
    if value is not True and value is not False:
        bad_call(where, what, expected="True or False", got=shown(value), fix="pass a Python bool")


def check_limits(where: str, what: str, limits: tuple[float, float]) -> tuple[float, float]:
    """A range that is clamped to."""
    numbers = isinstance(limits, (tuple, list)) and len(limits) == 2 and all(isinstance(x, (int, float)) for x in limits)
    if not numbers or not limits[0] <= limits[1]:
        fix = f"pass for example {what}=(0.0, math.inf)"
        bad_call(where, what, expected="two numbers (low, high), low <= high", got=repr(limits), fix=fix)
    return limits[0], limits[1]


def check_packing(where: str, cu_seqlens: torch.Tensor | SeqInfo, B: int, device: torch.device, like: str) -> Packing:
    """cu_seqlens of a packed call as (device tensor [N + 1], host tensor or None, segment table or None).

    Values are checked inside the op, from the host tensor; of a bare device tensor only shape and dtype are known.
    """
    if isinstance(cu_seqlens, SeqInfo):
        cu, host, segments = cu_seqlens.cu_seqlens, cu_seqlens.host, cu_seqlens.segments
    elif isinstance(cu_seqlens, torch.Tensor):
        cu, host, segments = cu_seqlens, None, None
    else:
        fix = "pass cumulative lengths as a tensor, or SeqInfo.from_lengths([n1, n2, ...], device)"
        bad_call(where, "cu_seqlens", expected="a tensor [N + 1] of int32 or int64, a SeqInfo or None", got=shown(cu_seqlens), fix=fix)
    if B != 1:
        fix = f"put the sequences one after the other in one row: {like}.flatten(0, 1).unsqueeze(0)"
        bad_call(where, "batch with cu_seqlens", expected="B = 1, all sequences packed in one row", got=f"B = {B}", fix=fix)
    if cu.dim() != 1 or cu.shape[0] < 1:
        bad_call(where, "shape of cu_seqlens", expected="[N + 1]", got=shown(cu), fix="pass cumulative lengths [0, n1, n1 + n2, ..., T]")
    if cu.dtype not in _INDICES:
        bad_call(
            where, "dtype of cu_seqlens", expected="int32 or int64", got=str(cu.dtype), fix="convert it with cu_seqlens.to(torch.int32)"
        )
    if cu.device != device:
        if segments is not None:
            fix = f"build it there: fd.SeqInfo.from_lengths(lengths, device='{device}')"
        else:
            fix = f"pass fd.SeqInfo.from_cu_seqlens(cu_seqlens, device='{device}'), which keeps the host copy for checks"
        bad_call(where, "device of cu_seqlens", expected=f"{device}, where {like} is", got=str(cu.device), fix=fix)
    if host is None and cu.is_cpu:
        host = cu
    return cu, host, segments
