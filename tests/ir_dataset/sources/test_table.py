"""The table of sources: each line is a plug-in that answers what every plug-in has to."""

import pytest

from ir_dataset.sources import SOURCES, find_source
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError


@pytest.mark.parametrize("kind", sorted(SOURCES))
def test_every_line_is_a_plug_in(kind):
    source = find_source(kind)
    assert source.name == kind and source.version and source.languages
    for method in (source.missing, source.discover, source.fetch, source.build):
        assert method.__doc__ or kind
    reason = source.missing(Toolchain(()))
    assert reason is None or (reason.strip() and "\n" not in reason)


@pytest.mark.parametrize("kind", sorted(set(SOURCES) - {"own-kernels"}))
def test_unknown_options_are_errors(kind):
    with pytest.raises(ConfigError):
        find_source(kind).discover({"no-such-option": 1})


def test_unknown_kinds_list_those_there_are():
    with pytest.raises(ConfigError, match=r"debian, .*local-tree"):
        find_source("nothing")


def test_lines_are_sorted():
    assert list(SOURCES) == sorted(SOURCES)
