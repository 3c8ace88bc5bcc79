"""Named cases, the input generator and the tolerances that tests, tuner and benchmarks of this recurrence share.

Sizes are written in the recurrence's letters (B, T, H, HV, K, V); for mamba2 they stand for (B, T, G, H, N, P).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ... import registry
from ...errors import bad_call
from ...sequences import SeqInfo
from .._shared.inputs import Draw, make_gates
from .._shared.token_cases import Sizes, TokenCase, row, selected

OP_NAMES = ("linear_attn", "retention", "lightning_attn", "simple_gla", "mamba2")
GATED = ("simple_gla", "mamba2")


class Inputs(NamedTuple):
    """Arguments of a call of an op's handle."""

    args: tuple[torch.Tensor, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> dict[str, torch.Tensor]:
        """Every floating-point tensor of the call by name; a state of two tensors counts as two."""
        names = ("x", "dt", "A", "B", "C") if len(self.args) == 5 else ("q", "k", "v", "g")
        found = dict(zip(names, self.args, strict=False))
        for name, x in self.kwargs.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                found[name] = x
            elif name == "initial_state" and isinstance(x, tuple):
                found.update({f"initial_state.{part}": y for part, y in zip("Sz", x, strict=True)})
        return found

    def replaced(self, tensors: dict[str, torch.Tensor]) -> Inputs:
        """The same call with some leaves exchanged."""
        leaves = {**self.leaves(), **tensors}
        names = list(leaves)[: len(self.args)]
        kwargs = {name: leaves.get(name, x) for name, x in self.kwargs.items()}
        if isinstance(self.kwargs.get("initial_state"), tuple):
            kwargs["initial_state"] = (leaves["initial_state.S"], leaves["initial_state.z"])
        return Inputs(tuple(leaves[n] for n in names), kwargs)


def _qkv(draw: Draw, s: Sizes, dtype: torch.dtype, fused: bool, positive: bool) -> tuple[torch.Tensor, ...]:
    """q of unit variance, k of unit length so that states stay moderate, v of unit variance; positive features on request."""
    q, k, v = draw.normal(s.B, s.T, s.H, s.K), draw.normal(s.B, s.T, s.H, s.K), draw.normal(s.B, s.T, s.HV, s.V)
    if positive:
        q, k = F.elu(q) + 1, F.elu(k) + 1
    k = F.normalize(k, dim=-1)
    if not fused:
        return q.to(dtype), k.to(dtype), v.to(dtype)
    whole = torch.cat([x.flatten(2) for x in (q, k, v)], -1).to(dtype)
    parts = whole.split([s.H * s.K, s.H * s.K, s.HV * s.V], -1)
    return parts[0].unflatten(-1, (s.H, s.K)), parts[1].unflatten(-1, (s.H, s.K)), parts[2].unflatten(-1, (s.HV, s.V))


def _mamba2_parts(draw: Draw, s: Sizes, dtype: torch.dtype, regime: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """dt, A and the parameters of mamba2. Initialisation of the published layer: A in -(1, 16), d_t in (0.001, 0.1)."""
    A = -draw.uniform(1.0, 16.0, s.HV)
    step = torch.exp(draw.uniform(math.log(1e-3), math.log(0.1), s.HV))
    if regime == "none":
        A = A * 1e-9
    if regime == "strong":
        step = step * 0 + 1.2
    if regime == "reset":  # one head forgets everything at every token: d_t A is far below the clamp of the kernels
        A = torch.cat([A[:1] * 0 - 1e6, A[1:]])
    dt_bias = step + torch.log(-torch.expm1(-step))  # softplus(dt_bias) = step
    dt = (0.5 * draw.normal(s.B, s.T, s.HV)).to(dtype)
    return dt, A, {"D": 1 + 0.1 * draw.normal(s.HV), "dt_bias": dt_bias}


def make_inputs(
    op: str,
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    lengths: tuple[int, ...] | list[int] | None = None,
    regime: str = "mild",
    initial_state: bool = False,
    final_state: bool = False,
    fused: bool = False,
    options: tuple[tuple[str, Any], ...] = (),
) -> Inputs:
    """Inputs of one call, the same for one seed and device; no zeros stand in for data. lengths must sum to sizes.T."""
    device = torch.device(device)
    draw, s = Draw(device, seed), sizes
    chosen = dict(options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    normalize = op == "linear_attn" and bool(chosen.get("normalize", False))
    q, k, v = _qkv(draw, s, dtype, fused, normalize)
    kwargs: dict[str, Any] = {}
    args: tuple[torch.Tensor, ...] = (q, k, v)
    if op == "simple_gla":
        args = (q, k, v, make_gates(draw, regime, s.B, s.T, s.HV).to(wide))
    elif op == "lightning_attn":
        kwargs |= {"layer_idx": 3, "num_layers": 12}
    elif op == "mamba2":
        dt, A, parameters = _mamba2_parts(draw, s, dtype, regime)
        args = (v, dt, A.to(wide), k, q)
        kwargs |= {name: x.to(wide) for name, x in parameters.items()} | {"dt_softplus": True}
        if chosen.pop("half_skip", False):
            kwargs["D"] = kwargs["D"].to(dtype)
        if chosen.pop("gated", False):
            kwargs["z"] = draw.normal(s.B, s.T, s.HV, s.V).to(dtype)
    kwargs |= chosen
    N = s.B if lengths is None else len(lengths)
    if initial_state:
        S = (0.5 * draw.normal(N, s.HV, s.K, s.V)).to(wide)
        kwargs["initial_state"] = (S, (0.5 + draw.uniform(0, 1, N, s.HV, s.K)).to(wide)) if normalize else S
    if final_state:
        kwargs["output_final_state"] = True
    if lengths is not None:
        kwargs["cu_seqlens"] = SeqInfo.from_lengths(list(lengths), device)
    return Inputs(args, kwargs)


def _example(
    op: str,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    seed: int = 0,
    lengths: list[int] | None = None,
    initial_state: bool = False,
    output_final_state: bool = False,
    requires_grad: bool = False,
    options: tuple[tuple[str, Any], ...] = (),
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a realistic call (what Op.example promises); with lengths, T is their sum and B is 1."""
    if op == "mamba2":
        s = Sizes(sizes["B"], sizes["T"], sizes["G"], sizes["H"], sizes["N"], sizes["P"])
    else:
        s = Sizes(sizes["B"], sizes["T"], sizes["H"], sizes.get("HV", 0) or sizes["H"], sizes["K"], sizes["V"])
    if s.HV % s.H:
        value, query = ("H", "G") if op == "mamba2" else ("HV", "H")
        bad_call(op, "sizes", expected=f"{value} a multiple of {query}", got=f"{s.HV} and {s.H}", fix=f"choose {value} % {query} == 0")
    if lengths is not None:
        s = s._replace(B=1, T=sum(lengths))
    made = make_inputs(
        op, s, dtype, device, seed=seed, lengths=lengths, initial_state=initial_state, final_state=output_final_state, options=options
    )
    if requires_grad:
        made = made.replaced({name: x.requires_grad_() for name, x in made.leaves().items()})
    return made.args, made.kwargs


def example(op: str) -> functools.partial[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example function of one op: (sizes, dtype, device, ...) -> (args, kwargs)."""
    return functools.partial(_example, op)


def tolerance(dtype: torch.dtype, what: str = "o") -> float:
    """Largest error |x - reference| / |reference| (Frobenius norms, reference in float64 from the same rounded inputs).

    A result of unit roundoff u that is rounded once errs by about u / sqrt(3). Kernels also round one operand of each second
    matrix product (weights P, decayed k, states) to the inputs' dtype: about three more such terms, and gradients chain
    two products. Hence 2 u for outputs and states and 4 u for gradients, u = 2^-8 (bf16) or 2^-11 (fp16). float32 sums of
    some hundred terms with cancellation lose a decimal or so of u = 6e-8; float64 likewise.
    """
    gradient = what.startswith("d")
    if dtype in (torch.bfloat16, torch.float16):
        u = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        return (4 if gradient else 2) * u
    if dtype == torch.float32:
        return 2e-5 if gradient else 1e-5
    return 1e-11


def gate_gradient_scale(dg: torch.Tensor, q: torch.Tensor, dq: torch.Tensor) -> float:
    """What an error of a gate's gradient is relative to: max(|dg|, |q . dq|).

    dg sums q . dq - k . dk over later tokens: terms that cancel where a gate hardly matters (strong decay), so the error
    is set by the terms, not by their difference. q, dq: [B, T, H, K].
    """
    return max(dg.double().norm().item(), (q.double() * dq.double()).sum(-1).norm().item())


def gradient_scales(op: str, inputs: Inputs, grads: dict[str, torch.Tensor]) -> dict[str, float]:
    """What errors of gate gradients are relative to (others: the gradient's own norm). See `gate_gradient_scale`; grads by leaf.

    In mamba2 the gate is d_t A: its scale reaches dt times |A|; dt_bias and A are sums over tokens of such terms.
    """
    if op == "simple_gla":
        return {"g": gate_gradient_scale(grads["g"], inputs.leaves()["q"], grads["q"])}
    if op != "mamba2":
        return {}
    leaves = inputs.leaves()
    low = registry.get_op(op).contract(*inputs.args, **inputs.kwargs)
    assert low.prepare is not None
    steps = low.prepare(low.tensors).beta.double()
    terms = gate_gradient_scale(grads["C"][..., :0], leaves["C"], grads["C"])
    rate = leaves["A"].double().abs().amax().item()
    many = steps.numel() ** 0.5  # sums over tokens: |sum_t x_t e_t| <= |x| |e|, and the gates' errors are correlated
    floor = {"dt": rate * terms, "dt_bias": rate * many * terms, "A": steps.norm().item() * terms}
    return {name: max(x, grads[name].double().norm().item()) for name, x in floor.items() if name in grads}


class Case(TokenCase):
    """Options of the generator: half_skip (D of mamba2 in x's dtype), gated (with z)."""

    generate = staticmethod(make_inputs)


_PACK = (0, 1, 2, 63, 64, 65)
_BF16, _FP16 = torch.bfloat16, torch.float16

#: Rows that every op gets (those about gates: every gated op). B, T, H, HV, K, V.
_ROWS = (
    # lengths around chunk edges, and none at all
    row("no_tokens", 2, 0, 1, 1, 16, 16, tags="small interpreter", initial_state=True, final_state=True),
    row("no_rows", 0, 5, 1, 1, 16, 16, tags="small interpreter", final_state=True),
    row("one_token", 3, 1, 2, 2, 16, 32, tags="small interpreter", initial_state=True, final_state=True),
    row("two_tokens", 2, 2, 1, 1, 32, 16, tags="small interpreter", initial_state=True, final_state=True),
    row("63_tokens", 1, 63, 1, 1, 16, 16, tags="small", final_state=True),
    row("64_tokens", 1, 64, 1, 1, 16, 16, tags="small interpreter", initial_state=True),
    row("65_tokens", 1, 65, 1, 1, 16, 16, tags="small interpreter"),
    row("130_tokens", 1, 130, 1, 2, 16, 32, tags="small interpreter halves causal repeat", initial_state=True, final_state=True),
    # head dims: powers of two, sizes that need masks, K != V
    row("d32", 1, 70, 2, 2, 32, 32, fused=True),
    row("d64", 1, 70, 2, 2, 64, 64, initial_state=True, final_state=True),
    row("d80", 1, 40, 1, 1, 80, 80, tags="small gpu", source="Based and Hyena sizes with 80 channels a head", final_state=True),
    row("d96", 1, 40, 1, 1, 96, 96, source="3072 / 32 heads"),
    row("d100", 1, 40, 1, 1, 100, 100, fused=True, initial_state=True, final_state=True),
    row("d20_d36", 1, 33, 1, 1, 20, 36, tags="small interpreter", initial_state=True, final_state=True),
    row("d128", 1, 70, 1, 1, 128, 128, initial_state=True, final_state=True, source="MiniMax-01, Mamba-2's N"),
    row("d256", 1, 70, 1, 1, 256, 256, final_state=True, source="RetNet 1.3B, GLA 1.3B"),
    row("d128_d64", 1, 70, 1, 2, 128, 64, initial_state=True, final_state=True, source="Mamba-2 1.3B"),
    row("d64_d128", 2, 66, 2, 2, 64, 128, fused=True),
    # grouped value heads
    row("group2", 2, 66, 2, 4, 16, 32, tags="small interpreter partial", fused=True, initial_state=True, final_state=True),
    row("group4", 1, 67, 2, 8, 32, 16, tags="small interpreter"),
    # packing
    row("pack", 1, 195, 1, 2, 16, 16, tags="small interpreter causal repeat", lengths=_PACK, initial_state=True, final_state=True),
    row("pack_stateless", 1, 195, 2, 2, 32, 32, lengths=_PACK, fused=True),
    row("pack_of_one", 1, 65, 1, 1, 16, 16, tags="small interpreter", lengths=(65,), final_state=True),
    row("pack_mixed", 1, 137, 1, 2, 64, 32, lengths=(5, 0, 130, 1, 1), initial_state=True, final_state=True),
    row("pack_of_none", 1, 0, 1, 1, 16, 16, tags="small interpreter", lengths=(0, 0), initial_state=True, final_state=True),
    # dtypes
    row("bf16", 2, 130, 2, 2, 64, 64, tags="small repeat", dtype=_BF16, initial_state=True, final_state=True),
    row("fp16", 1, 130, 2, 2, 64, 32, dtype=_FP16, initial_state=True, final_state=True),
    row("bf16_group_pack", 1, 195, 1, 4, 32, 32, dtype=_BF16, lengths=_PACK, initial_state=True, final_state=True),
    row("bf16_small", 1, 66, 1, 2, 32, 16, tags="small interpreter", dtype=_BF16, initial_state=True, final_state=True),
    row("fp16_small", 1, 65, 1, 1, 16, 16, tags="small interpreter", dtype=_FP16, fused=True, final_state=True),
    # sizes for a GPU
    row("gpu_long", 1, 4100, 2, 2, 64, 64, tags="gpu causal repeat", dtype=_BF16, initial_state=True, final_state=True),
    row("gpu_batch", 8, 513, 4, 4, 128, 128, tags="gpu repeat", dtype=_BF16, fused=True),
    row("gpu_wide", 2, 300, 2, 2, 256, 256, tags="gpu repeat", dtype=_BF16, initial_state=True, final_state=True),
    row(
        "gpu_group", 2, 700, 2, 8, 128, 64, tags="gpu repeat halves partial", dtype=_BF16, fused=True, initial_state=True,
        final_state=True,
    ),
    row("gpu_fp32", 2, 600, 2, 2, 128, 128, tags="gpu", initial_state=True, final_state=True),
    row("gpu_fp16", 2, 600, 2, 4, 64, 128, tags="gpu", dtype=_FP16, initial_state=True, final_state=True),
    row(
        "gpu_pack", 1, 3195, 2, 2, 128, 128, tags="gpu causal repeat", dtype=_BF16, lengths=(*_PACK, 1000, 0, 1, 1999), initial_state=True,
        final_state=True,
    ),
    # published models
    row("bench_4k", 4, 4096, 16, 16, 128, 128, tags="bench", dtype=_BF16, source="2048-wide models of 1.3B"),
    row("bench_2k", 8, 2048, 32, 32, 64, 64, tags="bench", dtype=_BF16, source="2048-wide models with 64 channels a head"),
    row("bench_32k", 1, 32768, 8, 8, 128, 128, tags="bench", dtype=_BF16, source="long context at batch 1"),
)  # fmt: skip

_GATE_ROWS = (
    row("strong", 1, 70, 1, 2, 16, 32, tags="small interpreter stress", regime="strong", initial_state=True, final_state=True),
    row("none", 1, 70, 1, 2, 16, 32, tags="small interpreter stress", regime="none", initial_state=True, final_state=True),
    row("reset", 1, 70, 1, 2, 16, 16, tags="small interpreter stress", regime="reset", initial_state=True, final_state=True),
    row("strong_bf16", 2, 130, 2, 2, 64, 64, tags="small stress", regime="strong", dtype=_BF16, initial_state=True, final_state=True),
    row("none_bf16", 2, 130, 2, 2, 64, 64, tags="small stress", regime="none", dtype=_BF16, initial_state=True, final_state=True),
    row("reset_pack", 1, 195, 1, 2, 32, 32, tags="small stress", regime="reset", lengths=_PACK, initial_state=True, final_state=True),
    row("gpu_strong", 2, 1030, 2, 2, 128, 128, tags="gpu stress", regime="strong", dtype=_BF16, initial_state=True, final_state=True),
    row("gpu_none", 2, 1030, 2, 2, 128, 128, tags="gpu stress", regime="none", dtype=_BF16, initial_state=True, final_state=True),
)


def _make_cases() -> Iterator[Case]:
    for op in OP_NAMES:
        for name, sizes, tags, fields in _ROWS + (_GATE_ROWS if op in GATED else ()):
            tags = tags | {"gpu"} if "small" in tags else tags
            yield Case(name, op, sizes, tags=tags, **fields)
            if op == "linear_attn" and "bench" not in tags:
                yield Case(f"{name}_normalized", op, sizes, tags=tags, options=(("normalize", True),), **fields)
            if op == "mamba2" and name in ("one_token", "group2", "bf16", "pack", "gpu_group"):
                yield Case(f"{name}_gated", op, sizes, tags=tags, options=(("gated", True), ("dt_limit", (0.002, 0.5))), **fields)
            if op == "mamba2" and name in ("fp16_small", "bf16_small", "gpu_fp16"):
                yield Case(f"{name}_half_skip", op, sizes, tags=tags, options=(("half_skip", True),), **fields)
    model: dict[str, Any] = {"dtype": _BF16, "tags": frozenset({"bench"})}
    yield Case("mamba2_1.3b", "mamba2", Sizes(8, 2048, 1, 64, 128, 64), source="Mamba-2 1.3B: 64 heads of 64, N = 128, one group", **model)
    wide = {**model, "tags": frozenset({"bench", "wide"})}
    yield Case("retnet_1.3b", "retention", Sizes(8, 2048, 8, 8, 256, 512), source="RetNet 1.3B: 8 heads, expand_v = 2", **wide)
    yield Case("minimax_01", "lightning_attn", Sizes(1, 8192, 64, 64, 128, 128), source="MiniMax-01: 64 heads of 128", **model)


CASES: tuple[Case, ...] = tuple(_make_cases())


def select(tag: str, op: str | None = None) -> tuple[Case, ...]:
    """The cases with a tag, of one op or all."""
    return selected(CASES, tag, op)
