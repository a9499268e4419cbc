"""Token ids and label masks of the CuMo templates, with Mistral's tokenizer and with that of the demo."""

import json
import warnings

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoProcessor, PreTrainedTokenizerFast

from cumo_model import CumoConfig
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.conversation import (
    IGNORE_INDEX,
    render,
    tokenize_conversation,
    tokenize_conversations,
    tokenize_prompt,
    turn_problem,
)
from cumo_model.processing.processor import processor_from
from cumo_model.processing.templates import TEMPLATES
from cumo_model.processing.tokenizer_files import has_tokenizer
from tests.model import original

TWO_ROUNDS = [
    {"from": "human", "value": "What is it?\n<image>"},
    {"from": "gpt", "value": "a red apple"},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "red"},
]
IMAGE_TOKENS = 3


@pytest.fixture(scope="module")
def demo():
    return train_tokenizer(
        ["what is it?", "a red apple", "which colour?", "red", "\nwhat is it?", "a cat on pink.\n"] * 20, 340
    )


def _kept(tokenizer, labels):
    """The sequences of tokens that the loss covers."""
    runs, last = [], IGNORE_INDEX
    for label in labels.tolist():
        if label != IGNORE_INDEX:
            if last == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
        last = label
    return [tokenizer.convert_ids_to_tokens(run) for run in runs]


@pytest.mark.parametrize("template", ["mistral_instruct", "mistral_instruct_system"])
def test_two_rounds_match_sentencepiece(mistral, template):
    tokenizer, pieces = mistral
    encode, image = pieces.encode, tokenizer.convert_tokens_to_ids("<image>")
    system = TEMPLATES[template].system
    opening = "[INST] " + (f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else "")
    ids, labels = tokenize_conversation(TWO_ROUNDS, tokenizer, template, IMAGE_TOKENS)
    # special tokens are not passed to SentencePiece: it encodes each text between them with its own prefix
    # space
    before = [1, 1, *encode(opening)]
    expected = before + [image] * IMAGE_TOKENS + encode("\nWhat is it? [/INST] a red apple ") + [2]
    expected += [*encode("[INST] Which colour? [/INST] red "), 2]
    assert ids.tolist() == expected
    assert len(before) == (45 if system else 6)  # 45: measured with the original code
    assert expected[len(before) + IMAGE_TOKENS :][:2] == [28705, 13]  # a space, then the newline
    assert _kept(tokenizer, labels) == [["▁a", "▁red", "▁apple", "▁", "</s>"], ["▁red", "▁", "</s>"]]
    kept = labels != IGNORE_INDEX
    assert torch.equal(labels[kept], ids[kept])


def test_the_processor_of_released_weights_gives_these_ids(mistral_model, tmp_path):
    """From tokenizer files only: `<image>` after the vocabulary, two BOS, the space before </s>."""
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(mistral_model.read_bytes())
    assert has_tokenizer(tmp_path)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": True}))
    (tmp_path / "config.json").write_text(json.dumps(original.config()))
    processor = processor_from(tmp_path, CumoConfig(original={"image_aspect_ratio": "pad"}))
    tokenizer = processor.tokenizer
    assert processor.image_token_id == 32000 and tokenizer.pad_token_id == 0
    turns = [
        {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
        for turn in TWO_ROUNDS
    ]
    text = TWO_ROUNDS[0]["value"].replace("<image>", "").strip()
    image = {"type": "image", "image": Image.new("RGB", (9, 9))}
    turns[0]["content"] = [image, {"type": "text", "text": text}]
    got = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    wanted, _ = tokenize_conversation(TWO_ROUNDS, tokenizer, "mistral_instruct_system", 576)
    assert torch.equal(got["input_ids"][0], wanted)
    assert wanted[:2].tolist() == [1, 1] and wanted[-2:].tolist() == [28705, 2]
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    got = again.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(got["input_ids"][0], wanted)


def test_plain_matches_sentencepiece(mistral):
    tokenizer, pieces = mistral
    image = tokenizer.convert_tokens_to_ids("<image>")
    turns = [
        {"from": "human", "value": "Describe the picture.\n<image>"},
        {"from": "gpt", "value": "a cat on a mat"},
    ]
    ids, labels = tokenize_conversation(turns, tokenizer, "plain", IMAGE_TOKENS)
    caption = pieces.encode("a cat on a mat\n")
    assert ids.tolist() == [1] + [image] * IMAGE_TOKENS + caption
    assert labels.tolist() == [IGNORE_INDEX] * (1 + IMAGE_TOKENS) + caption
    assert render(turns, "plain") == ("<image>a cat on a mat\n", [(7, 22)])
    assert 2 not in ids.tolist()


def test_demo_tokenizer_spends_nothing_on_blanks(demo):
    ids, labels = tokenize_conversation(TWO_ROUNDS, demo, "mistral_instruct", 1)
    tokens = demo.convert_ids_to_tokens(ids.tolist())
    assert tokens[:4] == ["<s>", "<s>", "[INST]", "<image>"]
    assert "Ġ" not in tokens
    assert _kept(demo, labels) == [["Ġa", "Ġred", "Ġapple", "</s>"], ["Ġred", "</s>"]]
    assert demo.decode(ids[labels != IGNORE_INDEX], skip_special_tokens=True).split() == [
        "a",
        "red",
        "apple",
        "red",
    ]


def test_plain_with_the_demo_tokenizer(demo):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat on pink."}]
    ids, labels = tokenize_conversation(turns, demo, "plain", 2)
    assert demo.convert_ids_to_tokens(ids.tolist()) == [
        "<s>",
        "<image>",
        "<image>",
        "Ġa",
        "Ġcat",
        "Ġon",
        "Ġpink",
        ".",
        "ĠĊ",
    ]
    assert labels.tolist() == [IGNORE_INDEX] * 3 + ids.tolist()[3:]


def test_the_eos_of_another_tokenizer_is_learnt():
    """Where it is not called </s>, as in many language models; and its BOS is written."""
    texts = ["what is it?", "a red apple", "red"] * 20
    other = train_tokenizer(texts, 340)
    other.add_special_tokens({"bos_token": "<begin>", "eos_token": "<end>"})
    bos, eos = other.bos_token_id, other.eos_token_id
    ids, labels = tokenize_conversation(TWO_ROUNDS, other, "mistral_instruct", 1)
    assert ids[:2].tolist() == [bos, bos] and ids.tolist().count(bos) == 2
    assert ids[-1] == labels[-1] == eos and labels.tolist().count(eos) == 2
    assert not {"<s>", "</s>"} & set(other.convert_ids_to_tokens(ids.tolist()))


def test_text_alone_has_no_image_tokens(demo):
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "red"}]
    ids, _ = tokenize_conversation(turns, demo, "mistral_instruct", 99)
    assert demo.convert_tokens_to_ids("<image>") not in ids.tolist()


def test_many_at_once_equal_one_by_one(demo):
    conversations = [
        TWO_ROUNDS,
        TWO_ROUNDS[:2],
        [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "red"}],
    ]
    together = tokenize_conversations(conversations, demo, "mistral_instruct_system", IMAGE_TOKENS)
    for turns, (ids, labels) in zip(conversations, together, strict=True):
        alone_ids, alone_labels = tokenize_conversation(turns, demo, "mistral_instruct_system", IMAGE_TOKENS)
        assert torch.equal(ids, alone_ids) and torch.equal(labels, alone_labels)


@pytest.mark.parametrize("text", ["yes </s> no", "see [/INST] here"])
@pytest.mark.parametrize("turn", [0, 1])
def test_reserved_markers_mask_the_whole_conversation(demo, text, turn):
    turns = [dict(part) for part in TWO_ROUNDS]
    turns[turn]["value"] += text
    with pytest.warns(UserWarning, match="none of its labels are used"):
        _, labels = tokenize_conversation(turns, demo, "mistral_instruct", 1)
    assert (labels == IGNORE_INDEX).all()


def test_ordinary_turns_warn_of_nothing(demo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_conversation(TWO_ROUNDS, demo, "mistral_instruct", 1)


def test_markers_of_a_turn_become_one_in_front():
    text, spans = render(
        [{"from": "human", "value": "look <image> here"}, {"from": "gpt", "value": "yes"}], "mistral_instruct"
    )
    assert text == "<s>[INST] <image>\nlook  here [/INST] yes </s>"
    assert [text[start:end] for start, end in spans] == [" yes </s>"]


BAD_TURNS = [
    pytest.param("hello", "must be a non-empty list of turns, got 'hello'", id="text"),
    pytest.param([], "must be a non-empty list", id="empty"),
    pytest.param(["hi"], "turn 1 must be an object", id="not-an-object"),
    pytest.param([{"from": "human"}], "turn 1 has no value", id="no-value"),
    pytest.param([{}], "turn 1 has no from and no value", id="nothing"),
    pytest.param(
        [{"from": "user", "value": "x"}], "from must be human or gpt, got 'user'", id="unknown-role"
    ),
    pytest.param([{"from": "gpt", "value": "x"}], "turn 1 must be human's", id="answer-first"),
    pytest.param([{"from": "human", "value": "x"}] * 2, "turn 2 must be gpt's", id="two-questions"),
    pytest.param([{"from": "human", "value": 3}], "turn 1: value must be text, got 3", id="number"),
    pytest.param(
        [{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}],
        "turn 2: an answer",
        id="image-in-answer",
    ),
]


@pytest.mark.parametrize("turns, reason", BAD_TURNS)
def test_bad_turns_are_named(demo, turns, reason):
    assert reason in turn_problem(turns)
    with pytest.raises(ValueError, match=reason.split(",")[0].replace("(", r"\(")):
        tokenize_conversation(turns, demo, "mistral_instruct", 1)


def test_errors_name_template_tokenizer_and_prompt(demo):
    with pytest.raises(
        ValueError,
        match=r"template must be one of plain, mistral_instruct, mistral_instruct_system, .*, got 'vicuna'",
    ):
        tokenize_conversation(TWO_ROUNDS, demo, "vicuna", 1)
    with pytest.raises(
        ValueError, match="template plain must have one <image> turn and one caption, got 4 turns"
    ):
        tokenize_conversation(TWO_ROUNDS, demo, "plain", 1)
    for question, count in (("<image><image>", 2), ("what?", 0)):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
        with pytest.raises(ValueError, match=f"got 2 turns, {count} <image> in the first"):
            render(turns, "plain")
    with pytest.raises(ValueError, match="a prompt must end with a human turn"):
        tokenize_prompt(TWO_ROUNDS, demo, "mistral_instruct", 1)
    with pytest.raises(ValueError, match="tokenizer must be a fast one"):
        tokenize_conversation(TWO_ROUNDS, object(), "mistral_instruct", 1)
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1}, "<unk>"))
    without = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(ValueError, match="tokenizer must have a bos_token, got none"):
        tokenize_conversation(TWO_ROUNDS, without, "mistral_instruct", 1)
    without = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    with pytest.raises(ValueError, match="tokenizer must have <image> as one token"):
        tokenize_conversation(TWO_ROUNDS, without, "mistral_instruct", 1)
    ids, _ = tokenize_conversation(TWO_ROUNDS[2:], without, "vicuna_v1", 1)  # needed for pictures only
    assert ids[0] == 1
