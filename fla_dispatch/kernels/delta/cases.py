"""Named cases, the input generator and the tolerances that tests, tuner and benchmarks of this recurrence share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...errors import bad_call
from ...sequences import SeqInfo
from .._shared.inputs import Draw, make_gates, make_raw_gate
from .._shared.token_cases import Sizes, TokenCase, row, selected

OP_NAMES = ("delta", "gated_delta", "kda", "comba", "delta_product")
GATED = ("gated_delta", "kda", "comba", "delta_product")
ARGUMENTS = {
    "delta": ("q", "k", "v", "beta"),
    "gated_delta": ("q", "k", "v", "g", "beta"),
    "kda": ("q", "k", "v", "g", "beta"),
    "comba": ("q", "k", "v", "p", "g", "beta"),
    "delta_product": ("q", "k", "v", "g", "beta"),
}

#: Arguments that hold `num_householder` entries for each token.
REPEATED = ("k", "v", "beta")


class Inputs(NamedTuple):
    """Arguments of a call of an op's handle; names: of args."""

    args: tuple[torch.Tensor | None, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]

    def leaves(self) -> dict[str, torch.Tensor]:
        """Every floating-point tensor of the call by name."""
        every = {**dict(zip(self.names, self.args, strict=True)), **self.kwargs}
        return {name: x for name, x in every.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}

    def replaced(self, tensors: dict[str, torch.Tensor]) -> Inputs:
        """The same call with some leaves exchanged."""
        args = tuple(tensors.get(name, x) for name, x in zip(self.names, self.args, strict=True))
        return Inputs(args, {name: tensors.get(name, x) for name, x in self.kwargs.items()}, self.names)

    def per_token(self, T: int) -> dict[str, int]:
        """The leaves that have entries for each of T tokens, and how many."""
        n = self.kwargs.get("num_householder", 1)
        return {name: n if name in REPEATED else 1 for name in self.names if name in self.leaves()}


def _qkv(draw: Draw, s: Sizes, n: int, dtype: torch.dtype, fused: bool, raw: bool) -> tuple[torch.Tensor, ...]:
    """q of unit variance, k of unit length (raw: of unit variance) for n updates of a token, v of unit variance."""
    q, k, v = draw.normal(s.B, s.T, s.H, s.K), draw.normal(s.B, s.T * n, s.H, s.K), draw.normal(s.B, s.T * n, s.HV, s.V)
    if not raw:
        k = F.normalize(k, dim=-1)
    if not fused or n > 1:
        return q.to(dtype), k.to(dtype), v.to(dtype)
    whole = torch.cat([x.flatten(2) for x in (q, k, v)], -1).to(dtype)
    parts = whole.split([s.H * s.K, s.H * s.K, s.HV * s.V], -1)
    return parts[0].unflatten(-1, (s.H, s.K)), parts[1].unflatten(-1, (s.H, s.K)), parts[2].unflatten(-1, (s.HV, s.V))


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
    draw, s, chosen = Draw(device, seed), sizes, dict(options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kwargs: dict[str, Any] = {}
    n = 1
    if op == "delta_product":
        n = kwargs["num_householder"] = chosen.pop("num_householder", 2)
    raw, ungated = chosen.pop("raw", False), chosen.pop("ungated", False)
    found: dict[str, torch.Tensor | None] = dict(zip("qkv", _qkv(draw, s, n, dtype, fused, raw), strict=True))
    logits = draw.normal(s.B, s.T * n, s.HV)
    found["beta"] = (logits if raw else torch.sigmoid(logits)).to(dtype if raw else wide)
    if op in GATED:
        shape = (s.B, s.T, s.HV, s.K) if op == "kda" else (s.B, s.T, s.HV)
        found["g"] = None if ungated else draw.normal(*shape).to(dtype) if raw else make_gates(draw, regime, *shape).to(wide)
    if op == "comba":
        found["p"] = (found["k"].to(torch.float32) * draw.uniform(0.5, 1.0, s.H, 1)).to(dtype)
    if raw:
        kwargs |= {"use_qk_l2norm": True, "use_beta_sigmoid": True}
        kwargs |= make_raw_gate(draw, wide, s.HV, s.K if op == "kda" else 0) if found.get("g") is not None else {}
    kwargs |= chosen
    N = s.B if lengths is None else len(lengths)
    if initial_state:
        kwargs["initial_state"] = (0.5 * draw.normal(N, s.HV, s.K, s.V)).to(wide)
    if final_state:
        kwargs["output_final_state"] = True
    if lengths is not None:
        kwargs["cu_seqlens"] = SeqInfo.from_lengths(list(lengths), device)
    return Inputs(tuple(found[name] for name in ARGUMENTS[op]), kwargs, ARGUMENTS[op])


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
    s = Sizes(sizes["B"], sizes["T"], sizes["H"], sizes.get("HV", 0) or sizes["H"], sizes["K"], sizes["V"])
    if s.HV % s.H:
        bad_call(op, "sizes", expected="HV a multiple of H", got=f"{s.HV} and {s.H}", fix="choose HV % H == 0")
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

    A result of unit roundoff u that is rounded once errs by about u / sqrt(3). Normalised q and k, and in kernels one operand of
    each product (the state, w, weights of pairs), are rounded to the inputs' dtype too: about four more such terms, and gradients
    chain two products. Hence 2 u for outputs and states and 4 u for gradients, u = 2^-8 (bf16) or 2^-11 (fp16). float32 sums of
    some hundred terms, and the triangular solve, lose a decimal or so of u = 6e-8; float64 likewise.
    """
    gradient = what.startswith("d")
    if dtype in (torch.bfloat16, torch.float16):
        u = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        return (4 if gradient else 2) * u
    if dtype == torch.float32:
        return 2e-5 if gradient else 1e-5
    return 1e-11


def gate_gradient_scale(dg: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """What an error of a gate's gradient is relative to: the greatest of |dg| and |x . dx| for the pairs (q, dq), (k, dk), (p, dp).

    dg sums differences of these over later tokens, equation (10): they cancel where a gate hardly matters (strong decay), so the
    error is set by the terms, not by their difference. x, dx: [B, T, H, K]; gates per channel sum nothing over it.
    """
    channels = dg.dim() == 4
    terms = ((x.double() * dx.double()) for x, dx in pairs)
    return max([dg.double().norm().item(), *((x if channels else x.sum(-1)).norm().item() for x in terms)])


def parameter_scales(inputs: Inputs, grads: dict[str, torch.Tensor]) -> dict[str, float]:
    """What errors of the gradients of A_log and dt_bias are relative to: the terms x_t dg_t that they sum over tokens, and that may cancel.

    By equation (10) a gate's gradient dg holds the rounding errors of all tokens on one side of it, so errors of a row of gates agree with
    each other: |sum_t x_t dg_t| <= |x| |dg| is what they come near, row by row (of a batch row, head and channel; rows are independent).
    x is the derivative of the gate by the parameter; the gradient of the raw gate is dg times that by dt_bias, the slope.
    """
    leaves, low = inputs.leaves(), inputs.kwargs.get("lower_bound")
    raw = leaves["g"].detach().double()
    rate = torch.zeros(raw.shape[2], device=raw.device) if leaves.get("A_log") is None else leaves["A_log"].detach()
    rate = rate.double().exp().view(-1, *(1,) * (raw.dim() - 3))
    x = raw + leaves["dt_bias"].detach().double() if "dt_bias" in leaves else raw
    y = rate * x
    slope = -rate * torch.sigmoid(x) if low is None else low * rate * torch.sigmoid(y) * torch.sigmoid(-y)
    dg = torch.where(slope != 0, grads["g"].double() / slope, 0.0)
    of = {"A_log": -rate * F.softplus(x) if low is None else slope * x, "dt_bias": slope}
    return {name: (z.norm(dim=1) * dg.norm(dim=1)).norm().item() for name, z in of.items() if name in grads}


def gradient_scales(op: str, inputs: Inputs, grads: dict[str, torch.Tensor]) -> dict[str, float]:
    """What errors of gradients are relative to, where that is not their own norm: of gates as they are given, of parameters of raw ones."""
    leaves = inputs.leaves()
    if "g" not in grads:
        return {}
    if inputs.kwargs.get("use_gate"):
        return parameter_scales(inputs, grads)
    return {"g": gate_gradient_scale(grads["g"], *((leaves[x], grads[x]) for x in ("q", "k", "p") if x in grads))}


class Case(TokenCase):
    """Options of the generator: raw (q, k, logits and gates as layers project them, with every transform inside), ungated (g = None)."""

    generate = staticmethod(make_inputs)


_PACK = (0, 1, 2, 63, 64, 65)
_BF16, _FP16 = torch.bfloat16, torch.float16
_RAW = (("raw", True),)

#: Rows that every op gets (those about gates: every gated op). B, T, H, HV, K, V.
_ROWS = (
    # lengths around chunk edges, and none at all
    row("no_tokens", 2, 0, 1, 1, 16, 16, tags="small interpreter", initial_state=True, final_state=True),
    row("no_rows", 0, 5, 1, 1, 16, 16, tags="small interpreter", final_state=True),
    row("one_token", 3, 1, 2, 2, 16, 32, tags="small interpreter", initial_state=True, final_state=True),
    row("two_tokens", 2, 2, 1, 1, 32, 16, tags="small interpreter", initial_state=True, final_state=True),
    row("63_tokens", 1, 63, 1, 1, 16, 16, final_state=True),
    row("64_tokens", 1, 64, 1, 1, 16, 16, initial_state=True),
    row("65_tokens", 1, 65, 1, 1, 16, 16, tags="small interpreter"),
    row("130_tokens", 1, 130, 1, 2, 16, 32, tags="small interpreter halves causal repeat", initial_state=True, final_state=True),
    # head dims: powers of two, sizes that need masks, K != V
    row("d64", 1, 70, 2, 2, 64, 64, initial_state=True, final_state=True),
    row("d80", 1, 40, 1, 1, 80, 80, final_state=True),
    row("d100", 1, 40, 1, 1, 100, 100, fused=True, initial_state=True, final_state=True),
    row("d20_d36", 1, 33, 1, 1, 20, 36, tags="small interpreter", initial_state=True, final_state=True),
    row("d128", 1, 70, 1, 1, 128, 128, initial_state=True, final_state=True, source="Kimi Linear, Qwen3-Next"),
    row("d256", 1, 70, 1, 1, 256, 256, final_state=True, source="Gated DeltaNet's widest keys"),
    row("d128_d64", 1, 70, 1, 2, 128, 64, initial_state=True, final_state=True),
    row("d64_d128", 2, 66, 2, 2, 64, 128, fused=True),
    # grouped value heads
    row("group2", 2, 66, 2, 4, 16, 32, tags="small interpreter partial", fused=True, initial_state=True, final_state=True),
    row("group4", 1, 37, 2, 8, 32, 16, tags="small interpreter"),
    # packing
    row("pack", 1, 195, 1, 2, 16, 16, tags="small interpreter causal repeat", lengths=_PACK, initial_state=True, final_state=True),
    row("pack_stateless", 1, 195, 2, 2, 32, 32, lengths=_PACK, fused=True),
    row("pack_of_one", 1, 65, 1, 1, 16, 16, lengths=(65,), final_state=True),
    row("pack_mixed", 1, 137, 1, 2, 64, 32, lengths=(5, 0, 130, 1, 1), initial_state=True, final_state=True),
    row("pack_of_none", 1, 0, 1, 1, 16, 16, tags="small interpreter", lengths=(0, 0), initial_state=True, final_state=True),
    # transforms inside
    row("raw", 2, 66, 1, 2, 32, 16, tags="small interpreter partial", options=_RAW, initial_state=True, final_state=True),
    row("raw_doubled", 1, 70, 1, 2, 32, 32, options=(*_RAW, ("allow_neg_eigval", True)), final_state=True),
    row("raw_pack_bf16", 1, 195, 1, 4, 32, 32, dtype=_BF16, options=_RAW, lengths=_PACK, initial_state=True, final_state=True),
    # dtypes
    row("bf16", 2, 130, 2, 2, 64, 64, tags="small repeat", dtype=_BF16, initial_state=True, final_state=True),
    row("fp16", 1, 130, 2, 2, 64, 32, dtype=_FP16, initial_state=True, final_state=True),
    row("bf16_group_pack", 1, 195, 1, 4, 32, 32, dtype=_BF16, lengths=_PACK, initial_state=True, final_state=True),
    row("bf16_small", 1, 66, 1, 2, 32, 16, tags="small interpreter", dtype=_BF16, initial_state=True, final_state=True),
    row("fp16_small", 1, 33, 1, 1, 16, 16, tags="small interpreter", dtype=_FP16, fused=True, final_state=True),
    # sizes for a GPU
    row("gpu_long", 1, 4100, 2, 2, 64, 64, tags="gpu causal repeat", dtype=_BF16, initial_state=True, final_state=True),
    row("gpu_batch", 8, 513, 4, 4, 128, 128, tags="gpu repeat", dtype=_BF16, fused=True),
    row("gpu_wide", 2, 300, 2, 2, 256, 256, tags="gpu repeat", dtype=_BF16, initial_state=True, final_state=True),
    row(
        "gpu_group", 2, 700, 2, 8, 128, 64, tags="gpu repeat halves partial", dtype=_BF16, fused=True, initial_state=True,
        final_state=True,
    ),
    row("gpu_fp32", 2, 600, 2, 2, 128, 128, tags="gpu", initial_state=True, final_state=True),
    row(
        "gpu_pack", 1, 3195, 2, 2, 128, 128, tags="gpu causal repeat", dtype=_BF16, lengths=(*_PACK, 1000, 0, 1, 1999), initial_state=True,
        final_state=True,
    ),
    # published models
    row("bench_4k", 4, 4096, 16, 16, 128, 128, tags="bench", dtype=_BF16, source="2048-wide models of 1.3B"),
    row("bench_2k", 8, 2048, 32, 32, 128, 128, tags="bench", dtype=_BF16, source="Qwen3-Next, Kimi Linear: 32 heads of 128"),
    row("bench_8k", 1, 8192, 32, 32, 128, 128, tags="bench", dtype=_BF16, source="the same at batch 1"),
    row("bench_32k", 1, 32768, 8, 8, 128, 128, tags="bench", dtype=_BF16, source="long context at batch 1"),
)  # fmt: skip

_GATE_ROWS = (
    row("strong", 1, 70, 1, 2, 16, 32, tags="small interpreter stress", regime="strong", initial_state=True, final_state=True),
    row("none", 1, 70, 1, 2, 16, 32, tags="small stress", regime="none", initial_state=True, final_state=True),
    row("reset", 1, 70, 1, 2, 16, 16, tags="small interpreter stress", regime="reset", initial_state=True, final_state=True),
    row("strong_bf16", 2, 130, 2, 2, 64, 64, tags="small stress", regime="strong", dtype=_BF16, initial_state=True, final_state=True),
    row("none_bf16", 2, 130, 2, 2, 64, 64, tags="small stress", regime="none", dtype=_BF16, initial_state=True, final_state=True),
    row("reset_pack", 1, 195, 1, 2, 32, 32, tags="small stress", regime="reset", lengths=_PACK, initial_state=True, final_state=True),
    row("bounded", 1, 70, 1, 2, 32, 16, options=(*_RAW, ("lower_bound", -5.0)), initial_state=True, final_state=True),
    row("bounded_alone", 1, 40, 1, 2, 32, 16, options=(*_RAW, ("lower_bound", -5.0), ("A_log", None), ("dt_bias", None))),
    row("gpu_strong", 2, 1030, 2, 2, 128, 128, tags="gpu stress", regime="strong", dtype=_BF16, initial_state=True, final_state=True),
    row("gpu_none", 2, 1030, 2, 2, 128, 128, tags="gpu stress", regime="none", dtype=_BF16, initial_state=True, final_state=True),
)  # fmt: skip

#: Further rows of delta_product: other numbers of updates, and no gate.
_PRODUCT_ROWS = (
    row("one_update", 1, 40, 1, 2, 16, 16, options=(("num_householder", 1),), initial_state=True, final_state=True),
    row("three_updates", 1, 45, 1, 2, 16, 16, tags="small interpreter", options=(("num_householder", 3),), final_state=True),
    row("ungated_pack", 1, 137, 1, 2, 16, 16, options=(("ungated", True),), lengths=(5, 0, 130, 1, 1), initial_state=True),
)


def _make_cases() -> Iterator[Case]:
    for op in OP_NAMES:
        rows = _ROWS + (_GATE_ROWS if op in GATED else ()) + (_PRODUCT_ROWS if op == "delta_product" else ())
        for name, sizes, tags, fields in rows:
            yield Case(name, op, sizes, tags=tags | {"gpu"} if "small" in tags else tags, **fields)


CASES: tuple[Case, ...] = tuple(_make_cases())


def select(tag: str, op: str | None = None) -> tuple[Case, ...]:
    """The cases with a tag, of one op or all."""
    return selected(CASES, tag, op)
