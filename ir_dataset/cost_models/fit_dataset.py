"""A size model from a packed dataset: learned on its training set, judged on what it never saw."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ir_dataset.cost_models.settings import SHIPPED_SIZE
from ir_dataset.cost_models.size import KINDS, SizeModel, SizeRows, metrics
from ir_dataset.features import FEATURES

__all__ = ["fit_dataset"]

LEAST_ROWS = 50
"""Functions with a size below which nothing is learned."""


def fit_dataset(directory: Path) -> dict[str, Any]:
    """Learn a model for each level that has labels; write `models/size_LEVEL.json.gz`.

    Args:
        directory: of a dataset, with `functions.parquet`.

    Returns:
        by level: rows, metrics on the `test` and the held-out language's set, or why there is no model.
    """
    import numpy as np
    import pyarrow.parquet as pq

    path = directory / "functions.parquet"
    wanted = [f"size_{kind.lower()}" for kind in KINDS]
    there = set(pq.read_schema(path).names)
    columns = [name for name in wanted if name in there]
    numbers = [f"feature_{name}" for name in FEATURES]
    table = pq.read_table(path, columns=["project", "split", "duplicate", *columns, *numbers])
    features = np.stack([table[name].to_numpy() for name in numbers], 1)
    split, projects = (np.array(table[name].to_pylist()) for name in ("split", "project"))
    unique = ~table["duplicate"].to_numpy()
    seen = hashlib.sha256(path.read_bytes()).hexdigest()
    found: dict[str, Any] = {"training_data": seen}
    for kind, name in zip(KINDS, wanted, strict=True):
        if name not in columns:
            found[kind] = {"reason": "the toolchain that made the labels has no such level"}
            continue
        sizes = table[name].to_numpy().astype(float)
        usable = unique & (np.nan_to_num(sizes) > 0) & ~np.isnan(features[:, 0])

        def rows(of: str, sizes: Any = sizes, usable: Any = usable) -> SizeRows:
            at = np.flatnonzero(usable & (split == of))
            return SizeRows(features[at], FEATURES, sizes[at], projects[at])

        found[kind] = _fit(kind, rows, directory / "models" / f"{name}.json.gz", seen)
    return found


def _fit(kind: str, rows: Any, path: Path, seen: str) -> dict[str, Any]:
    train = rows("train")
    if len(train.sizes) < LEAST_ROWS:
        return {
            "reason": f"{len(train.sizes)} labelled functions to learn from, below {LEAST_ROWS}"
        }
    model = SizeModel.fit(train, replace(SHIPPED_SIZE, kind=kind), training_data=seen)
    judged: dict[str, Any] = {"train_rows": len(train.sizes)}
    for of in ("test", "ood"):
        held = rows(of)
        if len(held.sizes) > 1:
            judged[of] = metrics(model.predict(held.features).size, held.sizes)
    path.parent.mkdir(exist_ok=True)
    replace(model, metrics=judged).save(path)
    return judged
