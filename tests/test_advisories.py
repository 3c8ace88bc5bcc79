"""Advisories: the shipped rows are sound and deny what they say, versions and configs are matched, bad files are errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fla_dispatch import registry, settings
from fla_dispatch.device import hypothetical
from fla_dispatch.kernels.scalar_decay.configs import SegmentConfig, SweepConfig
from fla_dispatch.problem import Problem
from fla_dispatch.requirements import RefusalCode
from fla_dispatch.tuning import advisories
from fla_dispatch.tuning.advisories import Advisory, AdvisoryError, denies, in_range, known, screen

ROOT = Path(__file__).resolve().parent.parent
ROW = {"id": "X-1", "recurrence": "scalar_decay", "variants": ["chunk_torch"], "action": "deny", "reason": "a test"}


def sm90(dtype: str = "bfloat16", **fields: Any) -> Problem:
    base = Problem(
        "scalar_decay", hypothetical("sm90"), (("qkv", dtype),), 128, 128, 1, 64, 4096, 4, 4096, False, False, False, False,
        (("decay", "none"), ("normalize", "false")),
    )  # fmt: skip
    return dataclasses.replace(base, **fields)


def variant(name: str) -> registry.Variant:
    return registry.get_recurrence("scalar_decay").variant(name)


@pytest.fixture
def triton36(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advisories, "package_version", lambda name: (3, 6, 0))


def test_shipped_rows() -> None:
    rows = advisories.read(advisories.SHIPPED)
    assert len({row.id for row in rows}) == len(rows) and rows == known()[: len(rows)]
    for row in rows:
        table = registry.get_recurrence(row.recurrence)
        assert all(table.variant(name) for name in row.variants)
        assert (ROOT / row.link).is_file() or row.link.startswith("https://"), row.link
        file, _, test = row.test.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text()


def test_narrow_tiles_on_four_warps_are_denied(triton36: None) -> None:
    for name, config in (("sweep_triton", SweepConfig(64, 32, 4, 1)), ("chunk_triton", SegmentConfig(256, 64, 16, 4, 3))):
        v = variant(name)
        found = denies(v, sm90(), config)
        assert found is not None and found.code is RefusalCode.ADVISORY and "0003" in found.have
        assert denies(v, sm90("float32"), config) is None and denies(v, sm90(device=hypothetical("sm100")), config) is None
        assert denies(v, sm90(), config._replace(warps=2)) is None and denies(v, sm90(), config._replace(BE=64)) is None


def test_declared_configs_avoid_what_is_denied(triton36: None) -> None:
    """The rows bind what may be added later; what is declared now keeps clear of them by itself."""
    for name in ("sweep_triton", "chunk_triton"):
        for D in (16, 32, 64, 128, 256):
            for dtype in ("bfloat16", "float16"):
                configs = variant(name).configs(sm90(dtype, K=D, V=D))
                assert screen(variant(name), sm90(dtype, K=D, V=D), configs).configs == configs


@pytest.mark.parametrize(
    "version, inside", [((3, 3, 9), False), ((3, 4), True), ((3, 7, 1), True), ((3, 8), False), ((3, 8, 0), False), (None, True)]
)
def test_ranges(version: tuple[int, ...] | None, inside: bool) -> None:
    assert in_range(version, (">=3.4", "<3.8")) is inside


def test_ranges_one_by_one() -> None:
    assert in_range((3, 6, 0), ("==3.6",)) and not in_range((3, 6, 1), ("==3.6",))
    assert in_range((12, 8), ("<=12.8",)) and not in_range((12, 8, 93), ("<=12.8",)) and in_range((12, 9), (">12.8",))


def test_screen_orders_and_denies(monkeypatch: pytest.MonkeyPatch) -> None:
    v, configs = variant("sweep_triton"), tuple(SweepConfig(64, 64, w, s) for w in (4, 8) for s in (1, 2))

    def rows(*found: dict[str, Any]) -> None:
        parsed = tuple(Advisory.parse({**ROW, "variants": ["sweep_triton"], **row}, "test") for row in found)
        monkeypatch.setattr(advisories, "known", lambda: parsed)

    rows({"config": {"warps": {"in": [4]}}})
    found = screen(v, sm90(), configs)
    assert found.configs == configs[2:] and len(found.denied) == 1 and not found.demoted
    rows({"config": {"warps": {"max": 4}}, "action": "demote"})
    found = screen(v, sm90(), configs)
    assert found.configs == configs[2:] + configs[:2] and not found.denied and not found.demoted
    rows({"action": "demote"})
    assert screen(v, sm90(), configs).demoted
    rows({})
    assert screen(v, sm90(), configs).configs == ()
    rows({"when": {"flags": {"decay": ["token"]}, "K": [128]}})
    assert screen(v, sm90(), configs).configs == configs
    assert not screen(v, sm90(flags=(("decay", "token"),)), configs).configs
    rows({"ptxas": ["<1"]}, {"arch": ["gfx942"]}, {"recurrence": "delta"})
    assert screen(v, sm90(), configs).configs == configs


@pytest.mark.parametrize(
    "change, says",
    [
        ({"action": "warn"}, "deny or demote"),
        ({"when": {"T": [64]}}, "equal Keys"),
        ({"when": {"device": ["x"]}}, "equal Keys"),
        ({"triton": [">= 3.4"]}, "version range"),
        ({"config": {"BE": 64}}, "min, max or in"),
        ({"colour": "red"}, "and no others"),
        ({"reason": None, "id": "X"}, None),
    ],
)
def test_bad_rows(change: dict[str, Any], says: str | None) -> None:
    if says is None:
        Advisory.parse({**ROW, **change}, "test")
        return
    with pytest.raises(AdvisoryError, match=says):
        Advisory.parse({**ROW, **change}, "test")


def test_a_users_own_rows(tmp_path: Path) -> None:
    """Read beside the shipped ones; a file that cannot be read stops, since what it denies must not run unnoticed."""
    v, folder = variant("chunk_torch"), tmp_path / "v1"
    folder.mkdir()
    (folder / "advisories.json").write_text(json.dumps([ROW]))
    with settings.override(cache_dir=str(tmp_path)):
        assert not screen(v, sm90(), v.configs(sm90())).configs
    (tmp_path / "w" / "v1").mkdir(parents=True)
    (tmp_path / "w" / "v1" / "advisories.json").write_text("{")
    with settings.override(cache_dir=str(tmp_path / "w")), pytest.raises(AdvisoryError, match=r"advisories\.json"):
        known()
