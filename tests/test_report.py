"""`fla-dispatch bench`: the page needs nothing else, holds its data, and its numbers are right."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import PLANTED, cheap, planted

from fla_dispatch import cli
from fla_dispatch.kernels.scalar_decay import chunk_torch
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig
from fla_dispatch.tuning import bench

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

SIZES = ("--op", "simple_gla", "--size", "B=1", "--size", "T=16,70", "--size", "H=2", "--size", "D=16", "--dtype", "float32")
FEW = ("--device", "cpu", "--seconds", "0.01")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 1 << 22)
    monkeypatch.setitem(bench.MATMUL_SIZE, "cpu", 128)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """run("--json") -> (exit code, stdout, stderr) of bench."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fla-dispatch", "bench", *SIZES, *FEW, *arguments])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        captured = capsys.readouterr()
        return int(leave.value.code or 0), captured.out, captured.err

    return call


class Page(html.parser.HTMLParser):
    """Elements, attributes that name a resource, the data, and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.named: list[str] = []
        self.ids: list[str] = []
        self.data = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.named += [values[name] or "" for name in ("src", "href", "xlink:href", "srcset", "action", "data") if name in values]
        self.ids += [values["id"] or ""] if "id" in values else []
        self._inside = tag == "script"
        if tag == "script":
            assert values["type"] == "application/json"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data


def test_page(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    code, out, _ = run("--grad", "--report", str(path), "--json", "--variants", "reference,chunk")
    text = path.read_text(encoding="utf-8")
    page, document = Page(text), json.loads(out)
    assert code == 0
    assert not re.search(r"https?:|//[a-z]|@import", text), "the page is offline"
    assert all(name.startswith("#") and name[1:] in page.ids for name in page.named) and page.named
    assert all(name in page.ids for name in re.findall(r"url\(#([^)]+)\)", text))
    assert len(page.ids) == len(set(page.ids))
    assert page.tags["svg"] == 2 and page.tags["script"] == 1
    assert json.loads(page.data) == document

    rows = document["rows"]
    ran = [r for r in rows if r["status"] == "ok"]
    assert {(r["variant"], r["direction"], r["sizes"]["T"]) for r in ran} == {
        (v, d, t) for v in ("reference", "chunk_torch") for d in ("forward", "backward") for t in (16, 70)
    }
    for r in ran:
        assert r["rounds"] >= 3 and 0 < r["min_us"] <= r["median_us"] and r["mad_us"] >= 0
        assert r["tb_per_s"] > 0 and r["tflop_per_s"] > 0 and r["share"] > 0
        assert r["errors"] and set(r["errors"]) == set(r["tolerances"])
        assert all(0 <= x <= r["tolerances"][name] for name, x in r["errors"].items())
    assert all(r["detail"] for r in rows if r["status"] == "refused") and {"chunk_triton"} == {
        r["variant"] for r in rows if r["status"] == "refused"
    }
    assert all(x > 0 for x in document["ceilings"].values())
    assert {r["variant"] for r in rows if r["chosen"]} == {"chunk_torch"}
    for words in ("chunk_torch", "Roofline", "Time over T", "dq", torch.__version__.split("+")[0]):
        assert words in text


def test_rates_are_of_bytes_and_operations() -> None:
    """q, k, v and o of 2 heads x 16, g of 2 heads, r_t of none: each once. 64 K + 64 V + 2 K V multiply-adds per token and head."""
    seen = bench.measure(
        "simple_gla", [{"B": 1, "T": 32, "H": 2, "HV": 0, "K": 16, "V": 16}], "float32", torch.device("cpu"),
        lambda key: [bench.Pick("chunk_torch", d, TorchConfig(16)) for d in bench.DIRECTIONS], grad=True, seconds=0.01,
    )  # fmt: skip
    forward, backward = seen["rows"]
    assert forward["bytes"] == 4 * 32 * 2 * (4 * 16 + 1)
    assert backward["bytes"] == 4 * 32 * 2 * (3 * 16 + 1 + 16 + 3 * 16 + 1)
    assert forward["flops"] == 2 * 32 * 2 * (64 * 16 * 2 + 2 * 16 * 16) == backward["flops"] // 3
    for row in (forward, backward):
        seconds = row["median_us"] * 1e-6
        assert row["tb_per_s"] == pytest.approx(row["bytes"] / seconds * 1e-12)
        assert row["tflop_per_s"] == pytest.approx(row["flops"] / seconds * 1e-12)


def test_faults_are_shown(run: Any, tmp_path: Path) -> None:
    """A variant whose output is 1.5 times right, and whose backward raises: its error is 0.5, and the others are measured."""
    module = types.ModuleType(PLANTED)

    def forward(config: Any, tensors: Any, options: Any) -> Any:
        found = chunk_torch.forward(TorchConfig(16), tensors, options)
        return type(found)(found[0] * (float("nan") if tensors.q.shape[1] == 70 else 1.5), *found[1:])

    def backward(config: Any, residuals: Any, grads: Any, options: Any, wanted: Any) -> Any:
        raise RuntimeError("</script><b>planted</b>")

    module.forward, module.backward = forward, backward
    path = tmp_path / "out.html"
    with planted(cheap(), module):
        code, out, _ = run("--grad", "--report", str(path), "--json")
    assert code == 1
    rows = {(r["variant"], r["direction"], r["sizes"]["T"]): r for r in json.loads(out)["rows"]}
    wrong = rows["planted_torch", "forward", 16]
    assert wrong["status"] == "wrong" and wrong["errors"]["o"] == pytest.approx(0.5, rel=1e-3) and wrong["median_us"] > 0
    assert rows["planted_torch", "forward", 70]["errors"]["o"] is None
    raised = rows["planted_torch", "backward", 16]
    assert raised["status"] == "crash" and "planted" in raised["detail"] and raised["median_us"] is None
    assert all(r["status"] == "ok" for (name, *_), r in rows.items() if name == "chunk_torch")
    page = Page(path.read_text(encoding="utf-8"))
    assert json.loads(page.data) == json.loads(out) and "b" not in page.tags
    assert re.search(r'class="bad">5\.0e-01<', path.read_text(encoding="utf-8")) and "not finite" in path.read_text(encoding="utf-8")


def test_table(run: Any) -> None:
    code, out, _ = run()
    assert code == 0 and "chunk_torch *" in out and "TFLOP/s" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--variants", "chunk_troch"], "chunk_torch"),
        (["--size", "T=0"], "at least 1"),
        (["--size", "Q=1"], "Q"),
        (["--dtype", "int5"], "int5"),
        (["--regime", "lazy"], "eager"),
        (["--report", "nowhere/out.html"], "nowhere"),
    ],
)
def test_wrong_lines(run: Any, arguments: list[str], words: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and words in err and "Traceback" not in err


def test_missing_package(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jinja2" else real(name, *a))
    code, _, err = run("--report", str(tmp_path / "out.html"))
    assert code == 2 and "jinja2" in err and "pip install 'fla-dispatch[report]'" in err and not list(tmp_path.iterdir())
