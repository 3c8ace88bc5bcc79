"""Decisions are cached per Key, and facts stand for Keys: both are proven here for every registered variant and field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fla_dispatch as fd
from fla_dispatch import device, errors, registry
from fla_dispatch.dispatch import plan as plans
from fla_dispatch.problem import BUCKETED, Problem, count_bucket, is_count_edge, is_length_edge, length_bucket
from fla_dispatch.registry import Variant
from fla_dispatch.requirements import Dim, Rule, SharedMemory, prove_sound

QUICK = settings(max_examples=150, deadline=None)
LENGTHS = st.one_of(st.integers(0, 300), st.integers(0, 1 << 20))
ARCHS = ("sm80", "sm90", "sm120", "gfx942", "xe", "cpu")


# -- buckets -----------------------------------------------------------------------------------------------------------------


@QUICK
@given(LENGTHS, LENGTHS)
def test_length_buckets_are_monotone_idempotent_tops(a: int, b: int) -> None:
    assert length_bucket(a) >= a
    assert length_bucket(length_bucket(a)) == length_bucket(a)
    assert (length_bucket(a) <= length_bucket(b)) or a > b
    assert is_length_edge(a) == (length_bucket(a) != length_bucket(a + 1))


@QUICK
@given(LENGTHS, LENGTHS, st.integers(1, 400))
def test_count_buckets_are_monotone_idempotent_tops(a: int, b: int, units: int) -> None:
    assert count_bucket(a, units) >= a
    assert count_bucket(count_bucket(a, units), units) == count_bucket(a, units)
    assert (count_bucket(a, units) <= count_bucket(b, units)) or a > b
    if is_count_edge(a):
        assert count_bucket(a, units) != count_bucket(a + 1, units)


# -- verdicts ----------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    packed = draw(st.booleans())
    T, N = draw(LENGTHS), draw(st.integers(1, 600))
    HV = draw(st.sampled_from([1, 2, 16, 32]))
    dtypes = [("qkv", draw(st.sampled_from(["bfloat16", "float16", "float32", "float64"])))]
    decay = draw(st.sampled_from(["none", "head", "token", "channel"]))
    if decay in ("token", "channel"):
        dtypes.append(("g", draw(st.sampled_from(["float32", "bfloat16"]))))
        if draw(st.booleans()):
            dtypes += [("beta", "float32"), ("skip", draw(st.sampled_from(["float32", "bfloat16", "float64"])))]
    flags = ("initial_state", "final_state", "grad", "capture", "deterministic", "interpret", "forced")
    return Problem(
        recurrence="scalar_decay",
        device=device.hypothetical(draw(st.sampled_from(ARCHS))),
        dtypes=tuple(dtypes),
        K=draw(st.sampled_from([16, 20, 64, 100, 128, 256, 300])),
        V=draw(st.sampled_from([16, 64, 96, 128, 256, 512])),
        group=draw(st.sampled_from([1, 4])),
        BH=N * HV,
        T=T,
        N=N,
        mean_length=-(-T // N) if packed else T,
        packed=packed,
        flags=(("decay", decay), ("normalize", draw(st.sampled_from(["true", "false"])))),
        **{name: draw(st.booleans()) for name in flags},
    )


@st.composite
def twins(draw: st.DrawFn) -> tuple[Problem, Problem]:
    """Two problems with one Key: bucketed sizes are drawn anew inside their buckets."""
    first = draw(problems())
    key, sizes = first.key(), {}
    for field in BUCKETED:
        top, bucket = getattr(key, field), _bucket(field, first)
        low = top
        while low > 0 and bucket(low - 1) == top and top - low < 4096:
            low -= 1
        sizes[field] = draw(st.integers(low, top))
    return first, dataclasses.replace(first, **sizes)


def _bucket(field: str, problem: Problem) -> Any:
    if field in ("T", "mean_length"):
        return length_bucket
    return lambda n: count_bucket(n, problem.device.units)


def verdict(variant: Variant, problem: Problem) -> list[tuple[Any, ...]]:
    """Codes and fields of the refusals; `have` may show the size itself."""
    return [(r.code, r.field, r.want) for r in variant.static_refusals(problem)]


@QUICK
@given(twins())
def test_equal_keys_get_equal_verdicts_from_every_variant(pair: tuple[Problem, Problem]) -> None:
    first, second = pair
    assert first.key() == second.key()
    assert first.key().key() == first.key()
    for variant in (v for name in ("scalar_decay", "delta") for v in registry.get_recurrence(name).variants):
        assert verdict(variant, first) == verdict(variant, second) == verdict(variant, first.key())


@settings(max_examples=60, deadline=None)
@given(twins(), st.sampled_from([None, "reference", "chunk", "chunk_torch"]))
def test_equal_keys_get_equal_decisions(pair: tuple[Problem, Problem], choice: str | None) -> None:
    recurrence = registry.get_recurrence("scalar_decay")
    first, second = (plans.decide(recurrence, dataclasses.replace(p, forced=False), choice) for p in pair)
    assert first == second
    if choice is None:
        assert first.forward is not None, "the reference takes what nobody else takes"
        assert all(v.refusals or v.forward.seconds > 0 for v in first.considered)
        assert all(v.refusals or v.forward.seconds >= first.forward.seconds for v in first.considered)


@QUICK
@given(problems(), problems())
def test_text_of_a_key_names_every_difference(a: Problem, b: Problem) -> None:
    a, b = a.key(), b.key()
    assert (a.text() == b.text()) == (a == b)


# -- registration ------------------------------------------------------------------------------------------------------------


@QUICK
@given(st.sampled_from(BUCKETED), st.integers(0, 5000), st.booleans())
def test_thresholds_inside_a_bucket_are_refused(field: str, cut: int, upper: bool) -> None:
    requirement = Dim(field, maximum=cut) if upper else Dim(field, minimum=cut + 1)
    edge = is_length_edge(cut) if field in ("T", "mean_length") else is_count_edge(cut)
    if edge:
        prove_sound("test", [requirement])
    else:
        with pytest.raises(errors.RegistrationError, match="inside a bucket"):
            prove_sound("test", [requirement])


@pytest.mark.parametrize(
    "requirement",
    [
        Dim("T", maximum=100),
        Dim("T", multiple=16),
        Rule("short", ("T",), lambda p: None),
        SharedMemory(lambda p: 0, ("K", "T")),
        Rule("unknown", ("no_such_field",), lambda p: None),
    ],
)
def test_registration_refuses_unsound_variants(requirement: Any) -> None:
    before = registry.epoch
    with pytest.raises(errors.RegistrationError):
        registry.register_variant("scalar_decay", Variant("planted_torch", "nowhere", (requirement,), lambda p, c, d: 1.0))
    assert registry.epoch == before
    assert "planted_torch" not in [v.name for v in registry.get_recurrence("scalar_decay").variants]


def test_a_rule_cannot_read_what_it_does_not_declare() -> None:
    problem = registry.get_recurrence("scalar_decay").problem(*lowered("retention")[:2], False)
    with pytest.raises(errors.RegistrationError, match="does not declare"):
        Rule("sly", ("K",), lambda p: p.T and None).refuse(problem)


# -- facts -------------------------------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {"B": 2, "T": 40, "H": 2, "HV": 2, "K": 32, "V": 48, "dtype": torch.float32}


def lowered(name: str, **changes: Any) -> tuple[Any, Any]:
    """Tensors and options of a call on the meta device."""
    sizes = {**BASE, **changes}
    op = registry.get_op(name)
    names = {"N": "K", "P": "V", "G": "H"} if name == "mamba2" else {}
    values = {s: sizes["HV"] if name == "mamba2" and s == "H" else sizes[names.get(s, s)] for s in op.sizes}
    options = {key: sizes[key] for key in ("lengths", "initial_state", "output_final_state") if key in sizes}
    args, kwargs = op.example(values, sizes["dtype"], sizes.get("where", "meta"), **options)
    if "gate" in sizes:
        args = (*args[:3], args[3].to(sizes["gate"]), *args[4:])
    if "beta" in sizes:
        args = (*args[:-1], args[-1].to(sizes["beta"]))
    if "skip" in sizes:
        kwargs["D"] = kwargs["D"].to(sizes["skip"])
    kwargs |= sizes.get("kwargs", {})
    _, tensors, chosen, prepare, _ = fd.op(name).contract(*args, **kwargs)
    return (tensors if prepare is None else prepare(tensors)), chosen


FLIPS: list[tuple[str, dict[str, Any]]] = [
    ("simple_gla", {"B": 3}),
    ("simple_gla", {"T": 70}),
    ("simple_gla", {"T": 1}),
    ("simple_gla", {"T": 0}),
    ("simple_gla", {"HV": 4}),
    ("simple_gla", {"H": 1}),
    ("simple_gla", {"K": 33}),
    ("simple_gla", {"V": 49}),
    ("simple_gla", {"dtype": torch.bfloat16}),
    ("simple_gla", {"where": "cpu"}),
    ("simple_gla", {"initial_state": True}),
    ("simple_gla", {"output_final_state": True}),
    ("simple_gla", {"lengths": [40]}),
    ("simple_gla", {"lengths": [20, 20]}),
    ("simple_gla", {"dtype": torch.bfloat16, "gate": torch.bfloat16}),
    ("linear_attn", {"kwargs": {"normalize": True}}),
    ("mamba2", {"kwargs": {"D": None}}),
    ("mamba2", {"dtype": torch.bfloat16, "skip": torch.bfloat16}),
    *(("kda", {name: n}) for name, n in (("B", 3), ("T", 70), ("T", 1), ("HV", 4), ("H", 1), ("K", 33), ("V", 49))),
    ("kda", {"dtype": torch.bfloat16}),
    ("kda", {"where": "cpu"}),
    ("kda", {"initial_state": True}),
    ("kda", {"output_final_state": True}),
    ("kda", {"lengths": [40]}),
    ("kda", {"lengths": [20, 20]}),
    ("gated_delta", {"dtype": torch.bfloat16, "gate": torch.bfloat16}),
    ("gated_delta", {"dtype": torch.bfloat16, "beta": torch.bfloat16}),
    ("delta_product", {"T": 17}),
]


def key_and_facts(name: str, **changes: Any) -> tuple[Problem, tuple[Any, ...]]:
    r = registry.get_recurrence(registry.get_op(name).recurrence)
    tensors, options = lowered(name, **changes)
    return r.problem(tensors, options, False).key(), r.facts(tensors, options)


@pytest.mark.parametrize(("name", "flip"), FLIPS, ids=str)
def test_every_argument_that_matters_changes_key_and_facts(name: str, flip: dict[str, Any]) -> None:
    base = {key: value for key, value in flip.items() if key == "dtype"} if {"gate", "skip", "beta"} & flip.keys() else {}
    before, after = key_and_facts(name, **base), key_and_facts(name, **flip)
    assert before[0] != after[0]
    assert before[1] != after[1]


DIFFERENT = ("linear_attn", "retention", "simple_gla", "mamba2", "delta", "gated_delta", "kda", "comba")


@pytest.mark.parametrize("name", DIFFERENT)
def test_ops_that_mean_other_mathematics_have_other_keys(name: str) -> None:
    others = [n for n in DIFFERENT if n != name]
    key, facts = key_and_facts(name)
    for other in others:
        other_key, other_facts = key_and_facts(other)
        assert key != other_key
        assert facts != other_facts or key.recurrence != other_key.recurrence  # facts are kept for each recurrence


@pytest.mark.parametrize("change", [{"T": 41}, {"T": 64}, {"kwargs": {"scale": 0.5}}], ids=str)
def test_what_must_not_retune_does_not(change: dict[str, Any]) -> None:
    assert key_and_facts("simple_gla") == key_and_facts("simple_gla", **change)


@pytest.mark.parametrize("field", ["grad", "deterministic", "capture", "interpret", "forced"])
def test_switches_are_fields_of_the_key(field: str) -> None:
    problem = registry.get_recurrence("scalar_decay").problem(*lowered("retention"), False)
    assert problem.key() != dataclasses.replace(problem, **{field: True}).key()


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from([*DIFFERENT, "delta_product"]))
    H = draw(st.sampled_from([1, 2]))
    changes: dict[str, Any] = {
        "B": draw(st.sampled_from([1, 2, 3, 700])),
        "T": draw(st.sampled_from([0, 1, 2, 15, 16, 17, 33, 60, 64, 65])),
        "H": H,
        "HV": H * draw(st.sampled_from([1, 2])),
        "initial_state": draw(st.booleans()),
        "output_final_state": draw(st.booleans()),
    }
    if draw(st.booleans()):
        changes["lengths"] = draw(st.lists(st.sampled_from([0, 1, 16, 17, 30, 33]), min_size=1, max_size=4))
    if name == "linear_attn" and not changes["initial_state"]:
        changes["kwargs"] = {"normalize": draw(st.booleans())}
    if name == "mamba2" and draw(st.booleans()):
        changes["kwargs"] = {"D": None}
    return name, changes


@settings(max_examples=25, deadline=None)
@given(st.lists(calls(), min_size=12, max_size=24))
def test_equal_facts_mean_equal_keys_and_the_same_tensors_and_outputs(drawn: list[tuple[str, dict[str, Any]]]) -> None:
    seen: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for name, changes in drawn:
        r = registry.get_recurrence(registry.get_op(name).recurrence)
        tensors, options = lowered(name, **changes)
        present = tuple(x is not None for x in tensors)
        outputs = r.empty_outputs(tensors, options)
        asked = tuple(plans.asked(x) is not None for x in outputs)
        kept = tuple(x is not None for x in r.residuals(tensors, outputs, options)[1:])
        what = (r.problem(tensors, options, False).key(), present, asked, kept)
        assert seen.setdefault((r.name, *r.facts(tensors, options)), what) == what
