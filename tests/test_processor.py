from __future__ import annotations

from pathlib import Path

import pytest

from rewriter import processor

TOLD = "\n".join(
    f"processor\t: {core}\nmodel name\t: A\nflags\t\t: x {flag}\n"
    for core, flag in ((0, "y"), (1, "z"))
)


def test_values_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: TOLD)
    found = processor.values("processor", "flags", "cache size")
    assert found == {"processor": ("0", "1"), "flags": ("x y", "x z"), "cache size": ()}
    assert processor.name() == "A"


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert processor.values("flags") == {"flags": ()} and processor.name()
