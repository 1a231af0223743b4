import pytest

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")

from ir_dataset.config import load_config, parse_config
from rewriter.errors import ConfigError

GOOD = """
name = "one"

[build]
wall_s = 60

[[source]]
kind = "local-tree"
path = "sources"

[[source]]
kind = "debian"
packages = ["zlib"]
"""


def test_paths_of_sources_are_taken_from_the_file(tmp_path):
    (tmp_path / "corpus.toml").write_text(GOOD)
    config, sources = load_config(tmp_path / "corpus.toml")
    assert config.build.wall_s == 60
    assert sources[0].options == {"path": str(tmp_path / "sources")}
    assert sources[1].options == {"packages": ["zlib"]}


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ('name = "one"', 'name = "One two"', "corpus.toml:2: name"),
        ("wall_s = 60", "wall_s = -1", "corpus.toml:5: build.wall_s"),
        ("wall_s = 60", "wall = 60", "corpus.toml:5: build.wall"),
        ("wall_s = 60", 'wall_s = "long"', "corpus.toml:5: build.wall_s"),
        ('kind = "debian"', 'kind = "debean"', r"corpus.toml:12: source\[1\].kind"),
        ("[build]", "[bild]", "corpus.toml:4: bild"),
    ],
)
def test_errors_name_line_and_field(before, after, place):
    with pytest.raises(ConfigError, match=place):
        parse_config(GOOD.replace(before, after), name="corpus.toml")


def test_what_is_no_toml_names_the_line():
    with pytest.raises(ConfigError, match="line 3"):
        parse_config(GOOD.replace('"one"\n', '"one"\n= 5'))


def test_unknown_sources_are_told_what_there_is():
    with pytest.raises(ConfigError, match="local-tree"):
        parse_config(GOOD.replace('"debian"', '"debean"'))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"corpus\.toml"):
        load_config(tmp_path / "corpus.toml")
