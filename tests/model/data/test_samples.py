"""Truncation: records that keep no label are refused, cut records are counted; summaries name lines."""

import copy
import json
import re
import warnings

import pytest
import torch
from tokenizers.pre_tokenizers import Metaspace

from cumo_model.data import ConversationDataset, Problem, StreamedConversations
from cumo_model.data.samples import Tokenising, summaries
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.processor import build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor(train_tokenizer(["what? red green"] * 5, 300), 12, 4)


def _record(number, question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": number, "conversations": turns}


RECORDS = [
    _record(0, "what?", "red"),
    _record(1, "what? " * 30, "red"),
    _record(2, "what?", "red " * 40),
    _record(3, "see [/INST] " * 20, "red"),
]


def _write(folder, records):
    path = folder / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def _lengths(processor, record):
    """The tokens of a record, and those before its first answer."""
    ((_, labels),) = Tokenising(processor, "mistral_instruct", None).whole([record["conversations"]])
    return len(labels), int((labels != -100).nonzero()[0])


def test_a_record_that_keeps_no_label_is_bad(tmp_path, processor):
    tokens, before = _lengths(processor, RECORDS[1])
    path = _write(tmp_path, RECORDS[:2])
    said = rf"x\.jsonl:2: record 1 \(id 1\): its first answer begins at token {before + 1} of {tokens}, "

    def in_memory(limit):
        return ConversationDataset(path, tmp_path, processor, max_length=limit)

    def streamed(limit, **more):
        return StreamedConversations(path, tmp_path, processor, "mistral_instruct", limit, **more)

    for build in (in_memory, streamed):
        with pytest.raises(ValueError, match=rf"{said}max_length is {before}: no label is trained on"):
            build(before)
        with pytest.warns(
            UserWarning, match=rf"^1 record is longer than max_length {before + 1} and is cut$"
        ):
            data = build(before + 1)
        assert [len(data[i]["input_ids"]) for i in (0, 1)] == [_lengths(processor, RECORDS[0])[0], before + 1]
        assert (data[1]["labels"] != -100).sum() == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(build(tokens)[1]["labels"], build(None)[1]["labels"])
    for _ in range(2):  # the second time with the index from disk
        with pytest.warns(UserWarning, match=rf"left out: .*{said}.*\(1 such records\)"):
            assert len(streamed(before, skip_bad=True, cache_dir=tmp_path / "c")) == 1


def test_a_record_without_any_label_is_bad(processor):
    """As with a tokenizer that has no token for an answer's characters."""
    turns = _record(0, "what?", "red")["conversations"]
    ids = torch.arange(3)
    said = "no token of its answers has a label: no label is trained on"
    for limit in (None, 2):
        tokenising = Tokenising(processor, "mistral_instruct", limit)
        assert tokenising.problem(turns, (ids, torch.full_like(ids, -100))) == said
        assert tokenising.problem(turns, (ids, ids)) is None


def test_a_tokenizer_that_gives_other_ids_after_a_picture_is_refused(processor):
    """As one that puts a space before the first text only: training and prompts would differ."""
    other = copy.copy(processor)
    other.tokenizer = copy.deepcopy(processor.tokenizer)
    other.tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    with pytest.raises(ValueError, match="tokenizer must give the text after <image> the ids"):
        Tokenising(other, "mistral_instruct", None)


def test_records_that_are_cut_are_counted_and_reserved_marks_stay_a_warning(tmp_path, processor):
    path = _write(tmp_path, [RECORDS[0], RECORDS[2], RECORDS[3], RECORDS[2]])
    limit = _lengths(processor, RECORDS[0])[0]
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            data = StreamedConversations(
                path, tmp_path, processor, "mistral_instruct", limit, cache_dir=tmp_path / "c"
            )
        texts = [str(warning.message) for warning in caught]
        assert any(
            text.startswith(f"3 records are longer than max_length {limit} and are cut") for text in texts
        )
        assert any(
            re.search(r"without labels: .*x\.jsonl:3: record 2 \(id 3\): turn 1 holds", t) for t in texts
        )
        assert len(texts) == 2 and data.lengths.tolist() == [limit] * 4


@pytest.mark.parametrize("limit", [0, -1, 2.0, True, "7"])
def test_a_max_length_that_is_no_number_of_tokens_is_refused(tmp_path, processor, limit):
    path = _write(tmp_path, RECORDS[:1])
    for build in (ConversationDataset, StreamedConversations):
        with pytest.raises(
            ValueError, match="max_length must be a number of tokens, 1 or more, or None, got"
        ):
            build(path, tmp_path, processor, max_length=limit)


def test_summaries_name_the_first_lines_and_count():
    problems = [Problem("a.jsonl", n, None, "is odd", fatal=n != 3, line=n + 1) for n in range(8)]
    left_out, unlabelled, cut = summaries(problems, 2, 9)
    named = "; ".join(f"a.jsonl:{n + 1}: record {n}: is odd" for n in (0, 1, 2, 4, 5))
    assert left_out == f"records are left out: {named}; ... (7 such records)"
    assert unlabelled == (
        "records are trained on without labels: a.jsonl:4: record 3: is odd (1 such records)"
    )
    assert cut == "2 records are longer than max_length 9 and are cut"
    (grey,) = summaries([], grey=problems[:1])
    assert grey == (
        "records are kept with grey in place of a picture, their labels are not used: "
        "a.jsonl:1: record 0: is odd (1 such records)"
    )
    assert summaries([]) == []
