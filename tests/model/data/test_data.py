"""Data sets: errors name file, record and reason; samples and batches agree with processor and templates."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cumo_model.data import ConversationDataset, check, collate, pictures
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.conversation import IGNORE_INDEX, tokenize_conversation
from cumo_model.processing.pictures import decode_image, load_image
from cumo_model.processing.processor import build_processor

PICTURES = Path(__file__).parents[2] / "fixtures" / "emoji"
NAMES = ("red-apple-wide.png", "banana-tall.png", "penguin-square.png")
SIZE, IMAGE_TOKENS = 48, 36


def _turns(question, *rest):
    values = [question, *rest]
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def _good_records():
    return [
        {
            "id": 0,
            "image": NAMES[0],
            "conversations": _turns("<image>\nwhat is it?", "a red apple", "what colour?", "red"),
        },
        {"id": "words", "conversations": _turns("what is red?", "a red apple")},
        {"id": 2, "image": NAMES[1], "conversations": _turns("what is it?\n<image>", "red")},
        {"id": 3, "image": NAMES[2], "conversations": _turns("<image>", "red")},
        {"id": 4, "image": NAMES[0], "conversations": _turns("<image>\nwhat colour?", "red")},
    ]


@pytest.fixture(scope="module")
def processor():
    tokenizer = train_tokenizer(["what is it?", "a red apple", "\nwhat colour?", "red"] * 20, 320)
    return build_processor(tokenizer, SIZE, 8)


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        shutil.copy(PICTURES / name, tmp_path / name)
    return tmp_path


def _write(folder, content):
    path = folder / "talk.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def dataset(folder, processor):
    return ConversationDataset(_write(folder, _good_records()), folder, processor)


def test_items_are_tokens_labels_and_the_processors_pixels(dataset, processor):
    for index, record in enumerate(_good_records()):
        item = dataset[index]
        ids, labels = tokenize_conversation(
            record["conversations"], processor.tokenizer, "mistral_instruct", IMAGE_TOKENS
        )
        assert torch.equal(item["input_ids"], ids) and item["input_ids"].dtype == torch.int64
        assert torch.equal(item["labels"], labels) and item["labels"].dtype == torch.int64
        if "image" not in record:
            assert item["pixel_values"] is None
            continue
        image = load_image(PICTURES / record["image"])
        expected = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
        assert item["pixel_values"].dtype == torch.float32
        # six roundings in the processor (test_processor.py) and seven of scale, shift, product and sum; the
        # values are at most 1 / deviation
        rounding = 13 * torch.finfo(torch.float32).eps / 2 / min(processor.image_processor.image_std)
        assert (item["pixel_values"] - expected).abs().max() <= rounding


def test_the_loss_sees_exactly_the_answers(dataset, processor):
    labels = dataset[0]["labels"]
    text = processor.tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert text.split() == ["a", "red", "apple</s>", "red</s>"]


def test_a_picture_is_decoded_once(dataset, monkeypatch):
    decoded = []
    monkeypatch.setattr(pictures, "decode_image", lambda path: decoded.append(path) or decode_image(path))
    for _ in range(2):
        for index in range(len(dataset)):
            dataset[index]
        dataset.batch(range(len(dataset)))
    assert sorted(Path(path).name for path in decoded) == sorted(NAMES)
    assert dataset.pixels(0).dtype == torch.uint8


def test_collate_pads_right_and_keeps_image_order(dataset):
    items = [dataset[index] for index in (1, 3, 0)]
    batch = collate(items, pad_id=0)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, longest)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert (batch["input_ids"][row, length:] == 0).all()
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
    assert torch.equal(batch["pixel_values"], torch.cat([items[1]["pixel_values"], items[2]["pixel_values"]]))


@pytest.mark.parametrize("indices", [[0], [1], [4, 1, 2, 3, 0], [0, 0], [3, 2]])
def test_batch_equals_collate(dataset, indices):
    expected = collate([dataset[index] for index in indices], dataset.pad_id)
    got = dataset.batch(indices)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_text_alone_has_no_pixel_values(dataset):
    assert "pixel_values" not in dataset.batch([1])


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="a batch must hold at least one sample"):
        collate([], 0)


def test_max_length_cuts_text_but_not_images(folder, processor):
    path = _write(folder, _good_records()[:1])
    whole = ConversationDataset(path, folder, processor)[0]
    with pytest.warns(UserWarning, match="^1 record is longer than max_length 47 and is cut$"):
        cut = ConversationDataset(path, folder, processor, max_length=47)[0]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:47]) and torch.equal(
        cut["labels"], whole["labels"][:47]
    )
    assert (cut["labels"] != IGNORE_INDEX).any()
    with pytest.raises(
        ValueError, match=r"talk\.json:1: record 0 \(id 0\): max_length 20 cuts through the 36 tokens"
    ):
        ConversationDataset(path, folder, processor, max_length=20)


def test_a_later_picture_is_whole_or_the_record_is_refused(folder, processor):
    """Also where only its last token would be lost, or all of them: the batch would still have the pixels."""
    record = {
        "id": 5,
        "image": list(NAMES[:2]),
        "conversations": _turns("<image>\nwhat?", "red", "<image>", "red"),
    }
    path = _write(folder, [record])
    ids = ConversationDataset(path, folder, processor)[0]["input_ids"]
    end = int((ids == processor.image_token_id).nonzero()[-1]) + 1
    for limit in (end - 1, end - IMAGE_TOKENS + 1, end - IMAGE_TOKENS):
        with pytest.raises(ValueError, match=f"max_length {limit} cuts through the 36 tokens of an image"):
            ConversationDataset(path, folder, processor, max_length=limit)
    with pytest.warns(UserWarning, match="1 record is longer"):
        cut = ConversationDataset(path, folder, processor, max_length=end)[0]
    assert torch.equal(cut["input_ids"], ids[:end]) and len(cut["pixel_values"]) == 2


ONE = _turns("<image>\nwhat?", "red")
BAD_RECORDS = [
    pytest.param("hello", "must be an object with conversations, got str", id="not-an-object"),
    pytest.param({"id": 9}, "has no conversations", id="no-conversations"),
    pytest.param({"id": 9, "conversations": []}, "conversations must be a non-empty list", id="no-turns"),
    pytest.param({"id": 9, "conversations": [{"from": "human"}]}, "turn 1 has no value", id="no-value"),
    pytest.param(
        {"id": 9, "conversations": [{"from": "system", "value": ""}]},
        "from must be human or gpt, got 'system'",
        id="role",
    ),
    pytest.param({"id": 9, "conversations": [*ONE, *ONE[1:]]}, "turn 3 must be human's", id="two-answers"),
    pytest.param(
        {"id": 9, "conversations": ONE[:1], "image": NAMES[0]},
        "the last question has no answer",
        id="no-answer",
    ),
    pytest.param(
        {"id": 9, "conversations": ONE}, "1 <image> markers but 0 images", id="marker-without-image"
    ),
    pytest.param(
        {"id": 9, "image": NAMES[0], "conversations": [*ONE, *ONE]},
        "2 <image> markers but 1 images",
        id="more-markers-than-images",
    ),
    pytest.param(
        {"id": 9, "image": NAMES[0], "conversations": _turns("what?", "red")},
        "no turn holds <image>",
        id="unused-image",
    ),
    pytest.param(
        {"id": 9, "image": [NAMES[0], 3], "conversations": ONE},
        "image must be a file name or a list of them, got",
        id="image-list-of-other-things",
    ),
    pytest.param(
        {"id": 9, "image": [], "conversations": ONE}, "image must be a file name or a list", id="no-images"
    ),
    pytest.param(
        {"id": 9, "image": list(NAMES), "conversations": ONE},
        "1 <image> markers but 3 images",
        id="more-images-than-markers",
    ),
    pytest.param(
        {"id": 9, "image": [NAMES[0], "gone.png"], "conversations": [*ONE, *ONE]},
        "image 'gone.png' does not exist under",
        id="second-image-missing",
    ),
    pytest.param(
        {"id": 9, "conversations": _turns("what?", "red \ud83d")},
        "turn 2 holds half of a surrogate pair",
        id="no-character",
    ),
    pytest.param(
        {"id": 9, "image": "gone.png", "conversations": ONE},
        "image 'gone.png' does not exist under",
        id="image-missing",
    ),
    pytest.param({"id": 9, "conversations": _turns(" \n", "red")}, "turn 1 is empty", id="empty-question"),
    pytest.param({"id": 9, "conversations": _turns("what?", "")}, "turn 2 is empty", id="empty-answer"),
    pytest.param(
        {"id": 9, "conversations": _turns("what?", "\u200b \ufeff\u3164\ufe0f\0\n")},
        "turn 2 is empty",
        id="invisible-answer",
    ),
    pytest.param(
        {"id": 9, "conversations": _turns("\u2060", "red")}, "turn 1 is empty", id="invisible-question"
    ),
    pytest.param(
        {"id": 9, "image": NAMES[0], "conversations": [*ONE, *_turns("", "red")]},
        "turn 3 is empty",
        id="empty-later-question",
    ),
    pytest.param(
        {"id": 9, "image": None, "conversations": ONE},
        "image must be a file name or a list of them where a turn holds <image>, got None",
        id="null-with-a-marker",
    ),
    pytest.param(
        {"id": 9, "image": [None], "conversations": _turns("what?", "red")},
        "image must be a file name or a list of them, got [None]",
        id="list-of-null",
    ),
    pytest.param(
        {"id": 9, "image": "a.MP4", "conversations": ONE},
        "image must name pictures, got 'a.MP4', which is a video or sound",
        id="video-as-image",
    ),
    pytest.param(
        {"id": 9, "messages": _turns("what?", "red")}, "has no conversations, but messages", id="messages"
    ),
    pytest.param(
        {"id": 9, "system": "Be brief.", "conversations": _turns("what?", "red")},
        "has a text under 'system', which is not read",
        id="system",
    ),
    pytest.param(
        {"id": 9, "video": "a.mp4", "conversations": _turns("what?", "red")},
        "has a video under 'video', which is not read",
        id="video",
    ),
    pytest.param(
        {"id": 9, "conversations": [{**ONE[0], "value": "what?", "image": NAMES[0]}, ONE[1]]},
        "turn 1 has pictures under 'image', which is not read",
        id="image-in-a-turn",
    ),
    pytest.param(
        {"id": 9, "conversations": _turns("<video>\nwhat?", "red")},
        "turn 1 holds <video>, which would be trained on as text",
        id="video-mark",
    ),
    pytest.param(
        {"id": 9, "image": "../x.png", "conversations": ONE},
        "image '../x.png' must lie under image_root",
        id="image-outside",
    ),
]


@pytest.mark.parametrize("record, reason", BAD_RECORDS)
def test_a_bad_record_is_named(folder, processor, record, reason):
    path = _write(folder, [_good_records()[0], record])
    problems = list(check(path, folder))
    assert len(problems) == 1 and problems[0].fatal
    assert problems[0].record == 1 and reason in problems[0].reason
    with pytest.raises(ValueError) as error:
        ConversationDataset(path, folder, processor)
    assert str(error.value).startswith(f"{path}:1: record 1") and reason in str(error.value)
    if isinstance(record, dict):
        assert "(id 9)" in str(error.value)


BAD_FILES = [
    pytest.param("", "is not JSON", id="empty-file"),
    pytest.param('{"id": 1}', "must hold a list of records, got dict", id="object"),
    pytest.param("[]", "holds no records", id="no-records"),
]


@pytest.mark.parametrize("content, reason", BAD_FILES)
def test_a_bad_file_is_named(folder, processor, content, reason):
    path = _write(folder, content)
    with pytest.raises(ValueError, match=rf"talk\.json: ({reason})"):
        ConversationDataset(path, folder, processor)
    (problem,) = check(path)
    assert problem.record is None and str(problem).startswith(f"{path}: ")
    assert path.read_text() == content


def test_missing_and_foreign_files_are_named(folder, processor):
    with pytest.raises(ValueError, match=r"nowhere\.json: the file does not exist"):
        ConversationDataset(folder / "nowhere.json", folder, processor)
    (folder / "talk.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(ValueError, match=r"talk\.json: is not UTF-8 text"):
        ConversationDataset(folder / "talk.json", folder, processor)
    with pytest.raises(ValueError, match=r"cannot be read"):
        ConversationDataset(folder, folder, processor)


def test_a_corrupt_picture_is_named_when_it_is_used(folder, processor):
    dataset = ConversationDataset(_write(folder, _good_records()), folder, processor)
    picture = folder / NAMES[0]
    picture.write_bytes(picture.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"record 4 \(id 4\): image '.*red-apple-wide\.png' cannot be read"):
        dataset[4]
    assert len(ConversationDataset(folder / "talk.json", folder, processor)) == 5  # decoded at its first use
    assert [problem.record for problem in check(folder / "talk.json", folder, decode=True)] == [0, 4]
    assert list(check(folder / "talk.json", folder)) == []


def test_invisible_characters_within_a_text_are_free(folder):
    for answer in ("a\u200bb", "\u2764\ufe0f", "\u0645\u06cc\u200c\u062e", "."):
        path = _write(folder, [{"id": 9, "conversations": _turns("what?", answer)}])
        assert list(check(path)) == []


def test_several_problems_are_counted(folder, processor):
    path = _write(folder, [{"id": 1}, {"id": 2}, {"id": 3}])
    assert len(list(check(path))) == 3
    with pytest.raises(ValueError, match=r"record 0 \(id 1\): has no conversations \(and 2 more problems\)"):
        ConversationDataset(path, folder, processor)


def test_reserved_markers_are_reported_but_load(folder, processor):
    records = [{"id": "odd", "conversations": _turns("what?", "see </s>")}, _good_records()[0]]
    path = _write(folder, records)
    (problem,) = check(path)
    assert not problem.fatal and "turn 2 holds </s>" in problem.reason
    with pytest.warns(UserWarning, match="turn 2 holds </s>"):
        dataset = ConversationDataset(path, folder, processor)
    assert (dataset[0]["labels"] == IGNORE_INDEX).all() and (dataset[1]["labels"] != IGNORE_INDEX).any()


def test_a_template_that_does_not_fit_names_the_record(folder, processor):
    path = _write(folder, _good_records()[2:3] + _good_records()[:1])
    with pytest.raises(
        ValueError,
        match=r"record 1 \(id 0\): template plain must have one <image> turn and one caption, got 4 turns",
    ):
        ConversationDataset(path, folder, processor, template="plain")
    with pytest.raises(ValueError, match="template must be one of"):
        ConversationDataset(path, folder, processor, template="vicuna")
