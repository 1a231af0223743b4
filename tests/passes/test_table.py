"""What every pass in the table keeps to."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from passes import DEFAULT, PASSES
from rewriter.dialect import OPS
from rewriter.engine.rewrite_pass import Fidelity, RewritePass
from rewriter.engine.site import ANCHORS
from rewriter.engine.spec_text import parse_spec

ROOT = Path(__file__).parents[2]
SECTIONS = (
    "What it does:",
    "Applies when:",
    "Does not:",
    "Shapes:",
    "Numerics:",
    "Cost:",
    "Parameters:",
    "Raises:",
    "Source:",
)
every_pass = pytest.mark.parametrize("cls", PASSES.values(), ids=PASSES.keys())


@every_pass
def test_names_agree(cls: type[RewritePass]) -> None:
    snake = cls.name.replace("-", "_")
    assert PASSES[cls.name] is cls
    assert cls.__module__ == f"passes.{snake}"
    assert cls.__name__.lower() == cls.name.replace("-", "") and cls.__name__[0].isupper()
    assert (ROOT / "tests" / "passes" / f"test_{snake}.py").is_file()


@every_pass
def test_is_a_frozen_dataclass_of_knobs(cls: type[RewritePass]) -> None:
    parameters = cls.__dataclass_params__  # pyright: ignore[reportAttributeAccessIssue]
    assert parameters.frozen and all(field.kw_only for field in dataclasses.fields(cls))
    assert cls.anchor == "program" or cls.anchor in OPS or cls.anchor in ANCHORS
    assert cls.conflicts <= set(PASSES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), "layers", (1,))  # noqa: B010


@every_pass
def test_docstring_has_the_sections_in_order(cls: type[RewritePass]) -> None:
    text = inspect.getdoc(cls) or ""
    places = [text.find(section) for section in SECTIONS]
    assert -1 not in places and places == sorted(places)
    assert cls.source in text
    described = text[places[SECTIONS.index("Parameters:")] : places[SECTIONS.index("Raises:")]]
    for field in dataclasses.fields(cls):
        assert f"{field.name}:" in described


@every_pass
def test_spec_text_round_trip(cls: type[RewritePass]) -> None:
    default = cls()
    assert str(default) == cls.name
    for changed in (default, dataclasses.replace(default, layers=(0, 2))):
        assert parse_spec(str(changed), PASSES) == changed


@every_pass
def test_approximations_can_be_exact(cls: type[RewritePass]) -> None:
    overridden = cls.exact_setting is not RewritePass.exact_setting
    assert overridden == (cls.fidelity is Fidelity.APPROXIMATE)


@every_pass
def test_readme_lists_it(cls: type[RewritePass]) -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("no README.md yet")
    rows = [
        line for line in readme.read_text().splitlines() if line.startswith(f"| `{cls.name}` |")
    ]
    assert len(rows) == 1 and cls.fidelity.value in rows[0]


def test_the_default_changes_no_function() -> None:
    for spec in DEFAULT:
        assert parse_spec(spec, PASSES).fidelity is not Fidelity.APPROXIMATE


@pytest.mark.parametrize("first", ["passes", "rewriter"])
def test_either_package_can_be_imported_first(first: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {first}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
