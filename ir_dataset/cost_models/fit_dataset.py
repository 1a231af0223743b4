"""Size models from a packed dataset: learned on its training set, judged on what they never saw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ir_dataset.cost_models.settings import SHIPPED_SIZE
from ir_dataset.cost_models.size import KINDS, SizeModel, metrics
from ir_dataset.cost_models.size_data import SizeData, read

__all__ = ["HELD_OUT", "fit_dataset", "judge"]

LEAST_ROWS = 50
"""Functions with a size below which nothing is learned."""
HELD_OUT = ("test", "ood")
"""Projects, and the language, that training does not see."""


def fit_dataset(directory: Path) -> dict[str, Any]:
    """Learn a model for each level that has labels; write `models/size_LEVEL.json.gz`.

    Args:
        directory: of a dataset, with `functions.parquet`.

    Returns:
        by level: rows and metrics on the held-out sets, or why there is no model.
    """
    data = read(directory)
    found: dict[str, Any] = {"training_data": data.digest}
    for kind in KINDS:
        path = directory / "models" / f"size_{kind.lower()}.json.gz"
        found[kind] = _fit(data, kind, path)
    return found


def _fit(data: SizeData, kind: str, path: Path) -> dict[str, Any]:
    if kind not in data.sizes:
        return {"reason": "the toolchain that made the labels has no such level"}
    train = data.rows(kind, "train")
    if len(train.sizes) < LEAST_ROWS:
        return {
            "reason": f"{len(train.sizes)} labelled functions to learn from, below {LEAST_ROWS}"
        }
    settings = replace(SHIPPED_SIZE, kind=kind)
    model = SizeModel.fit(train, settings, training_data=data.digest)
    judged = {"train_rows": len(train.sizes), **judge(model, data)}
    path.parent.mkdir(exist_ok=True)
    replace(model, metrics=judged).save(path)
    return judged


def judge(model: SizeModel, data: SizeData) -> dict[str, dict[str, float]]:
    """Metrics by held-out set, of those that have two functions or more with a size of the model's kind."""
    found = {}
    for split in HELD_OUT:
        held = data.rows(model.settings.kind, split)
        if len(held.sizes) > 1:
            answer = model.predict(held.features)
            inside = (held.sizes >= answer.low) & (held.sizes <= answer.high)
            found[split] = {
                **metrics(answer.size, held.sizes),
                "inside_interval": float(inside.mean()),
                "unsure_share": float(answer.unsure.mean()),
            }
    return found
