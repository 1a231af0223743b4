"""The CPU families' IR features: one row for each body, and the same again where clang is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llvmlite")
pytest.importorskip("pyarrow")

from ir_dataset.cost_models import cpu_ir
from ir_dataset.cost_models.cpu_families import FAMILIES
from ir_dataset.cost_models.cpu_loops import CONFIGURATIONS, body_name
from ir_dataset.features import FEATURES
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ArtifactError


def test_every_body_is_there() -> None:
    bodies = {body_name(c) for c in CONFIGURATIONS}
    assert set(cpu_ir.load()) == {(family, body) for family in FAMILIES for body in bodies}


def test_clang_gives_what_is_kept() -> None:
    compiler = Toolchain.find().c_compiler()
    if compiler is None or compiler.kind != "clang":
        pytest.skip("no clang of the pinned LLVM: apt-get install clang-22")
    kept, wanted = cpu_ir.load(), [at for at, name in enumerate(FEATURES) if name[:3] == "oz_"]
    found = dict(cpu_ir.ir_rows({"gemv": FAMILIES["gemv"]}))
    assert len(found) == 36
    for (_, body), row in found.items():
        assert np.array_equal(row[wanted], kept["gemv", body][wanted])
        assert not np.array_equal(row[wanted], kept["stencil", body][wanted])


def test_other_features_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"family": ["gemv"], "body": ["b"]}), tmp_path / "old.parquet")
    with pytest.raises(ArtifactError, match="other features"):
        cpu_ir.load(tmp_path / "old.parquet")
    with pytest.raises(ArtifactError, match="cannot be read"):
        cpu_ir.load(tmp_path / "none.parquet")
