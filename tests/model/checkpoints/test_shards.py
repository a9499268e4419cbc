"""Files of tensors: how large they are, which names and shapes are accepted, and what is read of them."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cumo_model.checkpoints import shards
from cumo_model.checkpoints.shards import Shards, check_tensors, write_shards


def plan(sizes):
    """One fp32 tensor of each number of bytes, filled with its number."""
    return [
        (name, (size // 4,), lambda size=size, i=i: torch.full((size // 4,), float(i)))
        for i, (name, size) in enumerate(sizes.items())
    ]


@pytest.mark.parametrize(
    "limit, files",
    [
        pytest.param(100, [["a"], ["b", "c"], ["d"], ["e"]], id="full to the last byte"),
        pytest.param(99, [["a"], ["b"], ["c"], ["d"], ["e"]], id="one byte less"),
        pytest.param(180, [["a", "b"], ["c", "d"], ["e"]], id="counted anew for each file"),
        pytest.param(1000, [["a", "b", "c", "d", "e"]], id="one file"),
        pytest.param(1, [["a"], ["b"], ["c"], ["d"], ["e"]], id="smaller than a tensor"),
    ],
)
def test_shards_are_as_large_as_they_may_be(tmp_path, limit, files):
    sizes = {"a": 120, "b": 60, "c": 40, "d": 120, "e": 100}
    write_shards(tmp_path, plan(sizes), lambda name: torch.float32, limit, progress=False)
    index = tmp_path / "model.safetensors.index.json"
    if len(files) == 1:
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        values = json.loads(index.read_text())
        assert values["metadata"] == {"total_size": sum(sizes.values())}
        assert values["weight_map"] == {
            n: file for file, part in zip(names, files, strict=True) for n in part
        }
    for name, part in zip(names, files, strict=True):
        assert sorted(load_file(tmp_path / name)) == part
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # releases of transformers require it
    found = Shards(tmp_path)
    for i, (name, size) in enumerate(sizes.items()):
        assert found.shapes[name] == (size // 4,) and found.dtypes[name] == torch.float32
        assert torch.equal(found[name], torch.full((size // 4,), float(i)))


def test_the_size_of_a_tensor_is_that_of_its_dtype(tmp_path):
    tensors = [(n, (30,), lambda: torch.zeros(30, dtype=torch.bfloat16)) for n in ("a", "b", "c")]
    write_shards(tmp_path, tensors, lambda name: torch.bfloat16, 120, progress=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 180 and len(set(index["weight_map"].values())) == 2


def test_names_and_shapes_are_compared_in_both_directions():
    wanted = {"a": (1, 2), "b": (3,), "c": (4,), "d": (5,)}
    check_tensors(dict(wanted), wanted, "x")
    found = {"a": (2, 1), "b": (3,), "e": (1,), "f": (1,), "g": (1,), "h": (1,)}
    said = (
        "x does not match config.json: of 4 tensors 2 missing (c, d); 4 not known (e, f, g); "
        "1 of another shape (a is (2, 1), config.json says (1, 2))"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        check_tensors(found, wanted, "x")
    without = {name: shape for name, shape in wanted.items() if name != "a"}
    for part in (wanted | {"e": (1,)}, without, wanted | {"a": (1, 3)}):
        with pytest.raises(ValueError, match="x does not match"):
            check_tensors(part, wanted, "x")


def test_safetensors_come_before_pickles(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert Shards(tmp_path)["a"].tolist() == [1, 1]
    write_shards(tmp_path, plan({"a": 8}), lambda name: torch.float32, 100, progress=False)
    assert Shards(tmp_path)["a"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        Shards(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_of_many_tensors_is_opened_once_for_all_that_are_read(tmp_path, monkeypatch, kind):
    """Opening parses the names of all tensors, which took most of the time where each expert has several."""
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
    wanted = {f"{i}": (torch.arange(24) - i).view(2, 3, 4).to(dtypes[i % 6]) for i in range(60)}
    wanted |= {"scalar": torch.tensor(7), "empty": torch.empty(3, 0)}
    if kind == "bin":
        torch.save(wanted, tmp_path / "pytorch_model.bin")
    else:
        save_file(wanted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = []
    for name in ("_read_safetensors", "read_bin"):
        real = getattr(shards, name)
        monkeypatch.setattr(shards, name, lambda path, real=real: opened.append(path) or real(path))
    found = Shards(tmp_path)
    for name, value in wanted.items():
        whole = found.read(name)
        assert whole.dtype == value.dtype and torch.equal(whole, value), name
        if value.ndim == 3:
            assert torch.equal(found.read(name, 1), value[1]), name
    assert len(opened) == (1 if kind == "safetensors" else 2)
    if kind == "bin":
        monkeypatch.setattr(shards, "MAPPED", -1)  # pages of a mapped file stay in memory
        assert torch.equal(found.read("1"), wanted["1"]) and len(opened) == 3


def test_a_file_that_becomes_shorter_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    found = Shards(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: it has become shorter"):
        found.read("a")


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    (tmp_path / "other").touch()
    write_shards(tmp_path, plan({"a": 4}), lambda name: torch.float32, 100, progress=False)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, modes
