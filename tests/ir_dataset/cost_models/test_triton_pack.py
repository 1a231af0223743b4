"""Packs of compiled configurations: what is in them, that they resume, and what fails."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes for Linux alone")
for needed in ("pebble", "pyarrow", "msgspec"):
    pytest.importorskip(needed)

# ruff: noqa: E402
from ir_dataset.cost_models import triton_driver, triton_points
from ir_dataset.cost_models.triton_code import argument_types
from ir_dataset.cost_models.triton_driver import Driver, parameters
from ir_dataset.cost_models.triton_families import FAMILIES
from ir_dataset.cost_models.triton_pack import Pack, Point, compile_pack, planned, text_key
from ir_dataset.cost_models.triton_points import LEVEL0, PLAIN
from rewriter.errors import ArtifactError, ConfigError, InputError

TARGET = "cuda:sm_90"
SOME = [FAMILIES[name] for name in ("gemv_row", "gathered_down", "gemv_rows")]


class Shown:
    """Counts."""

    def __init__(self) -> None:
        self.waiting, self.ran, self.failed = 0, 0, 0

    def stage(self, name: str, total: int, done: int) -> None:
        self.waiting = total - done

    def advance(self, label: str, failed: bool) -> None:
        self.ran, self.failed = self.ran + 1, self.failed + failed


@pytest.fixture(scope="module")
def planned_points() -> tuple[list[Point], dict[str, tuple[str, str]]]:
    points, texts = [], {}
    for point, told in planned(TARGET, SOME, limit=3):
        points.append(point)
        texts |= {key: (point.name, text) for key, text in told.items()}
    return points, texts


@pytest.fixture(scope="module")
def pack(
    planned_points: tuple[list[Point], dict[str, tuple[str, str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Pack:
    points, texts = planned_points
    found, shown = Pack(tmp_path_factory.mktemp("pack"), TARGET), Shown()
    broken = texts[points[0].keys[0]][1].replace("live_n = n < out_features", "live_n = nothing")
    compile_pack(found, {**texts, text_key(broken, TARGET): ("broken", broken)}, 1, shown)
    assert (shown.waiting, shown.ran, shown.failed) == (len(texts) + 1, len(texts) + 1, 1)
    (task,) = found.store.failures()
    assert task.label == "broken" and "nothing is not defined" in task.error
    return found


def test_a_pack_has_every_launch_and_goes_on(
    pack: Pack, planned_points: tuple[list[Point], dict[str, tuple[str, str]]]
) -> None:
    points, texts = planned_points
    assert [len(p.launches) for p in points] == [1, 2, 1]  # the parts' sums, too
    for key in texts:
        found = pack.binary(key)
        assert found is not None and found[0].startswith(b"\x7fELF")
    shown = Shown()
    compile_pack(pack, texts, 1, shown)
    assert (shown.waiting, shown.ran) == (0, 0)


def test_rows_have_features_of_the_compiled_code(
    pack: Pack, planned_points: tuple[list[Point], dict[str, tuple[str, str]]]
) -> None:
    points, _ = planned_points
    triton_points.write(triton_points.table(pack, points), pack)
    table, digest = triton_points.read(pack.store.root / triton_points.FILE)
    assert digest == triton_points.digest(pack.store.root)
    assert triton_points.target_of(pack.store.root) == TARGET
    rows = table.to_pylist()
    assert [row["family"] for row in rows] == [family.name for family in SOME]
    for row in rows:
        assert row["reason"] == "" and row["unread"] == "" and row["default"]
        assert 0 < row["registers"] <= 255 and row["spilled_bytes"] == 0
        assert row["sass_total"] > row["loop_total"] > 0 and row["ttgir_scf_for"] >= 1
        assert row["llir_parameters"] > 5 and row["seconds"] > 0
        assert all(math.isfinite(row[name]) for name in LEVEL0)
    assert rows[2]["sass_matrix"] > 0 and rows[0]["sass_matrix"] == 0
    assert "gemv_row, 1, 1, 0, 0, 0" in triton_points.told(table)


def test_what_did_not_compile_is_a_row_with_the_reason(
    tmp_path: Path, planned_points: tuple[list[Point], dict[str, tuple[str, str]]]
) -> None:
    points, _ = planned_points
    other = Pack(tmp_path, TARGET)
    other.record(points[0].keys[0], "label", {"reason": "it is wrong"})
    rows = triton_points.table(other, points).to_pylist()
    assert [row["reason"] for row in rows] == ["it is wrong", *["not compiled yet"] * 2]
    assert all(math.isnan(row["registers"]) and math.isnan(row["llir_ret"]) for row in rows)
    assert all(math.isfinite(row[name]) for row in rows for name in PLAIN[:9])


def test_only_nvidias_targets() -> None:
    for target in ("hip:gfx942", "cuda:sm_1"):
        with pytest.raises(ConfigError, match="target"):
            next(planned(target))


def test_points_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        triton_points.read(tmp_path / "missing.parquet")


def test_parameters_are_what_the_entry_takes(
    pack: Pack, planned_points: tuple[list[Point], dict[str, tuple[str, str]]]
) -> None:
    """Numbers that are 1 are in the code; the two scratch pointers come last."""
    points, _ = planned_points
    launch = points[0].launches[0]
    _, facts = pack.binary(points[0].keys[0]) or (b"", {})
    tensors = [torch.empty(16) if hasattr(a, "data_ptr") else a for a in launch.arguments]
    types = argument_types(launch.text, launch.arguments)
    found = parameters(facts, types, tensors)
    numbers = [a for a in tensors if not hasattr(a, "data_ptr")]
    wanted = [a.data_ptr() for a in tensors if hasattr(a, "data_ptr")]
    wanted += [number for number in numbers if number != 1]
    assert [one.value for one in found] == [*wanted, None, None]
    kinds = {type(one) for one in found}
    assert kinds == {ctypes.c_void_p, ctypes.c_int32}
    with pytest.raises(InputError, match="in_features: 4097 where a multiple of 16"):
        wrong = [4097 if isinstance(a, int) and a == 4096 else a for a in tensors]
        parameters(facts, types, wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_nothing_is_launched(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(triton_driver.ctypes, "CDLL", missing)
    with pytest.raises(ConfigError, match="a GPU with its CUDA driver"):
        Driver(pack)
