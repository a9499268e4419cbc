"""All templates compared with literal texts and SentencePiece's ids; « » mark what the loss covers."""

import re

import pytest
import torch
from PIL import Image

from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.conversation import (
    IGNORE_INDEX,
    chat_template,
    render,
    template_of,
    tokenize_conversation,
    tokenize_conversations,
    tokenize_prompt,
)
from cumo_model.processing.processor import build_processor
from cumo_model.processing.templates import ALIASES, TEMPLATES, get_template
from tests.model.processing.test_conversation import TWO_ROUNDS

USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)
TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language.The visual content will be provided with the following format: <Image>visual "
    "content</Image>."
)
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
LLAMA = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest "
    "answers."
)
BY_HAND = {
    "mistral_instruct": (
        "<s>[INST] <image>\nWhat is it? [/INST]« a red apple </s>»[INST] Which colour? [/INST]« red </s>»"
    ),
    "mistral_instruct_system": (
        f"<s>[INST] <<SYS>>\n{USER}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]« a red apple </s>»"
        "[INST] Which colour? [/INST]« red </s>»"
    ),
    "llama_2": (
        f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]« a red apple </s>»"
        "<s>[INST] Which colour? [/INST]« red </s>»"
    ),
    "llava_llama_2": (
        f"[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]« a red apple </s>»"
        "<s>[INST] Which colour? [/INST]« red </s>»"
    ),
    "vicuna_v1": (
        f"{USER} USER: <image>\nWhat is it? ASSISTANT:« a red apple</s>»"
        "USER: Which colour? ASSISTANT:« red</s>»"
    ),
    "llava_v1": (
        f"{HUMAN} USER: <image>\nWhat is it? ASSISTANT:« a red apple</s>»"
        "USER: Which colour? ASSISTANT:« red</s>»"
    ),
    "llava_v1_mmtag": (
        f"{TAGGED} USER: <Image><image></Image>\nWhat is it? ASSISTANT:« a red apple</s>»"
        "USER: Which colour? ASSISTANT:« red</s>»"
    ),
    "llava_v0": (
        f"{HUMAN}###Human: <image>\nWhat is it?###Assistant:« a red apple###»"
        "Human: Which colour?###Assistant:« red###»"
    ),
    "llava_v0_mmtag": (
        f"{TAGGED}###Human: <Image><image></Image>\nWhat is it?###Assistant:« a red apple###»"
        "Human: Which colour?###Assistant:« red###»"
    ),
    "mpt": (
        f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\n«a red apple<|im_end|>»<|im_start|>user\nWhich colour?<|im_end|>"
        "<|im_start|>assistant\n«red<|im_end|>»"
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\n«a red apple<|im_end|>»<|im_start|>user\nWhich colour?<|im_end|>"
        "<|im_start|>assistant\n«red<|im_end|>»"
    ),
}
IMAGE_TOKENS = 3


@pytest.fixture(scope="module")
def demo():
    return train_tokenizer(["what is it?", "a red apple", "which colour?", "red", "<|im_end|>"] * 20, 340)


def test_every_template_is_written_out_here():
    assert set(BY_HAND) | {"plain"} == set(TEMPLATES)
    others = {  # of LLaVA's conv_templates
        "v0": "llava_v0",
        "vicuna_v0": "llava_v0",
        "v0_mmtag": "llava_v0_mmtag",
        "v0_plain": "plain",
        "v1": "vicuna_v1",
        "v1_mmtag": "llava_v1_mmtag",
        "mistral_direct": "chatml_direct",
    }
    assert others == ALIASES
    assert all(get_template(alias) is TEMPLATES[name] for alias, name in others.items())
    assert all(get_template(name) is form and form.name == name for name, form in TEMPLATES.items())


@pytest.mark.parametrize("name", BY_HAND)
def test_text_and_what_the_loss_sees(name):
    text, spans = render(TWO_ROUNDS, name)
    assert text == re.sub("[«»]", "", BY_HAND[name])
    assert [text[start:end] for start, end in spans] == re.findall("«(.*?)»", BY_HAND[name], flags=re.DOTALL)


@pytest.mark.parametrize("name", BY_HAND)
def test_ids_and_labels_are_sentencepieces(mistral, name):
    """BOS, then each text between special tokens and markers as SentencePiece encodes it separately."""
    tokenizer, pieces = mistral
    image, special = tokenizer.convert_tokens_to_ids("<image>"), {"<s>": 1, "</s>": 2}
    ids, labels, seen = [1], [IGNORE_INDEX], False
    for stretch in re.split("(<s>|</s>|<image>)", BY_HAND[name]):
        clean = re.sub("[«»]", "", stretch)
        if clean in special:
            ids.append(special[clean])
            labels.append(ids[-1] if seen else IGNORE_INDEX)
        elif clean == "<image>":
            ids += [image] * IMAGE_TOKENS
            labels += [IGNORE_INDEX] * IMAGE_TOKENS
        elif clean:
            marks = [m.start() - n for n, m in enumerate(re.finditer("[«»]", stretch))]
            sees = [seen ^ (sum(mark <= place for mark in marks) % 2 == 1) for place in range(len(clean))]
            for piece in pieces.encode(clean, return_type="proto").pieces:
                # whole tokens only; the space that SentencePiece adds before a text has no width
                inside = piece.end > piece.begin and all(sees[piece.begin : piece.end])
                ids.append(piece.id)
                labels.append(piece.id if inside else IGNORE_INDEX)
        seen ^= len(re.findall("[«»]", stretch)) % 2 == 1
    found_ids, found_labels = tokenize_conversation(TWO_ROUNDS, tokenizer, name, IMAGE_TOKENS)
    assert found_ids.tolist() == ids
    assert found_labels.tolist() == labels


BLANKS = [
    "safe.  Your",
    "  two before",
    "a   b",
    " [/INST]",
    "def f():\n    return  1",
    "a\n\n  b",
    "\tx",
    "é  日本",
]


def test_blanks_are_sentencepieces(mistral):
    tokenizer, pieces = mistral
    for text in BLANKS:
        assert tokenizer.encode(text, add_special_tokens=False) == pieces.encode(text), text


def test_a_picture_alone_keeps_both_blanks(mistral):
    """Two ids, as with LLaVA's slow tokenizer: the prefix space of the text and the space before [/INST]."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}]
    tokenizer, _ = mistral
    ids, _ = tokenize_conversation(turns, tokenizer, "mistral_instruct", 1)
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    assert tokens[-10:] == ["<image>", "▁", "▁[", "/", "INST", "]", "▁a", "▁cat", "▁", "</s>"]


@pytest.mark.parametrize("name", [*BY_HAND, "plain"])
def test_a_prompt_is_the_beginning_of_its_conversation(demo, name):
    turns = TWO_ROUNDS[:2]
    ids, labels = tokenize_conversation(turns, demo, name, IMAGE_TOKENS)
    prompt = tokenize_prompt(turns[:1], demo, name, IMAGE_TOKENS)
    assert torch.equal(prompt, ids[: len(prompt)])
    assert (labels[: len(prompt)] == IGNORE_INDEX).all()
    assert (labels[len(prompt) :] == ids[len(prompt) :]).all() and len(prompt) < len(ids)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_chat_template_gives_the_same_ids(mistral, name):
    tokenizer, _ = mistral
    processor = build_processor(tokenizer, 12, 4, template=name)
    question = TWO_ROUNDS[0]["value"].replace("<image>", "").strip()
    picture = {"type": "image", "image": Image.new("RGB", (9, 9))}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": question}]},
        {"role": "assistant", "content": "a red apple"},
        {"role": "user", "content": "Which colour?"},
    ]
    got = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(got["input_ids"][0], tokenize_prompt(TWO_ROUNDS[:3], tokenizer, name, 9))
    messages.append({"role": "assistant", "content": "red"})
    got = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(got["input_ids"][0], tokenize_conversation(TWO_ROUNDS, tokenizer, name, 9)[0])


def chats(name: str, with_picture: bool):
    """TWO_ROUNDS, or its caption for plain, with or without a picture, as turns and as messages."""
    turns = [dict(turn) for turn in TWO_ROUNDS[: 2 if name == "plain" else 4]]
    question = turns[0]["value"].replace("<image>", "").strip()
    picture = [{"type": "image", "image": Image.new("RGB", (9, 9))}] * with_picture
    if not with_picture:
        turns[0]["value"] = question
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    messages[0]["content"] = [*picture, {"type": "text", "text": question}]
    return turns, messages


MASKED = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}


@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize("kind", ["mistral", "demo"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_of_the_answers_selects_the_tokens_with_labels(request, kind, name, with_picture):
    if name == "plain" and not with_picture:
        pytest.skip("a caption has a picture")
    tokenizer = request.getfixturevalue(kind)
    tokenizer = tokenizer[0] if kind == "mistral" else tokenizer
    turns, messages = chats(name, with_picture)
    processor = build_processor(tokenizer, 12, 4, template=name)
    got = processor.apply_chat_template(messages, **MASKED)
    ids, labels = tokenize_conversation(turns, tokenizer, name, 9)
    assert torch.equal(got["input_ids"][0], ids)
    assert got["assistant_masks"][0].tolist() == (labels != IGNORE_INDEX).int().tolist()


def test_masks_of_a_padded_batch_are_those_of_its_rows(demo):
    """Padding on either side, pictures of several sizes, other arguments of the call."""
    options = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[12, 24], [24, 24]]}
    processor = build_processor(
        demo, 12, 4, template="vicuna_v1", patch_merge_type="spatial_unpad", **options
    )
    with_picture, without = chats("vicuna_v1", True)[1], chats("vicuna_v1", False)[1]
    wide = chats("vicuna_v1", True)[1]
    wide[0]["content"][0] = {"type": "image", "image": Image.new("RGB", (40, 9))}
    rows = [without[:2], wide, with_picture]
    for side in ("left", "right"):
        padding = {"padding": True, "padding_side": side}
        got = processor.apply_chat_template(rows, processor_kwargs=dict(padding), **MASKED)
        again = processor.apply_chat_template(rows, **MASKED, **padding)  # as older code passes them
        assert torch.equal(got["assistant_masks"], again["assistant_masks"])
        assert got["assistant_masks"].shape == got["input_ids"].shape
        for messages, mask, ids in zip(rows, got["assistant_masks"], got["input_ids"], strict=True):
            alone = processor.apply_chat_template(messages, **MASKED)
            wanted = alone["input_ids"][0][alone["assistant_masks"][0].bool()]
            assert len(wanted) and torch.equal(ids[mask.bool()], wanted)
    plain = processor.apply_chat_template(rows[:1], None, None, None, True, tokenize=True, return_dict=True)
    assert "assistant_masks" not in plain
    with pytest.raises(ValueError, match="continue_final_message is not compatible"):
        processor.apply_chat_template(without, continue_final_message=True, **MASKED)


def test_a_chat_template_without_marks_is_recognised():
    """As processors of earlier versions have it."""
    saved = chat_template("mpt").replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert saved != chat_template("mpt") and template_of(saved, tuple(TEMPLATES)) == "mpt"
    assert template_of(chat_template("llama_2"), tuple(TEMPLATES)) == "llama_2"
    assert template_of("{{ messages }}", tuple(TEMPLATES)) is template_of(None, tuple(TEMPLATES)) is None


def test_a_system_message_takes_the_place_of_the_system_text(demo):
    processor = build_processor(demo, 12, 4, template="vicuna_v1")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == "<s>be brief USER: hi ASSISTANT:"
    assert "be brief" not in chat_template("vicuna_v1")


@pytest.mark.parametrize(
    "name, mark",
    [
        ("vicuna_v1", " ASSISTANT: "),
        ("vicuna_v1", "</s>"),
        ("llava_v0", "###"),
        ("mpt", "<|im_end|>"),
        ("mpt", "<|im_start|>"),
        ("llama_2", "</s>"),
        ("llama_2", "[/INST]"),
    ],
)
def test_reserved_markers_mask_the_whole_conversation(demo, name, mark):
    turns = [dict(turn) for turn in TWO_ROUNDS]
    turns[1]["value"] += mark
    with pytest.warns(UserWarning, match="none of its labels are used"):
        _, labels = tokenize_conversation(turns, demo, name, 1)
    assert (labels == IGNORE_INDEX).all()
    plain = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a cat{mark}"}]
    assert (tokenize_conversations([plain], demo, "plain", 1)[0][1] != IGNORE_INDEX).any()


def test_own_tokens_of_another_tokenizer_are_written():
    text, spans = render(TWO_ROUNDS[2:], "mistral_instruct", "<bos>", "<eos>")
    assert text == "<bos>[INST] Which colour? [/INST] red <eos>"
    assert [text[start:end] for start, end in spans] == [" red <eos>"]


def test_several_pictures_of_a_turn_stay_where_they_are(demo):
    turns = [
        {"from": "human", "value": "is <image> like <image>?"},
        {"from": "gpt", "value": "no"},
        {"from": "human", "value": "and this?<image>"},
        {"from": "gpt", "value": "yes"},
    ]
    text, _ = render(turns, "mistral_instruct")
    assert text == (
        "<s>[INST] is <image> like <image>? [/INST] no </s>[INST] <image>\nand this? [/INST] yes </s>"
    )
    ids, _ = tokenize_conversation(turns, demo, "mistral_instruct", 4)
    assert (ids == demo.convert_tokens_to_ids("<image>")).sum() == 12
    tagged, _ = render(turns, "llava_v1_mmtag")
    assert "USER: is <Image><image></Image> like <Image><image></Image>? " in tagged
