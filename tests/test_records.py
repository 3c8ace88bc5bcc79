"""Records, the choice rule and merge: what must hold for any outcomes, by hypothesis, and the corners by example."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fla_dispatch.device import hypothetical
from fla_dispatch.problem import Problem
from fla_dispatch.tuning.choice import BAND, choose, make_record, merge, settle
from fla_dispatch.tuning.records import Certificate, Choice, Outcome, Record, Timing, fingerprint, record_key

VARIANTS = ("sweep_triton", "chunk_triton", "chunk_torch")
DEFAULT = "chunk_torch"
STATUSES = ("ok", "wrong", "racy", "crash", "timeout", "oom", "compile_error")

few = settings(max_examples=150, deadline=None)


def outcome(variant: str, median: float | None = None, mad: float = 0.0, status: str = "ok", **config: int | bool | str) -> Outcome:
    timing = None if median is None else Timing(median_us=median, min_us=median, mad_us=mad, rounds=5)
    return Outcome.model_validate({"variant": variant, "config": config or None, "kernel_hash": "h", "status": status, "timing": timing})


# medians that fall inside one band, on its edge and far outside it; noise that is nothing, small and larger than the band
timings = st.builds(
    lambda median, mad, rounds: Timing(median_us=median, min_us=median * 0.9, mad_us=mad, rounds=rounds),
    st.sampled_from([100.0, 100.5, 101.0, 102.0, 102.1, 104.0, 150.0]) | st.floats(50, 500),
    st.sampled_from([0.0, 0.1, 1.0, 8.0]),
    st.integers(1, 9),
)
configs = st.none() | st.fixed_dictionaries({"BT": st.sampled_from([32, 64]), "split": st.booleans()})
certificates = st.none() | st.builds(
    Certificate,
    oracle=st.just("reference"), dtype=st.just("float64"), tokens=st.integers(1, 300), repeats=st.integers(1, 5),
    errors=st.dictionaries(st.sampled_from(["o", "dq"]), st.floats(0, 1) | st.just(math.inf)), tolerances=st.just({"o": 0.1}),
)  # fmt: skip
outcomes = st.builds(
    lambda variant, config, kernel, status, timing, proof: Outcome(
        variant=variant, config=config, kernel_hash=kernel, status=status, timing=timing if status == "ok" else None, certificate=proof
    ),
    st.sampled_from(VARIANTS), configs, st.sampled_from(["old", "new"]), st.sampled_from(STATUSES) | st.just("ok"), timings, certificates,
)  # fmt: skip
names = st.sampled_from([fingerprint(v, c) for v in VARIANTS for c in (None, {"BT": 64, "split": True}, {"BT": 32, "split": False})])
records = st.builds(
    lambda found, default, order, incumbent, created, kernels: make_record(
        "scalar_decay", "key", "forward", found, default=default, order=order, incumbent=incumbent, kernels=kernels,
        created=f"2026-01-0{created}T00:00:00+00:00",
    ),
    st.lists(outcomes, max_size=5), names, st.permutations(VARIANTS), st.none() | names, st.integers(1, 3),
    st.dictionaries(st.sampled_from(VARIANTS), st.sampled_from(["old", "new"])),
)  # fmt: skip


# ---- the models ----


@given(records)
@few
def test_json_round_trip(record: Record) -> None:
    text = record.to_json()
    assert "\n" not in text
    assert Record.model_validate_json(text).canonical == record.canonical


def test_infinite_and_nan_errors_survive() -> None:
    proof = Certificate(
        oracle="reference", dtype="float64", tokens=7, errors={"o": math.inf, "dq": math.nan}, tolerances={"o": 0.1}, repeats=3
    )
    read = Certificate.model_validate_json(proof.model_dump_json())
    assert read.errors["o"] == math.inf and math.isnan(read.errors["dq"])


def test_models_are_frozen_ignore_the_unknown_and_refuse_the_newer() -> None:
    record = make_record("r", "k", "forward", [outcome("a", 1.0)], default="a", order=[])
    with pytest.raises(ValidationError):
        record.key = "other"  # type: ignore[misc]
    assert Record.model_validate({**record.model_dump(), "added_later": 1}) == record
    with pytest.raises(ValidationError, match="schema_version"):
        Record.model_validate({**record.model_dump(), "schema_version": 2})
    with pytest.raises(ValidationError):
        Timing(median_us=math.nan, min_us=0, mad_us=0, rounds=1)


def test_config_values_keep_their_types() -> None:
    config = {"BT": 1, "split": True, "mode": "a"}
    read = Outcome.model_validate_json(outcome("a", **config).model_dump_json()).config
    assert read == config and [type(v) for v in read.values()] == [int, bool, str]


def test_fingerprint_is_canonical() -> None:
    class Config(NamedTuple):
        BT: int
        BE: int

    assert fingerprint("a", {"BT": 64, "BE": 32}) == fingerprint("a", {"BE": 32, "BT": 64}) == fingerprint("a", Config(64, 32))
    assert fingerprint("a", None) == fingerprint("a", {}) == "a"
    assert len({fingerprint("a", {"x": value}) for value in (1, True, "1")}) == 3


def test_record_key_leaves_out_what_is_no_fact_of_a_measurement() -> None:
    problem = Problem(
        "scalar_decay", hypothetical("sm90"), (("qkv", "bfloat16"),), K=64, V=64, group=1, BH=40, T=1000, N=1, mean_length=1000,
        packed=False, initial_state=False, final_state=False, grad=True,
    )  # fmt: skip
    key = record_key(problem)
    assert key == record_key(problem.key()) == problem.key().text()
    for name in ("forced", "interpret", "capture"):
        assert record_key(dataclasses.replace(problem, **{name: True})) == key
    assert record_key(dataclasses.replace(problem, T=1024)) == key != record_key(dataclasses.replace(problem, T=1025))


# ---- the rule ----


@given(st.lists(outcomes, max_size=6), names, st.permutations(VARIANTS), st.none() | names, st.randoms(use_true_random=False))
@few
def test_choice_does_not_depend_on_the_order_of_outcomes(found, default, order, incumbent, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(found)
    random.shuffle(shuffled)
    assert choose(found, default, order, incumbent) == choose(shuffled, default, order, incumbent)


@given(st.lists(outcomes, max_size=6), names, st.permutations(VARIANTS), st.none() | names)
@few
def test_choice_is_ok_and_clearly_beats_the_default(found, default, order, incumbent) -> None:  # type: ignore[no-untyped-def]
    chosen = choose(found, default, order, incumbent)
    ok = {}
    for o in found:  # one outcome per candidate, so that its verdict and time are known here
        ok.setdefault(o.fingerprint, []).append(o)
    times = {name: same[0].timing.median_us for name, same in ok.items() if len(same) == 1 and same[0].status == "ok"}
    if chosen is None:
        assert not times
        return
    assert any(o.status == "ok" and o.fingerprint == chosen.fingerprint for o in found)
    if {chosen.fingerprint, default} <= set(times) and chosen.fingerprint != default:
        assert times[chosen.fingerprint] * (1 + BAND) <= times[default]
    assert chosen.fingerprint in chosen.band or chosen.rule == "default_guard"


@given(st.lists(st.floats(0, 1.9), min_size=3, max_size=3), st.permutations(["a", "b", "c"]))
@few
def test_noise_below_the_band_changes_nothing(jitter: list[float], order: list[str]) -> None:
    """Three equal candidates whose medians lie within 2 % of each other: always the one declared first, or the incumbent."""
    found = [outcome(name, 100.0 + j) for name, j in zip("abc", jitter, strict=True)]
    found.append(outcome("slow", 300.0))
    first, kept = choose(found, "slow", order), choose(found, "slow", order, incumbent="b")
    assert first is not None and first.variant == order[0]
    assert kept is not None and kept.variant == "b"


def test_rules_by_example() -> None:
    fast, near, slow = outcome("fast", 100.0), outcome("near", 101.5), outcome("slow", 200.0)

    def pick(found: list[Outcome], default: str, order: list[str], incumbent: str | None = None) -> tuple[str, str]:
        chosen = choose(found, default, order, incumbent)
        assert chosen is not None
        return chosen.variant, chosen.rule

    assert pick([fast, near, slow], "slow", ["fast", "near"]) == ("fast", "fastest")
    assert pick([fast, near, slow], "slow", ["near", "fast"]) == ("near", "band")
    assert pick([fast, near, slow], "slow", ["fast", "near"], "near") == ("near", "band")
    assert pick([fast, near, slow], "near", ["fast", "near"]) == ("near", "default_guard")
    assert pick([fast, slow], "slow", [], "slow") == ("fast", "fastest")  # an incumbent outside the band is let go
    assert pick([fast, outcome("noisy", 110.0, mad=9.0)], "gone", ["noisy", "fast"]) == ("fast", "fastest")  # its own noise is no merit
    assert pick([outcome("fast", 100.0, mad=5.0), outcome("near", 110.0)], "gone", ["near", "fast"]) == ("near", "band")
    often = outcome("fast", 100.0, mad=5.0)
    assert often.timing is not None
    often = often.model_copy(update={"timing": often.timing.model_copy(update={"rounds": 32})})
    assert pick([often, outcome("near", 110.0)], "gone", ["near", "fast"]) == ("fast", "fastest")  # a median of many rounds is sure
    assert pick([fast, outcome("default", None, status="crash")], "default", []) == ("fast", "fastest")
    assert choose([outcome("a", None, status="wrong")], "a", []) is None and choose([], "a", []) is None
    chosen = choose([fast, near, slow], "slow", ["near", "fast"])
    assert chosen is not None and chosen.band == ("near", "fast") and chosen.margin == pytest.approx(100 / 101.5)
    assert choose([fast], "fast", []) == Choice(variant="fast", rule="fastest", margin=1.0, band=("fast",))


def test_a_wrong_verdict_outlives_a_good_one() -> None:
    """The same code that was wrong, racy or crashed once is not chosen, whatever else was measured; memory may run out once."""
    for status, chosen in (("wrong", False), ("racy", False), ("crash", False), ("oom", True), ("timeout", True), ("compile_error", True)):
        for pair in itertools.permutations([outcome("a", 1.0), outcome("a", None, status=status)]):
            assert (choose(pair, "b", []) is not None) == chosen


# ---- merge ----


@given(records, records)
@few
def test_merge_commutes(a: Record, b: Record) -> None:
    assert merge(a, b).canonical == merge(b, a).canonical


@given(records, records, records)
@few
def test_merge_associates(a: Record, b: Record, c: Record) -> None:
    assert merge(merge(a, b), c).canonical == merge(a, merge(b, c)).canonical


@given(records, records)
@few
def test_merge_is_idempotent_and_loses_no_outcome(a: Record, b: Record) -> None:
    assert merge(a, a) == a and settle(a) == a
    both = merge(a, b)
    assert merge(both, a) == both == merge(both, b)
    assert set(both.tried) == set(a.tried) | set(b.tried)
    assert both.created == max(a.created, b.created)


def test_merge_keeps_the_quieter_timing_and_chooses_anew() -> None:
    a = make_record("r", "k", "forward", [outcome("x", 100.0, mad=9.0), outcome("y", 200.0)], default="y", order=[], created="1")
    b = make_record("r", "k", "forward", [outcome("x", 400.0, mad=0.1)], default="y", order=[], created="2")
    assert a.choice is not None and a.choice.variant == "x"
    both = merge(a, b)
    assert both.tried["x", "h"].timing == b.outcomes[0].timing
    assert both.choice is not None and both.choice.variant == "y"
    with pytest.raises(ValueError, match="different keys"):
        merge(a, make_record("r", "k", "backward", [], default="", order=[]))


def test_older_code_is_history() -> None:
    """Outcomes of another hash stay in the record and take no part in its choice; `choose_among` asks anew under other facts."""
    old = outcome("x", 1.0).model_copy(update={"kernel_hash": "old"})
    with pytest.raises(ValueError, match="several kernel hashes"):
        make_record("r", "k", "forward", [old, outcome("x", 50.0)], default="y", order=[])
    record = make_record(
        "r", "k", "forward", [old, outcome("x", 50.0), outcome("y", 90.0)], default="y", order=[], kernels={"x": "h", "y": "h"}
    )
    assert len(record.outcomes) == 3 and record.choice is not None and record.choice.margin == pytest.approx(1.8)
    behind = record.outcome()
    assert behind is not None and behind.kernel_hash == "h" and behind.timing is not None and behind.timing.median_us == 50.0
    refused = record.choose_among(lambda o: o.variant != "x" and o.kernel_hash == "h")
    assert refused is not None and refused.variant == "y"
    assert record.choose_among(lambda o: False) is None
