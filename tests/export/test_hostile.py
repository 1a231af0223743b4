"""Saved programs by a stranger: nothing of a file is run, and what is wrong is named."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from torch import nn

from rewriter import ArtifactError, load, optimize
from tests.tiny import TinyMLP


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hostile") / "saved"
    optimize(TinyMLP(), (torch.randn(2, 5, 16),)).save(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(directory, change, name="program.json"):
    """Change a file and make the manifest agree, as somebody with intent would."""
    path = directory / name
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest))


def nodes(stored, op):
    return [node for node in stored["graph"] if node["op"] == op]


CALLS = [
    "os.system",
    "builtins.eval",
    "operator.attrgetter",
    "aten.no_such_operator.default",
    "aten.add.NoSuchOverload",
    "aten.from_file.default",
    "aten.__class__.default",
    "rewriter.no_such.default",
    "inductor.accumulate_grad_.default",
    "",
]


@pytest.mark.parametrize("target", CALLS)
def test_unknown_operators_are_refused(copy, target):
    edit(copy, lambda stored: nodes(stored, "call_function")[0].update(target=target))
    with pytest.raises(ArtifactError, match=r"program\.json.*(unknown operator|damaged)"):
        load(copy)


def _inject_placeholder(stored):
    node = nodes(stored, "placeholder")[0]
    node["target"] = "x=__import__('os').abort()"


def _inject_attribute(stored):
    node = nodes(stored, "get_attr")[0]
    name = 'a"), __import__("os").abort(), ("'
    stored["weights"][name] = stored["weights"].pop(node["target"])
    node["target"] = name


def _inject_keyword(stored):
    nodes(stored, "call_function")[0]["kwargs"] = {"a=__import__('os').abort(), b": 1}


def _inject_name(stored):
    nodes(stored, "call_function")[0]["name"] = "x = __import__('os').abort()"


def _reach_outside(stored):
    nodes(stored, "get_attr")[0]["target"] = "forward.__globals__"


def _call_module(stored):
    nodes(stored, "call_function")[0]["op"] = "call_method"


INJECTIONS = [
    _inject_placeholder,
    _inject_attribute,
    _inject_keyword,
    _inject_name,
    _reach_outside,
    _call_module,
]


@pytest.mark.parametrize("inject", INJECTIONS, ids=lambda f: f.__name__)
def test_text_that_would_become_code_is_refused(copy, inject):
    edit(copy, inject)
    with pytest.raises(ArtifactError, match=r"program\.json"):
        load(copy)


def _drop_graph(stored):
    del stored["graph"]


def _unknown_node(stored):
    nodes(stored, "call_function")[0]["args"] = [{"node": "nowhere"}]


def _unknown_value(stored):
    nodes(stored, "call_function")[0]["args"] = [{"pickle": "x"}]


def _two_keys(stored):
    nodes(stored, "call_function")[0]["args"] = [{"node": "x", "tuple": []}]


def _graph_of_text(stored):
    stored["graph"] = ["x"]


def _bad_dtype(stored):
    stored["signature"]["inputs"][0]["dtype"] = "load"


def _no_tensor(stored):
    for item in stored["weights"].values():
        item["tensor"] = "nowhere"


def _bad_backend(stored):
    stored["backend"] = "cuda"


def _bad_structure(stored):
    stored["signature"]["out_spec"] = {"type": "os.system", "context": "[]"}


def _undeclared_input(stored):
    stored["signature"]["inputs"][0]["name"] = "other"


DAMAGES = [
    _drop_graph,
    _unknown_node,
    _unknown_value,
    _two_keys,
    _graph_of_text,
    _bad_dtype,
    _no_tensor,
    _bad_backend,
    _bad_structure,
    _undeclared_input,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_under_a_right_hash_is_named(copy, damage):
    edit(copy, damage)
    with pytest.raises(ArtifactError, match=r"program\.json"):
        load(copy)


def test_a_report_that_was_tampered_with_is_named(copy):
    edit(copy, lambda stored: stored.update(schema=7), "report.json")
    with pytest.raises(ArtifactError, match=r"report\.json.*schema 7"):
        load(copy)


@pytest.mark.parametrize(
    "text", ["[]", "null", "{", "{}", '{"format": 1}', '{"format": 1, "files": 3}']
)
def test_a_broken_manifest_is_named(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        load(copy)


def test_a_link_out_of_the_directory_is_refused(copy):
    (copy / "weights.safetensors").rename(copy.parent / "weights.safetensors")
    (copy / "weights.safetensors").symlink_to(copy.parent / "weights.safetensors")
    with pytest.raises(ArtifactError, match="outside"):
        load(copy)


def test_a_node_that_cannot_be_stored_is_said_when_saving(tmp_path):
    class Complex(nn.Module):
        def forward(self, x):
            return x + 1

    optimized = optimize(Complex(), (torch.randn(2, 3),))
    call = next(node for node in optimized.program.graph.nodes if node.op == "call_function")
    call.target = print
    with pytest.raises(ArtifactError, match="print"):
        optimized.save(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
