"""Pictures that cannot be read stop a run with advice, or are passed over, also by a run that was stopped."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cumo_model.data import StreamedConversations
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.processor import build_processor
from cumo_model.training.recipe import load_recipe
from cumo_model.training.stage import read_history
from cumo_model.training.trainer import run_recipe
from tests.model.training.small_runs import write_data, write_model, write_recipe

COLOURS = ["red", "green", "blue"]


def _jpeg():
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, "JPEG")
    return data.getvalue()


def _bomb():
    """A PNG of a few bytes that claims to have 4e9 pixels."""
    data = io.BytesIO()
    Image.new("1", (1, 1)).save(data, "PNG")
    whole = bytearray(data.getvalue())
    whole[16:24] = (65000).to_bytes(4, "big") * 2
    return bytes(whole)


BAD = {
    "truncated": _jpeg()[:2000],
    "empty": b"",
    "text": b"hello",
    "bomb": _bomb(),
    "header": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "deleted": None,
}


@pytest.fixture(scope="module")
def processor():
    return build_processor(train_tokenizer([f"what? {' '.join(COLOURS)}"] * 5, 300), 12, 4)


def _records():
    def turns(question, answer):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    both = {"id": "both", "image": ["red.png", "bad.jpg"], "conversations": turns("<image> <image>", "blue")}
    single = {"id": "single", "image": "bad.jpg", "conversations": turns("<image>what?", "blue")}
    good = {"id": "good", "image": "green.png", "conversations": turns("<image>what?", "green")}
    return [both, good, single]


@pytest.fixture
def folder(tmp_path):
    for colour in COLOURS:
        Image.new("RGB", (12, 12), colour).save(tmp_path / f"{colour}.png")
    shutil.copy(tmp_path / "blue.png", tmp_path / "bad.jpg")
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, _records())))
    return tmp_path


def _spoil(path, kind):
    path.unlink()
    if BAD[kind] is not None:
        path.write_bytes(BAD[kind])


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_picture_becomes_grey_and_its_labels_are_not_used(folder, processor, kind):
    data = StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)
    wanted = data.__getitems__([0, 1, 2])
    _spoil(folder / "bad.jpg", kind)
    with pytest.warns(
        UserWarning, match=r"x\.jsonl:1: record \(id 'both'\): image .*bad\.jpg.*grey.*\(1 such"
    ):
        found = data.__getitems__([0, 1, 2])
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert one["pixel_values"].shape == other["pixel_values"].shape
        if index == 1:
            assert all(torch.equal(one[name], other[name]) for name in one)
        else:
            assert (one["labels"] == -100).all() and (other["labels"] != -100).any()
            assert one["labels"].shape == other["labels"].shape and one["labels"].dtype == torch.int64
            assert (one["pixel_values"][-1] == 0).all() and one["pixel_values"].dtype == torch.float32
    assert torch.equal(found[0]["pixel_values"][0], wanted[0]["pixel_values"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each picture is named once
        data[2]
    if kind != "deleted":
        strict = StreamedConversations(folder / "x.jsonl", folder, processor)
        assert len(strict) == 3  # the list of records does not depend on what can be decoded
        with pytest.raises(ValueError, match=r"x\.jsonl:3: record \(id 'single'\): .*data\.skip_bad=true"):
            strict[2]


def test_an_index_of_all_records_is_used_also_with_skip_bad(folder, processor):
    def dataset(skip_bad):
        return StreamedConversations(
            folder / "x.jsonl", folder, processor, cache_dir=folder / "c", skip_bad=skip_bad
        )

    assert len(dataset(False)) == 3
    _spoil(folder / "bad.jpg", "deleted")
    assert len(dataset(True)) == 3
    shutil.rmtree(folder / "c")
    kept = (
        r"kept with grey .*x\.jsonl:1: .*\(id 'both'\): image 'bad\.jpg' does not exist.*\(2 such records\)"
    )
    for _ in range(2):  # the second time with the index from disk
        with pytest.warns(UserWarning, match=kept):
            assert len(dataset(True)) == 3  # the same records, whatever pictures there are
    shutil.rmtree(folder / "c")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: .*'bad\.jpg' does not exist"):
        dataset(False)


@pytest.mark.parametrize("kind", BAD)
def test_the_records_do_not_depend_on_the_pictures(folder, processor, kind):
    """An index that is made before, while and after a picture is bad; names and links out of the folder."""
    records = _records()
    outside = {**records[2], "id": "outside", "image": "../bad.jpg"}
    link = {**records[2], "id": "link", "image": "link.jpg"}
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, [*records, outside, link])))

    def found():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)
            return data, [data.record(i)["id"] for i in range(len(data))], data.lengths.tolist()

    shutil.copy(folder / "blue.png", folder / "link.jpg")
    before = found()
    (folder / "link.jpg").unlink()
    (folder / "link.jpg").symlink_to(folder.parent)
    _spoil(folder / "bad.jpg", kind)
    during = found()
    assert during[1:] == before[1:] and before[1] == ["both", "good", "single", "link"]
    with pytest.warns(UserWarning, match="its record's labels are not used"):
        assert [bool((item["labels"] != -100).any()) for item in during[0].__getitems__(range(4))] == [
            False,
            True,
            False,
            False,
        ]


FAILURES = {
    "files": OSError(errno.EMFILE, "Too many open files"),
    "disk": OSError(errno.EIO, "Input/output error"),
    "rights": PermissionError(errno.EACCES, "Permission denied"),
    "memory": MemoryError(),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_of_the_system_stops_a_run_with_skip_bad(folder, processor, monkeypatch, kind):
    def fails(*args, **more):
        raise FAILURES[kind]

    data = StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)
    monkeypatch.setattr("cumo_model.processing.pictures.Image.open", fails)
    said = (
        r"x\.jsonl:2: record \(id 'good'\): .*green\.png.*this is a failure of the system, not of the picture"
    )
    with pytest.raises(ValueError, match=said):
        data[1]
    with pytest.raises(
        ValueError, match=r"^image .*\.png.* cannot be read"
    ):  # at once, not after many others
        StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)
    monkeypatch.undo()
    monkeypatch.setattr("cumo_model.data.pictures.decode_image", fails)
    if kind != "memory":
        with pytest.raises(OSError):
            data.pictures.load("green.png")
    with pytest.raises(ValueError, match="failure of the system"):
        data[1]

    def is_nowhere(self, name):
        raise ValueError(f"{name} is nowhere") from FAILURES[kind]

    monkeypatch.setattr("cumo_model.data.pictures.Pictures.place", is_nowhere)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"^red\.png is nowhere$"):
        warnings.simplefilter("error")  # not before a grey picture is announced
        StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)


def test_a_data_set_without_a_readable_picture_stops(folder, processor, monkeypatch):
    data = StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)
    for colour in ("red", "green"):
        (folder / f"{colour}.png").unlink()
    _spoil(folder / "bad.jpg", "text")
    said = (
        r"skip_bad: none of the pictures can be read \(3 tried\), the first: image 'red\.png' does not exist"
    )
    with pytest.warns(UserWarning, match="kept with grey"), pytest.raises(ValueError, match=said):
        StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)
    monkeypatch.setattr("cumo_model.data.streamed.TRIED", 1)
    with pytest.warns(UserWarning, match="kept"), pytest.raises(ValueError, match=r"read \(1 tried\)"):
        StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)
    monkeypatch.setattr("cumo_model.data.streamed.TRIED", 2)
    shutil.copy(folder / "blue.png", folder / "red.png")
    (folder / "y.jsonl").write_text("\n".join(map(json.dumps, _records()[::-1])))
    with pytest.warns(UserWarning, match="kept with grey"):  # the first and the last record are tried
        StreamedConversations(folder / "y.jsonl", folder, processor, skip_bad=True)
    with pytest.warns(UserWarning, match="green"):
        for index in (1, 1, 0, 2):  # in the third record red is read between the two others
            data[index]
    with pytest.raises(ValueError, match=r"good.*skip_bad: 2 pictures in a row cannot be read"):
        data[1]
    shutil.copy(folder / "blue.png", folder / "green.png")
    StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)


def test_each_worker_names_a_picture_once_and_says_that_it_counts_for_itself(folder, processor, monkeypatch):
    data = StreamedConversations(folder / "x.jsonl", folder, processor, skip_bad=True)
    _spoil(folder / "bad.jpg", "text")
    monkeypatch.setattr("cumo_model.data.streamed.get_worker_info", lambda: object())
    with pytest.warns(UserWarning) as caught:
        data.__getitems__([0, 1, 2, 2, 0])
    (text,) = (str(warning.message) for warning in caught)
    assert text.endswith("(1 such pictures so far in this data loader worker)")


def test_a_changed_record_file_is_named(folder, processor):
    data = StreamedConversations(folder / "x.jsonl", folder, processor)
    (folder / "x.jsonl").write_text("short")
    with pytest.raises(ValueError, match=r"x\.jsonl:3: the file has changed since it was indexed"):
        data[2]


MEASURED = ("_seconds", "_per_second", "memory_gib")  # ends of names: figures of the machine


def _series(result):
    series = read_history(result)["series"]
    return {name: values for name, values in series.items() if not name.endswith(MEASURED)}


def test_a_run_that_met_a_bad_picture_goes_on_with_skip_bad(tmp_path, tiny_config):
    """Refused, continued with skip_bad, and the same command again; as a run that always had skip_bad."""
    write_data(tmp_path)
    write_model(tmp_path, tiny_config)
    (tmp_path / "white.png").write_bytes(BAD["truncated"])
    trainer = {"trainer__save_steps": 1, "stage__batch_size": 2}
    refused = load_recipe(write_recipe(tmp_path, **trainer))
    with pytest.raises(ValueError, match=r"colours\.jsonl:6: .*id 'white'.*white\.png.*skip_bad=true"):
        run_recipe(refused)
    assert list((tmp_path / "run").glob("checkpoint-*"))
    skipping = load_recipe(tmp_path / "run.yaml", ["data.skip_bad=true"])
    with pytest.warns(UserWarning, match=r"white\.png.*replaced by grey"):
        result = run_recipe(skipping)
    assert run_recipe(skipping) == result
    whole = load_recipe(tmp_path / "run.yaml", ["data.skip_bad=true", f"output_dir={tmp_path / 'whole'}"])
    with pytest.warns(UserWarning, match=r"white\.png.*replaced by grey"):
        series = _series(run_recipe(whole))
    assert np.isfinite(series["loss"]).all() and len(series["loss"]) == 6
    assert _series(result) == series
    lines = (tmp_path / "colours.jsonl").read_text().splitlines()
    (tmp_path / "colours.jsonl").write_text("\n".join(line for line in lines if "white" not in line))
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=r"another content of data.* restore the data files.*skip_bad"):
        run_recipe(skipping)


@pytest.mark.slow
def test_the_command_ends_well_with_batches_of_one(tmp_path, tiny_config):
    """A step of one unreadable picture has no label at all; in a process of its own, as a user runs it."""
    write_data(tmp_path, text_rows=0)
    write_model(tmp_path, tiny_config)
    (tmp_path / "white.png").write_bytes(b"")
    path = write_recipe(tmp_path, stage__batch_size=1, trainer__per_device_train_batch_size=1)
    recipe = yaml.safe_load(path.read_text())
    recipe["trainer"] |= {"max_steps": 8, "save_steps": 1}
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "cumo_model", "train", "--config", str(path)]

    def train(*more):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *more], capture_output=True, text=True, env=env)

    failed = train()
    assert failed.returncode == 1 and "data.skip_bad=true" in failed.stderr.strip().splitlines()[-1]
    for _ in range(2):
        done = train("data.skip_bad=true")
        assert done.returncode == 0, done.stderr[-2000:]
    assert np.isfinite(read_history(tmp_path / "run" / "model")["series"]["loss"]).all()
