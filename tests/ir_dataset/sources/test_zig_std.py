"""Files of Zig's library become modules that hold little besides their own functions."""

import re

import pytest

from ir_dataset.reader import read_module
from ir_dataset.sources import find_source
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError

SOURCE = find_source("zig-std")
TOOLS = Toolchain.find()

pytestmark = pytest.mark.skipif(
    SOURCE.missing(TOOLS) is not None, reason=SOURCE.missing(TOOLS) or "Zig is there"
)


@pytest.mark.parametrize("options", [{"files": ["nowhere.zig"]}, {"mode": "Fast"}, {"limit": "1"}])
def test_options_that_are_not_allowed_name_themselves(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SOURCE.discover(options)


def test_a_file_is_a_module_of_unoptimised_code(tmp_path):
    store = Store(tmp_path)
    (package,) = SOURCE.discover({"files": ["ascii.zig"]})
    with store.workspace("fetch") as workspace:
        fetched = SOURCE.fetch(package, store, workspace)
    assert fetched.license.expression == "MIT" and fetched.license.files
    with store.workspace("build") as workspace:
        built = SOURCE.build(fetched, store, workspace, toolchain=TOOLS, limits=BuildLimits())
    (unit,) = built.units
    assert (unit.source_path, unit.language) == ("std/ascii.zig", "zig")
    assert unit.arguments[-6:] == (
        *("--test-filter", "@all:ascii.zig:", "--test-filter", "ascii.test"),
        *("--test-filter", "ascii.decltest"),
    )
    data = store.get(unit.module)
    assert str(tmp_path).encode() not in data and b"site-packages" not in data
    reading = read_module(data)
    if not reading.reader:
        pytest.skip(reading.reason)
    defined = re.findall(r'^define .*?@"?([\w.]+)', reading.text, re.MULTILINE)
    assert any(name.startswith("ascii.") for name in defined)
    assert len(defined) < 1200
    assert " alloca " in reading.text
