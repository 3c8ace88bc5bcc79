"""Every refusal code: the requirement that gives it, its exact text, and its row in docs/refusals.md."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fla_dispatch import registry
from fla_dispatch.device import hypothetical
from fla_dispatch.errors import RegistrationError
from fla_dispatch.problem import Problem
from fla_dispatch.requirements import (
    Dim,
    DTypes,
    Flag,
    Gpu,
    Lacks,
    Package,
    Refusal,
    RefusalCode,
    Requirement,
    Rule,
    SharedMemory,
    prove_sound,
    refusals,
)

DOCS = Path(__file__).resolve().parent.parent / "docs/refusals.md"

BASE = Problem(
    recurrence="r",
    device=hypothetical("sm90"),
    dtypes=(("qkv", "bfloat16"),),
    K=64,
    V=64,
    group=1,
    BH=16,
    T=1024,
    N=1,
    mean_length=1024,
    packed=False,
    initial_state=False,
    final_state=False,
    grad=False,
)


def like(**fields: object) -> Problem:
    return dataclasses.replace(BASE, **fields)


CPU = hypothetical("cpu")

#: (code, requirement, a problem that it refuses, the text)
SNAPSHOT: list[tuple[RefusalCode, Requirement, Problem, str]] = [
    (RefusalCode.DEVICE_KIND, Gpu(), like(device=CPU), "device.kind: device is cpu, wants a GPU; move the tensors to a GPU"),
    (
        RefusalCode.DEVICE_KIND,
        Gpu(nvidia_only=("sm90",)),
        like(device=hypothetical("gfx942")),
        "device.kind: device is gfx942, wants sm90; use another variant on this device",
    ),
    (
        RefusalCode.DEVICE_KIND,
        Gpu(intel=False),
        like(device=hypothetical("xe")),
        "device.kind: device is xe, wants an NVIDIA or AMD GPU; use a torch variant on this device",
    ),
    (
        RefusalCode.ARCH_TOO_OLD,
        Gpu(nvidia_min=90),
        like(device=hypothetical("sm80")),
        "arch.too_old: arch is sm80, wants sm90 or newer; use a newer GPU or a torch variant",
    ),
    (
        RefusalCode.ARCH_UNKNOWN,
        Gpu(nvidia_only=("sm90",)),
        like(device=hypothetical("sm100")),
        "arch.unknown: arch is sm100, wants sm90; use another variant on this device",
    ),
    (
        RefusalCode.ARCH_UNKNOWN,
        Gpu(amd=("gfx942",)),
        like(device=hypothetical("gfx90a")),
        "arch.unknown: arch is gfx90a, wants gfx942; use a torch variant on this device",
    ),
    (
        RefusalCode.INTERPRETER_ONLY_FORCED,
        Gpu(),
        like(device=CPU, interpret=True),
        "interpreter.only_forced: device is a CPU under the interpreter, wants to be named; "
        "name the variant (mode=...) to run it interpreted",
    ),
    (
        RefusalCode.PACKAGE_MISSING,
        Package("no-such-package", (1, 2)),
        BASE,
        "package.missing: package is no no-such-package, wants no-such-package >= 1.2; pip install no-such-package",
    ),
    (
        RefusalCode.PACKAGE_VERSION,
        Package("pytest", (999,), (1000,)),
        BASE,
        r"package.version: package is pytest [\d.]+, wants pytest >= 999, < 1000; pip install 'pytest >= 999, < 1000'",
    ),
    (
        RefusalCode.DTYPE,
        DTypes("qkv", ("float32", "float16")),
        BASE,
        "dtype.unsupported: qkv is bfloat16, wants float32 or float16; cast qkv, or use a torch variant",
    ),
    (RefusalCode.DIM_TOO_SMALL, Dim("K", minimum=128), BASE, "dim.too_small: K is 64, wants >= 128; use another variant"),
    (RefusalCode.DIM_TOO_LARGE, Dim("T", maximum=64), BASE, "dim.too_large: T is 1024, wants <= 64; use another variant"),
    (RefusalCode.DIM_MULTIPLE, Dim("V", multiple=48), BASE, "dim.not_multiple: V is 64, wants a multiple of 48; pad V to 96"),
    *(
        (
            code,
            Lacks((feature,)),
            like(**{feature: True}),
            f"{code.value}: {feature} is asked for, wants not asked for; {fix}, or use another variant",
        )
        for feature, code, fix in (
            ("packed", RefusalCode.PACKED, "call it once per sequence"),
            ("initial_state", RefusalCode.INITIAL_STATE, "leave initial_state out"),
            ("final_state", RefusalCode.FINAL_STATE, "set output_final_state=False"),
            ("grad", RefusalCode.GRAD, "call it under torch.no_grad()"),
            ("deterministic", RefusalCode.DETERMINISM, "torch.use_deterministic_algorithms(False)"),
            ("capture", RefusalCode.CAPTURE, "call it outside graph capture"),
        )
    ),
    (
        RefusalCode.SHARED_MEMORY,
        SharedMemory(lambda p: p.K * 8192),
        BASE,
        "shared_memory.too_small: shared memory is 232448 B, wants 524288 B; use smaller head dims or another variant",
    ),
    (
        RefusalCode.FLAG,
        Flag("normalize", ("false",)),
        like(flags=(("normalize", "true"),)),
        "flag.unsupported: normalize is true, wants false; use another variant",
    ),
    (
        RefusalCode.RULE,
        Rule("heads", ("group",), lambda p: ("one group", "two", "group the heads") if p.group == 1 else None),
        BASE,
        "rule: heads is one group, wants two; group the heads",
    ),
]

#: Codes that no requirement gives: where they come from instead.
ELSEWHERE = {
    RefusalCode.IMPORT_ERROR: "registry.Variant.load, tested below",
    RefusalCode.ADVISORY: "the table of known-bad combinations, tested in test_advisories.py",
    RefusalCode.PROOF: "records of failed candidates, tested in test_tiers.py",
}


@pytest.mark.parametrize("code, requirement, problem, text", SNAPSHOT, ids=[f"{row[0].name}-{i}" for i, row in enumerate(SNAPSHOT)])
def test_text(code: RefusalCode, requirement: Requirement, problem: Problem, text: str) -> None:
    found = requirement.refuse(problem)
    assert found is not None and found.code is code
    assert found.text() == text or re.fullmatch(text, found.text())
    assert set(found.to_dict()) == {"code", "field", "have", "want", "fix"} and all(found.to_dict().values())
    assert refusals((requirement, requirement), problem) == (found, found)
    prove_sound("test", [requirement])


@pytest.mark.parametrize("code, requirement, problem, text", SNAPSHOT, ids=[f"{row[0].name}-{i}" for i, row in enumerate(SNAPSHOT)])
def test_declared_fields_decide(code: RefusalCode, requirement: Requirement, problem: Problem, text: str) -> None:
    """A verdict changes only with fields that the requirement declares: all other fields may be anything."""
    undeclared = {f.name for f in dataclasses.fields(Problem)} - set(requirement.reads)
    changed: dict[str, object] = {"K": 100, "V": 20, "group": 4, "BH": 999, "T": 1, "N": 7, "mean_length": 3, "recurrence": "other"}
    changed |= {name: not getattr(problem, name) for name in ("packed", "initial_state", "final_state", "grad", "capture", "deterministic")}
    changed |= {
        "dtypes": (("qkv", "float64"),),
        "flags": (),
        "device": CPU,
        "interpret": not problem.interpret,
        "forced": not problem.forced,
    }
    other = dataclasses.replace(problem, **{name: value for name, value in changed.items() if name in undeclared})
    assert requirement.refuse(other) == requirement.refuse(problem)


def test_every_code_is_in_the_snapshot() -> None:
    assert {row[0] for row in SNAPSHOT} | set(ELSEWHERE) == set(RefusalCode)
    assert not {row[0] for row in SNAPSHOT} & set(ELSEWHERE)


def test_codes_are_stable() -> None:
    """The codes that users may match on. A code is added here on purpose; none is renamed or taken away."""
    assert sorted(code.value for code in RefusalCode) == [
        "advisory.denied", "arch.too_old", "arch.unknown", "capture.unsupported", "determinism.unsupported", "device.kind",
        "dim.not_multiple", "dim.too_large", "dim.too_small", "dtype.unsupported", "flag.unsupported", "grad.unsupported",
        "import.failed", "interpreter.only_forced", "package.missing", "package.version", "packing.unsupported",
        "proof.failed", "rule",
        "shared_memory.too_small", "state.final_unsupported", "state.initial_unsupported",
    ]  # fmt: skip


def test_failed_import_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fla_dispatch_broken_plugin.py").write_text("raise RuntimeError('the plug-in needs a licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    variant = registry.Variant("x_torch", "fla_dispatch_broken_plugin", (), lambda problem, config, direction: 1.0)
    found = variant.load()
    assert isinstance(found, Refusal) and found.code is RefusalCode.IMPORT_ERROR
    assert found.have == "RuntimeError: the plug-in needs a licence"
    missing = registry.Variant("y_torch", "fla_dispatch_no_such_module", (), lambda problem, config, direction: 1.0).load()
    assert isinstance(missing, Refusal) and "No module named" in missing.have


def test_undeclared_field_in_a_rule() -> None:
    rule = Rule("sly", ("K",), lambda p: None if p.V else ("a", "b", "c"))
    with pytest.raises(RegistrationError, match=r"reads the field 'V' that it does not declare"):
        rule.refuse(BASE)
    typed = Rule("typed", ("dtypes", "flags"), lambda p: (p.dtype("qkv"), "b", "c") if p.flag("decay") is None else None)
    found = typed.refuse(BASE)
    assert found is not None and found.have == "bfloat16"
    with pytest.raises(RegistrationError, match="reads the field 'dtypes'"):
        Rule("sly", ("K",), lambda p: (p.dtype("qkv"), "b", "c")).refuse(BASE)


def documented() -> dict[str, tuple[str, str]]:
    """code -> (meaning, remedy), from the table of docs/refusals.md."""
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.+?) \| (.+?) \|$", DOCS.read_text(encoding="utf-8"), re.M)
    assert len(rows) == len({row[0] for row in rows})
    return {code: (meaning, remedy) for code, meaning, remedy in rows}


def test_documented() -> None:
    """docs/refusals.md lists exactly the codes that there are, each with a meaning and a remedy."""
    assert set(documented()) == {code.value for code in RefusalCode}
    assert all(len(meaning) > 20 and len(remedy) > 10 for meaning, remedy in documented().values())
