"""A .pt2 by a stranger, or damaged, or half written: nothing is loaded, and what is wrong is named."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

from rewriter import ArtifactError, load
from rewriter.export.pt2_archive import METADATA, ROOT, Pt2Writer, open_pt2, writing
from rewriter.export.pt2_cpu import cpu_kind, missing_features
from rewriter.export.pt2_weights import layout, map_weights, raw_bytes
from tests.conftest import ROOT as CHECKOUT
from tests.export.pt2_files import members, rewritten, zipped

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture
def archive(tmp_path):
    """Sealed, with a member of each kind; its code is none."""
    path = tmp_path / "model.pt2"
    with path.open("wb") as file:
        writer = Pt2Writer(file)
        writer.add("weights.bin", raw_bytes(TENSORS))
        writer.add("program.json", b"{}")
        writer.add("native/step0.so", b"\x7fELF no code")
        writer.add("data/aotinductor/decode/decode.wrapper.so", b"\x7fELF no code")
        writer.add("archive_format", b"pt2")
        writer.add(".data/version", b"6\n")
        writer.seal({"weights": layout(TENSORS), "note": "x"})
    return path


def full(stored):
    return [("model/" + name, data) for name, data in stored]


def test_what_was_written_is_read(archive):
    file = open_pt2(archive)
    assert file.metadata["note"] == "x"
    assert file.read("archive_format") == b"pt2"
    assert file.places["weights.bin"][0] == 4096
    for name, tensor in map_weights(file).items():
        assert torch.equal(tensor, TENSORS[name]), name
        assert tensor.dtype == TENSORS[name].dtype and tensor.shape == TENSORS[name].shape


def test_a_mapped_weight_can_be_written_without_the_file(archive):
    before = archive.read_bytes()
    map_weights(open_pt2(archive))["a"].fill_(7)
    assert archive.read_bytes() == before


def test_torch_reads_the_archive(archive):
    reader = torch._C.PyTorchFileReader(str(archive))
    assert reader.get_record("archive_format") == b"pt2"


@pytest.mark.parametrize("name", ["weights.bin", "program.json", "native/step0.so", METADATA])
def test_one_changed_byte_is_found(archive, name):
    start, size = open_pt2(archive).places[name]
    data = bytearray(archive.read_bytes())
    data[start + size // 2] ^= 1
    archive.write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged"):
        load(archive)


def test_the_hash_of_the_weights_alone_can_be_left_out(archive):
    data = bytearray(archive.read_bytes())
    data[4096] ^= 1
    archive.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"weights\.bin is not as it was written"):
        open_pt2(archive)
    assert open_pt2(archive, check_weights=False).metadata["note"] == "x"


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(archive, keep):
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ArtifactError):
        open_pt2(archive)


@pytest.mark.parametrize(
    "name",
    [
        "model/data/constants/custom_objs.pkl",
        "model/data/weights/weight_0",
        "model/data/weights/model.pt",
        "model/data/models/model.json",
        "model/data/sample_inputs/model.pt",
        "model/data/extra/x",
        "model/data/aotinductor/decode/custom_objs_config.json",
        "model/data/aotinductor/../../../x.so",
        "model/../x",
        "/etc/x",
        "other/archive_format",
        "model/native/step0.so/x",
        "model/native\\step1.so",
        "model/",
    ],
)
def test_members_that_do_not_belong_there_are_refused(archive, tmp_path, name):
    target = zipped(tmp_path / "x.pt2", [*full(members(archive)), (name, b"x")])
    with pytest.raises(ArtifactError, match="which does not belong there"):
        open_pt2(target)


def test_a_member_twice_is_refused(archive, tmp_path):
    stored = full(members(archive))
    with pytest.warns(UserWarning, match="Duplicate name"):
        target = zipped(tmp_path / "x.pt2", [*stored, stored[1]])
    with pytest.raises(ArtifactError, match="twice"):
        open_pt2(target)


def test_a_member_more_or_less_is_refused(archive, tmp_path):
    stored = full(members(archive))
    more = [*stored, ("model/byteorder", b"little")]
    for i, changed in enumerate((more, [item for item in stored if "program" not in item[0]])):
        target = zipped(tmp_path / f"{i}.pt2", changed)
        with pytest.raises(ArtifactError, match="other members than"):
            open_pt2(target)


def test_compressed_members_are_refused(archive, tmp_path):
    stored = full(members(archive))
    target = zipped(tmp_path / "x.pt2", stored, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ArtifactError, match="which is no stored file"):
        open_pt2(target)


def test_links_are_refused(archive, tmp_path):
    target = tmp_path / "x.pt2"
    with zipfile.ZipFile(target, "w") as made:
        for name, data in full(members(archive)):
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            made.writestr(info, data)
    with pytest.raises(ArtifactError, match="which is no stored file"):
        open_pt2(target)


def test_bytes_outside_of_members_are_refused(archive):
    archive.write_bytes(b"#!/bin/sh\n" + archive.read_bytes())
    with pytest.raises(ArtifactError):
        open_pt2(archive)


def test_local_and_central_names_have_to_agree(archive):
    data = archive.read_bytes()
    at = data.index(b"model/program.json")
    archive.write_bytes(data[:at] + b"model/qrogram.json" + data[at + 18 :])
    with pytest.raises(ArtifactError, match="at its place"):
        open_pt2(archive)


def test_other_formats_and_files_are_refused(archive, tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        open_pt2(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("no zip")
    with pytest.raises(ArtifactError, match="is damaged"):
        open_pt2(tmp_path / "text.pt2")
    plain = zipped(tmp_path / "plain.pt2", [("model/archive_format", b"pt2")])
    with pytest.raises(ArtifactError, match=r"has no model/rewriter\.json"):
        open_pt2(plain)
    text = dict(members(archive))[METADATA].replace(b'"format": 1', b'"format": 2')
    other = [(n, text if n == ROOT + METADATA else d) for n, d in full(members(archive))]
    with pytest.raises(ArtifactError, match="has format 2; allowed: 1"):
        open_pt2(zipped(tmp_path / "other.pt2", other))


@pytest.mark.parametrize(
    "change",
    [{"offset": 1}, {"offset": -64}, {"offset": 1 << 40}, {"dims": [1 << 30]}, {"dims": [-1]},
     {"dtype": "load"}, {"dtype": "Tensor"}],
)  # fmt: skip
def test_weights_stay_inside_of_their_member(archive, tmp_path, change):
    placed = layout(TENSORS)
    placed["a"] |= change
    file = open_pt2(rewritten(archive, tmp_path / "x.pt2", metadata={"weights": placed}))
    with pytest.raises(ArtifactError, match="tensor 'a'"):
        map_weights(file)


def test_a_program_of_another_shape_is_damage(archive):
    with pytest.raises(ArtifactError, match="is damaged"):
        load(archive)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # a file that cannot grow further
    try:
        with (
            pytest.raises(ArtifactError, match=r"model\.pt2 cannot be written: File too large"),
            writing(path) as temporary,
            temporary.open("wb") as file,
            Pt2Writer(file) as writer,
        ):
            writer.add("weights.bin", raw_bytes({"a": torch.zeros(1 << 16)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path / "model.pt2") as temporary:
        temporary.write_bytes(b"x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_under_the_name(tmp_path):
    path = tmp_path / "model.pt2"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from rewriter.export.pt2_archive import writing\n"
        "with writing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'x' * 1000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    run = subprocess.run([sys.executable, "-c", code, str(path)], env=env)
    assert run.returncode == -signal.SIGKILL
    assert not path.exists()


def test_a_directory_is_not_replaced(tmp_path):
    with pytest.raises(ArtifactError, match="is a directory"), writing(tmp_path):
        pass


def test_what_a_processor_lacks_is_named():
    kind = cpu_kind()
    assert missing_features(kind) == []
    assert missing_features({**kind, "instructions": ["avx9000"]}) == ["avx9000"]
    assert missing_features({**kind, "machine": "vax"}) == ["vax"]
    assert missing_features({"machine": kind["machine"]}) == ["unknown instructions"]
