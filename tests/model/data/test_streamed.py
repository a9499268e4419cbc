"""The index of a streamed data set: chunks, files, places, what a stored index depends on, defaults."""

import io
import json
import os
import re
import tarfile
import warnings

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from cumo_model.data import ConversationDataset, StreamedConversations, streamed
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.conversation import tokenize_conversation
from cumo_model.processing.processor import build_processor

COLOURS = ["red", "green", "blue"]


def _processor(side=12, **options):
    return build_processor(train_tokenizer(["what? red green blue"] * 5, 300), side, 4, **options)


@pytest.fixture(scope="module")
def processor():
    return _processor()


def _record(number, words=1, image=None):
    question = "what?" if image is None else "<image>\nwhat?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red " * words + str(number)}]
    return {"id": number, "conversations": turns} | ({} if image is None else {"image": image})


RECORDS = [_record(n, 1 + n % 4, f"{COLOURS[n % 3]}.png" if n % 5 in (1, 2) else None) for n in range(11)]


@pytest.fixture
def folder(tmp_path):
    for colour in COLOURS:
        Image.new("RGB", (12, 12), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def _write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def _ids(data):
    return [data.record(index)["id"] for index in range(len(data))]


@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 12])
def test_every_record_is_indexed_once_in_order(folder, processor, monkeypatch, chunk):
    """Records are tokenised in chunks; the last of a file may be full, begun or empty."""
    monkeypatch.setattr(streamed, "CHUNK", chunk)
    files = [_write(folder / "b.jsonl", RECORDS[:5]), _write(folder / "a.jsonl", RECORDS[5:])]
    data = StreamedConversations(files, folder, processor, "mistral_instruct")
    assert _ids(data) == list(range(11))
    assert [data.file_of(n) for n in range(11)] == [str(files[0])] * 5 + [str(files[1])] * 6
    assert data.has_image.tolist() == ["image" in record for record in RECORDS]
    whole = ConversationDataset(_write(folder / "all.jsonl", RECORDS), folder, processor)
    for n in range(11):
        one, other = data[n], whole[n]
        assert torch.equal(one["input_ids"], other["input_ids"]) and data.lengths[n] == len(one["input_ids"])
        assert torch.equal(one["labels"], other["labels"])


def test_blank_lines_and_a_byte_order_mark_are_no_records(folder, processor):
    (folder / "x.jsonl").write_bytes(
        b"\xef\xbb\xbf%b\r\n\n  \n%b\n\n%b" % tuple(json.dumps(r).encode() for r in RECORDS[:3])
    )
    data = StreamedConversations(folder / "x.jsonl", folder, processor)
    assert [data.record(n) for n in range(len(data))] == RECORDS[:3]
    assert data._line.tolist() == [1, 4, 6]


def test_skipped_records_leave_no_gap(folder, processor, monkeypatch):
    monkeypatch.setattr(streamed, "CHUNK", 3)
    bad = {"id": "bad", "conversations": []}
    path = _write(folder / "x.jsonl", [RECORDS[0], bad, *RECORDS[1:4], bad, RECORDS[4], bad])
    with pytest.warns(UserWarning, match=r"x\.jsonl:2: .*x\.jsonl:6: .*x\.jsonl:8: .*\(3 such records\)"):
        data = StreamedConversations(path, folder, processor, skip_bad=True)
    assert _ids(data) == [0, 1, 2, 3, 4]


def test_a_stored_index_is_used_until_something_it_depends_on_changes(folder, processor, tmp_path):
    def stored(**changed):
        given = {
            "files": folder / "x.jsonl",
            "image_root": folder,
            "processor": processor,
            "template": "mistral_instruct",
            "max_length": None,
            "skip_bad": False,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = StreamedConversations(cache_dir=tmp_path / "index", **{**given, **changed})
        return data, data.identity(), len(list((tmp_path / "index").glob("index-*.safetensors")))

    path = _write(folder / "x.jsonl", RECORDS)
    _, first, count = stored()
    assert count == 1 and stored()[2] == 1
    assert stored(skip_bad=True)[2] == 1  # that of all records is used too
    (folder / "more").mkdir()
    other = train_tokenizer(["what? red green blue yellow"] * 5, 310)
    for expected, changed in enumerate(
        (
            {"template": "vicuna_v1"},
            {"max_length": 20},
            {"image_root": [folder, folder / "more"]},
            {"processor": _processor(24)},  # more tokens per picture
            {"processor": build_processor(other, 12, 4)},
        ),
        2,
    ):
        _, identity, count = stored(**changed)
        assert count == expected, changed
        assert (identity == first) == ("image_root" in changed), changed
    for expected, time in enumerate((10**18, 10**18 + 10_000), 7):
        os.utime(path, ns=(time, time))  # written again, perhaps with another content of the same size
        _, identity, count = stored()
        assert count == expected and identity == first
    _write(path, RECORDS[:4])
    data, four, count = stored()
    assert count == 9 and len(data) == 4 and four != first
    path.rename(folder / "y.jsonl")
    assert stored(files=folder / "y.jsonl")[1] != four
    (tmp_path / "elsewhere").mkdir()
    (folder / "y.jsonl").rename(tmp_path / "elsewhere" / "x.jsonl")
    assert stored(files=tmp_path / "elsewhere" / "x.jsonl")[1] == four
    assert not list((tmp_path / "index").glob(".*"))  # written beside it, then renamed


def test_a_record_behind_two_gibibytes_is_read(folder, processor):
    """In a shard with a file of zeros, which need no place on the disk."""
    size = (1 << 31) + 512
    with tarfile.open(folder / "x.tar", "w") as tar:
        info = tarfile.TarInfo("zeros.bin")
        info.size = size
        tar.addfile(info)
        tar.fileobj.seek(size, os.SEEK_CUR)
        tar.offset += size
        data = json.dumps(RECORDS[0]).encode()
        info = tarfile.TarInfo("a.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    data = StreamedConversations(folder / "x.tar", None, processor, cache_dir=folder / "index")
    again = StreamedConversations(folder / "x.tar", None, processor, cache_dir=folder / "index")
    assert data.record(0) == again.record(0) == RECORDS[0]


def test_pictures_of_a_records_own_shard_come_first(folder, processor):
    shards = [(folder / "x.tar", "red"), (folder / "other.tar", "blue")]
    for path, colour in shards:
        with tarfile.open(path, "w") as tar:
            tar.add(folder / f"{colour}.png", "a.png")
            tar.add(_write(folder / "record", [_record(0, image="a.png")]), "a.json")
    (own, colour), (other, _) = shards
    data = StreamedConversations(own, [folder, other], processor)
    wanted = processor.image_processor(Image.open(folder / f"{colour}.png"), return_tensors="pt")
    assert torch.equal(data[0]["pixel_values"], wanted["pixel_values"])
    with pytest.raises(ValueError, match="image_root must name a folder or tar files, got None"):
        StreamedConversations(_write(folder / "x.jsonl", RECORDS), None, processor)


def test_pictures_beside_a_record_are_its_own_also_behind_skipped_records_and_shards(folder, processor):
    """Records of .tar shards that name no picture: those with the name of the record are theirs."""
    for shard, colours in (("x.tar", ["", "red", "green"]), ("y.tar", ["blue", "red"])):
        with tarfile.open(folder / shard, "w") as tar:
            for n, colour in enumerate(colours):
                record = (
                    {**_record(n, image="a"), "id": colour} if colour else {"id": "", "conversations": []}
                )
                tar.add(
                    _write(folder / "record", [{k: v for k, v in record.items() if k != "image"}]),
                    f"{n}.json",
                )
                if colour:
                    tar.add(folder / f"{colour}.png", f"{n}.png")
    with pytest.warns(UserWarning, match="left out"):
        data = StreamedConversations([folder / "x.tar", folder / "y.tar"], None, processor, skip_bad=True)
    assert [(record["id"], record["image"]) for record in map(data.record, range(len(data)))] == [
        ("red", "1.png"), ("green", "2.png"), ("blue", "0.png"), ("red", "1.png"),
    ]  # fmt: skip
    assert data.has_image.all()


def test_all_that_is_said_of_records_is_said_again_with_a_stored_index(folder, processor):
    """Each record once, for example the one without its picture, whose answers hold a marker as well."""
    marked = {**_record(3, image="gone.png"), "id": "marked"}
    marked["conversations"][1]["value"] = "[/INST]"
    outside, empty = {**_record(2, image="../x.png"), "id": "outside"}, {"id": "empty", "conversations": []}
    path = _write(folder / "x.jsonl", [RECORDS[1], empty, outside, marked, _record(4, 30)])
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            options = {"cache_dir": folder / "index", "skip_bad": True}
            data = StreamedConversations(path, folder, processor, "mistral_instruct", 30, **options)
        left, grey, cut = (str(warning.message) for warning in caught)
        assert re.search(r"left out: .*:2: .*; .*:3: .*\(id 'outside'\).*\(2 such records\)", left)
        assert re.search(r"kept with grey .*:4: .*'gone\.png' does not exist.*\(1 such records\)", grey)
        assert cut.startswith("1 record is longer than max_length 30 and is cut")
    assert _ids(data) == [1, "marked", 4]


def test_an_index_depends_on_every_file_and_on_its_format(folder, processor, monkeypatch):
    files = [_write(folder / "x.jsonl", RECORDS[:2]), _write(folder / "y.jsonl", RECORDS[2:4])]

    def count(root=folder):
        StreamedConversations(files, root, processor, cache_dir=folder / "index")
        return len(list((folder / "index").iterdir()))

    assert (count(), count()) == (1, 1)
    os.utime(files[1], ns=(10**18, 10**18))
    assert count() == 2
    before = StreamedConversations(files, folder, processor).identity()
    _write(files[1], RECORDS[2:5])
    os.utime(files[1], ns=(10**18, 10**18))
    assert count() == 3 and StreamedConversations(files, folder, processor).identity() != before
    monkeypatch.setattr(streamed, "INDEX_FORMAT", 0)
    assert count() == 4
    monkeypatch.chdir(folder)
    assert count(".") == 4
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"image .* does not exist under"):
        count(".")


def test_a_record_that_max_length_does_not_fit_is_named_with_its_file(folder, processor):
    files = [_write(folder / "x.jsonl", RECORDS[:1]), _write(folder / "y.jsonl", RECORDS[1:2])]
    with pytest.raises(
        ValueError, match=r"y\.jsonl:1: .*begins at token 18 of 22, max_length is 12: no label"
    ):
        StreamedConversations(files, folder, processor, "mistral_instruct", 12)


def test_of_several_missing_pictures_the_first_is_named(folder, processor):
    names = ["red.png", "one.png", "two.png"]
    turns = [{"from": "human", "value": "<image><image><image>"}, {"from": "gpt", "value": "red"}]
    path = _write(folder / "x.jsonl", [{"id": 0, "image": names, "conversations": turns}])
    with pytest.warns(UserWarning, match=r"kept with grey .*: image 'one\.png' does not exist"):
        data = StreamedConversations(path, folder, processor, skip_bad=True)
    with pytest.warns(UserWarning, match=r"(one|two)\.png"):
        pixels = data[0]["pixel_values"]
    assert pixels.shape == (3, 3, 12, 12) and pixels[0].abs().max() > 0 == pixels[1:].abs().max()


def test_nothing_to_train_on_and_another_record_at_a_place_are_refused(folder, processor):
    path = _write(folder / "x.jsonl", [{"id": 0, "conversations": []}])
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="holds no records that"),
    ):
        StreamedConversations(path, folder, processor, skip_bad=True)
    data = StreamedConversations(_write(path, RECORDS[:1]), folder, processor)
    path.write_text(json.dumps({"id": "x" * 200})[:-1] + " " * (int(data._length[0]) - 209) + "}")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the file has changed since it was indexed"):
        data.record(0)
    path.write_text("0" + " " * 500)
    with pytest.raises(ValueError, match="has changed since it was indexed: there is no record at its place"):
        data.record(0)


def test_an_index_of_skipped_records_is_not_one_of_all(folder, processor, tmp_path):
    path = _write(folder / "x.jsonl", [RECORDS[0], {"id": "bad", "conversations": []}])
    options = {"cache_dir": tmp_path / "index"}
    with pytest.warns(UserWarning, match="left out"):
        StreamedConversations(path, folder, processor, skip_bad=True, **options)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: "):
        StreamedConversations(path, folder, processor, **options)


def test_the_text_is_whole_and_that_of_the_template_where_nothing_is_said(folder, processor):
    path = _write(folder / "x.jsonl", [_record(0, 200)])
    for kind, template in (
        (ConversationDataset, "mistral_instruct"),
        (StreamedConversations, "mistral_instruct_system"),
    ):
        data = kind(path, folder, processor)
        turns = _record(0, 200)["conversations"]
        ids, labels = tokenize_conversation(turns, processor.tokenizer, template, 9)
        assert torch.equal(data[0]["input_ids"], ids) and torch.equal(data[0]["labels"], labels)


def test_rows_are_padded_with_the_token_of_the_tokenizer(folder):
    processor = _processor()
    number = processor.tokenizer.convert_tokens_to_ids("Ġblue")
    processor.tokenizer.pad_token_id = number
    path = _write(folder / "x.jsonl", RECORDS[:2])
    data = ConversationDataset(path, folder, processor)
    assert data.pad_id == StreamedConversations(path, folder, processor).pad_id == number > 0
    lengths = [len(data[n]["input_ids"]) for n in (0, 1)]
    row = data.batch([0, 1])["input_ids"][lengths.index(min(lengths))]
    assert min(lengths) < max(lengths) and set(row[min(lengths) :].tolist()) == {number}
    processor.tokenizer.pad_token = None
    assert StreamedConversations(path, folder, processor).pad_id == 0


def test_an_eos_that_the_tokenizer_adds_to_texts_is_not_in_the_samples(folder):
    """BOS once, then the template's own marks only."""
    processor = _processor()
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    data = ConversationDataset(_write(folder / "x.jsonl", RECORDS[:2]), folder, processor, "vicuna_v1")
    for n in (0, 1):
        ids = data[n]["input_ids"].tolist()
        assert (ids.count(1), ids.count(2), ids[0], ids[-1]) == (1, 1, 1, 2)
