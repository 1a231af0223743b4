"""Names in generated text are names in both of its languages."""

from __future__ import annotations

import keyword

import pytest

from codegen.kernel import safe_name


@pytest.mark.parametrize("word", [*keyword.kwlist, "match", "int", "void", "template", "nullptr"])
def test_keywords_get_another_name(word: str) -> None:
    assert safe_name(word) == f"v_{word}"


def test_other_names_stay() -> None:
    assert safe_name("model.layers.0/weight") == "model_layers_0_weight"
    assert safe_name("classes") == "classes"
    assert safe_name("9 lives") == "v_9_lives"
