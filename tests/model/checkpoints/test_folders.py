"""Fingerprints of models on disk, and folders that are created atomically."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from cumo_model.checkpoints.folders import PROBE, PROBES, fingerprint, first_line, new_directory, write_json


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("a")
    # one tensor is smaller than its samples together, one is larger
    large = torch.arange(3 * PROBES * PROBE, dtype=torch.int32).to(torch.uint8)
    save_file({"small": torch.zeros(700), "large": large}, tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(5)}, tmp_path / "old.bin")
    return tmp_path


def spans(path):
    """Name -> first and last byte of each tensor of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    return {
        k: (start + a, start + b)
        for k, v in header.items()
        if "data_offsets" in v
        for a, b in [v["data_offsets"]]
    }


def flip(path, at):
    """The fingerprint with one byte of a file changed."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    found = fingerprint(path.parent)
    raw[at] ^= 1
    path.write_bytes(raw)
    return found


def test_a_fingerprint_sees_a_change_anywhere_that_it_samples(folder):
    known, path = fingerprint(folder), folder / "model.safetensors"
    begin, end = spans(path)["small"]
    for at in range(begin, end, 99):
        assert flip(path, at) != known
    begin, end = spans(path)["large"]
    step = (end - begin - PROBE) / (PROBES - 1)  # samples at equal distances, from the first byte to the last
    for number in range(PROBES):
        first = begin + int(number * step)
        assert flip(path, first) != known and flip(path, first + PROBE - 1) != known
        assert number == PROBES - 1 or flip(path, first + PROBE) == known
    assert flip(path, end - 1) != known
    assert flip(path, 20) != known  # names and shapes
    assert flip(folder / "old.bin", -1) != known and flip(folder / "old.bin", 0) != known


def test_a_fingerprint_is_of_config_and_weights_wherever_they_lie(folder, tmp_path_factory):
    known = fingerprint(folder)
    (folder / "notes.txt").write_text("b")
    os.utime(folder / "model.safetensors", (1, 1))
    assert fingerprint(folder) == known
    moved = folder.rename(tmp_path_factory.mktemp("other") / "moved")
    assert fingerprint(moved) == known
    assert flip(moved / "config.json", 0) != known
    (moved / "old.bin").rename(moved / "new.bin")
    assert fingerprint(moved) != known
    one = fingerprint(moved / "model.safetensors")
    (moved / "model.safetensors").write_bytes(b"x" + (moved / "model.safetensors").read_bytes()[1:])
    assert fingerprint(moved / "model.safetensors") != one  # damaged, but no error: the loader reports it


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_directory(target) as work:
        (work / "a").write_text("1")
        assert not target.exists() and work.parent == target.parent
    assert [path.name for path in target.parent.iterdir()] == ["out"] and (target / "a").read_text() == "1"
    assert target.stat().st_mode & 0o777 == 0o755
    with pytest.raises(ValueError, match="exists already"), new_directory(target):
        raise AssertionError
    assert (target / "a").read_text() == "1"
    (tmp_path / "file").write_text("2")
    with pytest.raises(ValueError, match="exists already"), new_directory(tmp_path / "file"):
        raise AssertionError
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty") as work:
        (work / "b").write_text("3")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["b"]
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "half") as work:
        (work / "c").write_text("4")
        raise KeyboardInterrupt
    assert not [path for path in tmp_path.iterdir() if "half" in path.name]
    (tmp_path / ".again-12345678").mkdir()
    with pytest.warns(UserWarning, match="again-12345678 is left over"), new_directory(tmp_path / "again"):
        pass


def test_json_files_and_first_lines(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert first_line(ValueError("\none\ntwo")) == "one" and first_line(ValueError()) == "ValueError()"
