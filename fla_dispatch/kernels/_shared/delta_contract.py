"""Checks that the contracts of the delta rules and of their steps share: the gate from raw input, weights, and the removal key."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ...errors import bad_call
from .contract import FLOATS, autocast_dtype, check_companion, check_flag, shown


class Gate(NamedTuple):
    """Parameters of a gate from raw input; A_log [HV] may be absent with a lower bound, dt_bias is [HV] or [HV, K]."""

    A_log: torch.Tensor | None
    dt_bias: torch.Tensor | None
    lower_bound: float | None


def check_gate(
    where: str,
    g: torch.Tensor | None,
    use_gate: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    HV: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Gate | None:
    """The parameters of a gate from raw input; channels: K where each has its own gate, else 0."""
    check_flag(where, "use_gate", use_gate)
    if not use_gate:
        for name, x in (("A_log", A_log), ("dt_bias", dt_bias), ("lower_bound", lower_bound)):
            if x is not None:
                fix = f"set use_gate=True if g is raw input, or leave {name} out"
                bad_call(where, name, expected="None without use_gate", got=shown(x), fix=fix)
        return None
    if g is None:
        bad_call(where, "use_gate", expected="a tensor g", got="g = None", fix="pass g, or set use_gate=False")
    if lower_bound is not None and (
        isinstance(lower_bound, bool) or not isinstance(lower_bound, (int, float)) or not -math.inf < lower_bound < 0
    ):
        fix = "pass the smallest log decay, for example lower_bound=-5.0"
        bad_call(where, "lower_bound", expected="a finite number below 0, or None", got=repr(lower_bound), fix=fix)
    if A_log is not None:
        A_log = check_companion(where, "A_log", A_log, (HV,), "[HV]", dtype, device, "q")
    elif lower_bound is None:
        bad_call(where, "A_log", expected="a tensor [HV] with use_gate", got="None", fix="pass A_log, or lower_bound for the bounded gate")
    if dt_bias is not None:
        shape, dims = ((HV, channels), "[HV, K]") if channels else ((HV,), "[HV]")
        if channels and isinstance(dt_bias, torch.Tensor) and dt_bias.shape == (HV * channels,):
            dt_bias = dt_bias.view(HV, channels)
        dt_bias = check_companion(where, "dt_bias", dt_bias, shape, dims, dtype, device, "q")
    return Gate(A_log, dt_bias, None if lower_bound is None else float(lower_bound))


def check_weights(where: str, use_beta_sigmoid: bool, allow_neg_eigval: bool) -> None:
    """What beta stands for."""
    check_flag(where, "use_beta_sigmoid", use_beta_sigmoid)
    check_flag(where, "allow_neg_eigval", allow_neg_eigval)
    if allow_neg_eigval and not use_beta_sigmoid:
        fix = "set use_beta_sigmoid=True and pass logits, or pass weights in (0, 2) and leave allow_neg_eigval out"
        bad_call(
            where, "allow_neg_eigval", expected="use_beta_sigmoid=True, whose result it doubles", got="use_beta_sigmoid=False", fix=fix
        )


def check_removal(where: str, p: torch.Tensor, shape: tuple[int, ...], dims: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """p: of k's shape and dtype; returns it, cast under autocast."""
    if isinstance(p, torch.Tensor) and p.dtype in FLOATS and autocast_dtype(p) is dtype:
        p = p.to(dtype)
    p = check_companion(where, "p", p, shape, dims, dtype, device, "k")
    if p.dtype is not dtype:
        bad_call(where, "dtype of p", expected=f"{dtype}, that of k", got=str(p.dtype), fix="convert it with p.to(k.dtype)")
    return p
