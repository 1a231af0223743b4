"""Saved programs: equal after loading, refused when damaged, written all or nothing."""

import json
import shutil

import pytest
import torch
from torch import nn

from rewriter import ArtifactError, load, optimize
from tests.small_lms import small_lm

STREAMING = "streaming-llm{num_sink_tokens=2,recent_window=6}"


@pytest.fixture(scope="module")
def optimized():
    return optimize(small_lm(), passes=[STREAMING, "default"])


@pytest.fixture(scope="module")
def saved(optimized, tmp_path_factory):
    directory = tmp_path_factory.mktemp("artifact") / "saved"
    optimized.save(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_loaded_program_computes_the_same(optimized, saved):
    loaded = load(saved)
    ids = torch.randint(3, 128, (2, 20))
    assert torch.equal(loaded(ids).logits, optimized(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0}
    expected = optimized.generate(ids, **arguments)
    assert torch.equal(loaded.generate(ids, **arguments), expected)
    assert str(loaded.report) == str(optimized.report)
    assert loaded.report.to_json() == optimized.report.to_json()


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    load(saved).save(tmp_path / "again")
    for name in ("program.json", "weights.safetensors", "report.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_plain_module_is_saved_with_its_structure(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return {"y": self.inner(x), "z": (x, x + 1)}

    net = Net()
    optimize(net, (torch.randn(2, 4),)).save(tmp_path / "net")
    x = torch.randn(5, 4)
    out = load(tmp_path / "net")(x)
    torch.testing.assert_close(out["y"], net(x)["y"])
    assert isinstance(out["z"], tuple)


def test_nothing_is_pickled(saved):
    names = {path.suffix for path in saved.iterdir()}
    assert names <= {".json", ".safetensors"}


@pytest.mark.parametrize("name", ["program.json", "weights.safetensors", "report.json"])
def test_flipped_truncated_and_missing_files_are_refused(copy, name):
    path = copy / name
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(ArtifactError, match=name):
        load(copy)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=name):
        load(copy)
    path.unlink()
    with pytest.raises(ArtifactError, match=name):
        load(copy)


def _manifest(copy, edit):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_another_format_and_foreign_paths_are_refused(copy):
    _manifest(copy, lambda m: m.update(format=99))
    with pytest.raises(ArtifactError, match="format"):
        load(copy)
    _manifest(copy, lambda m: m.update(format=1))
    _manifest(copy, lambda m: m["files"].update({"../outside": "0"}))
    with pytest.raises(ArtifactError, match="outside"):
        load(copy)


def test_missing_directories_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no saved program"):
        load(tmp_path)


def test_a_directory_with_other_files_is_left_alone(optimized, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="other files"):
        optimized.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_save_leaves_the_old_program_and_no_litter(optimized, copy, monkeypatch):
    from rewriter.export import artifact

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(ArtifactError, match="No space left"):
        optimized.save(copy)
    assert load(copy) is not None
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_replacing_a_saved_program_works(optimized, copy):
    optimized.save(copy)
    assert load(copy) is not None
