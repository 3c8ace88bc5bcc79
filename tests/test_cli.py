"""The command line: output for people and as JSON, exit codes, and what doctor calls broken."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import OPS

from fla_dispatch import cli, registry
from fla_dispatch.cli import demo, doctor
from fla_dispatch.device import hypothetical, package_version
from fla_dispatch.requirements import Package


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """run("ops", "--json") -> (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fla-dispatch", *arguments])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        captured = capsys.readouterr()
        return int(leave.value.code or 0), captured.out, captured.err

    return call


def test_ops(run: Any) -> None:
    code, out, _ = run("ops", "--json")
    listed = json.loads(out)
    assert code == 0 and [op["name"] for op in listed] == registry.op_names() and set(OPS) <= {op["name"] for op in listed}
    assert all(op["summary"] and op["sizes"] and op["variants"] for op in listed)
    code, out, _ = run("ops")
    assert code == 0 and all(name in out for name in OPS) and "chunk_torch" in out


@pytest.mark.parametrize("device", ["sm90", "gfx942", "cpu"])
def test_explain_elsewhere(run: Any, device: str) -> None:
    arguments = ["explain", "retention", "--device", device, "--size", "T=4096", "--size", "H=16", "--grad"]
    code, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert code == 0 and found["op"] == "retention"
    names = {v.name for v in registry.get_recurrence("scalar_decay").variants}
    assert names == {row["name"] for row in found["rows"]}
    code, out, _ = run(*arguments)
    assert code == 0 and all(name in out for name in names)


@pytest.mark.parametrize("name", OPS)
def test_explain_every_op(run: Any, name: str) -> None:
    code, out, _ = run("explain", name, "--device", "sm90", "--packed", "--initial-state", "--final-state", "--dtype", "float16", "--json")
    assert code == 0 and json.loads(out)["recurrence"] == registry.get_op(name).recurrence


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["explain", "retentoin"], "retention"),
        (["explain", "retention", "--device", "sm91x"], "sm90"),
        (["explain", "retention", "--size", "Q=3"], "Q"),
        (["explain", "retention", "--size", "T=many"], "NAME=NUMBER"),
        (["explain", "retention", "--dtype", "int5"], "int5"),
        (["explain", "retention", "--device", "cpu", "--mode", "sweep_tritn"], "sweep_triton"),
        (["explain"], "OP"),
        (["demo", "--op", "retentoin"], "retention"),
        (["demo", "--device", "nowhere"], "nowhere"),
        (["nonsense"], "nonsense"),
        (["ops", "--nonsense"], "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(run: Any, arguments: list[str], words: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and words in err and "Traceback" not in err


def test_version(run: Any) -> None:
    code, out, _ = run("--version")
    assert code == 0 and re.fullmatch(r"\d+\.\d+\S*\n", out)


def test_doctor(run: Any) -> None:
    triton_before = "triton" in sys.modules
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert found["ok"] == (code == 0) and code in (0, 1)
    assert triton_before or "triton" not in sys.modules
    rows = {row["variant"]: row for row in found["variants"] if row["recurrence"] == "scalar_decay"}
    for room in ("scalar_step", "delta_step"):
        assert {row["variant"] for row in found["variants"] if row["recurrence"] == room} == {"step_triton", "step_torch", "reference"}
    assert set(rows) == {v.name for v in registry.get_recurrence("scalar_decay").variants}
    assert all(row["available"] or (row["why"] and row["remedy"]) for row in rows.values())
    assert rows["reference"]["available"] and rows["chunk_torch"]["trains"]
    if not torch.cuda.is_available() and not any(Path(path).exists() for path in doctor.DRIVER_FILES):
        assert code == 0 and rows["sweep_triton"]["remedy"] == "move the tensors to a GPU"
    code, out, _ = run("doctor")
    assert all(name in out for name in rows) and torch.__version__ in out


def test_doctor_findings() -> None:
    good = {"torch": (2, 13, 0), "triton": (3, 7, 1)}
    nvidia = {"/dev/nvidia0": "an NVIDIA GPU"}

    def texts(gpus: int, have: dict[str, tuple[int, ...] | None], files: dict[str, str], cuda: bool = True) -> str:
        return " ".join(f.what + f.remedy for f in doctor.environment_findings(gpus, have, files, cuda, False))

    assert not texts(1, good, nvidia) and not texts(0, good, {})
    assert "no GPU" in texts(0, good, nvidia) and "driver" in texts(0, good, nvidia)
    assert "torch build for NVIDIA" in texts(0, good, nvidia, cuda=False)
    assert "triton is not installed" in texts(1, {**good, "triton": None}, nvidia)
    assert not texts(0, {**good, "triton": None}, {}), "a machine without a GPU needs no triton"
    assert "triton 3.4.0 is older than 3.5" in texts(1, {**good, "triton": (3, 4, 0)}, nvidia)
    assert "torch 2.8.0 is older" in texts(0, {**good, "torch": (2, 8, 0)}, {})


def test_doctor_rows() -> None:
    """A module that is gone and a package out of range are broken; a GPU variant on a CPU is only unavailable."""
    recurrence = registry.get_recurrence("scalar_decay")
    sweep = recurrence.variant("sweep_triton")
    here, gpu = doctor.problems(recurrence, hypothetical("cpu")), doctor.problems(recurrence, hypothetical("sm90"))
    assert not doctor.variant_row("r", sweep, here).broken
    if (package_version("triton") or ()) >= doctor.OLDEST["triton"]:
        assert doctor.variant_row("r", sweep, gpu).trains
    gone = dataclasses.replace(sweep, module="fla_dispatch.kernels.scalar_decay.gone_triton")
    assert doctor.variant_row("r", gone, gpu).broken
    newer = dataclasses.replace(sweep, requirements=(*sweep.requirements, Package("pytest", (999,))))
    row = doctor.variant_row("r", newer, gpu)
    assert row.broken and not row.available and row.remedy.startswith("pip install")


def test_oldest_versions_agree_with_the_project() -> None:
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    for name, oldest in doctor.OLDEST.items():
        assert any(text.startswith(f"{name}>={'.'.join(map(str, oldest))}") for text in project["dependencies"])


@pytest.mark.parametrize("name", OPS)
def test_demo_of_one_op(run: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(demo, "CPU_SIZES", {"B": 1, "T": 70, "H": 2, "D": 16})
    code, out, _ = run("demo", "--device", "cpu", "--op", name, "--json")
    (found,) = json.loads(out)["ops"]
    assert code == 0 and found["ok"] and found["op"] == name and found["reason"]
    assert found["output_error"] < 1e-4 and found["gradient_errors"] and max(found["gradient_errors"].values()) < 1e-4
    assert found["forward_seconds"] > 0 and found["reference_forward_seconds"] > 0
    code, out, _ = run("demo", "--device", "cpu", "--op", name)
    assert code == 0 and found["forward_variant"] in out and found["reason"].split(";")[0] in out


def test_demo_fails_on_wrong_numbers(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CPU_SIZES", {"B": 1, "T": 70, "H": 2, "D": 16})
    monkeypatch.setattr(demo, "TOLERANCE", {torch.float32: 0.0})
    code, out, _ = run("demo", "--device", "cpu", "--op", "retention")
    assert code == 1 and "above tolerance: retention" in out


def test_relative_error_of_nan() -> None:
    assert demo.relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_gradient_tokens() -> None:
    """The reference keeps one state per token; the demo cuts its length to what fits."""
    assert demo.gradient_tokens({"B": 1, "T": 512, "H": 8}, 64, 1 << 27) == 512
    cut = demo.gradient_tokens({"B": 4, "T": 4096, "H": 16, "HV": 0}, 128, 4 << 30)
    assert cut < 4096 and cut * 8 * 4 * 16 * 128 * 128 <= 4 << 30 < 2 * cut * 8 * 4 * 16 * 128 * 128


def test_steps_are_measured_and_not_demonstrated(run: Any, tmp_path: Path) -> None:
    code, _, err = run("demo", "--device", "cpu", "--op", "retention_step")
    assert code == 2 and "without" in err and "bench --op retention_step" in err
    page = tmp_path / "steps.html"
    sizes = ["--size", "B=1,2", "--size", "H=2", "--size", "D=16", "--seconds", "0.01"]
    code, out, _ = run(
        "bench", "--op", "mamba2_step", "--device", "cpu", "--dtype", "float32", *sizes, "--report", str(page), "--json"
    )  # fmt: skip
    rows = json.loads(out)["rows"]
    assert code == 0 and {r["variant"] for r in rows} == {"step_torch"} and all({"o", "state"} <= set(r["errors"]) for r in rows)
    assert "B (rows)" in page.read_text(encoding="utf-8")


def test_warmup_of_steps_names_their_pools(run: Any) -> None:
    arguments = [
        "warmup",
        "--op",
        "retention_step",
        "--serve",
        "--check",
        "--device",
        "cpu",
        "--heads",
        "2",
        "--head-dim",
        "16",
        "--batch",
        "1",
    ]
    code, out, _ = run(*arguments, "--state-dtype", "bfloat16", "--json")
    left = [x["call"] for x in json.loads(out)["left"]]
    assert code == 1 and len(left) == 2 and all(text.endswith("state_dtype=bfloat16") for text in left)
    code, _, err = run(*arguments, "--state-dtype", "bfloat")
    assert code == 2 and "float32 or bfloat16" in err
    code, _, err = run("warmup", "--op", "retention_step", "--device", "cpu")
    assert code == 2 and "no gradients" in err
