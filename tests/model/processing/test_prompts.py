"""One conversation gives the same ids whichever way it comes, and nothing of it is dropped in silence."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing import build_processor, load_tokenizer
from cumo_model.processing.conversation import (
    chat_template,
    render,
    template_of,
    tokenize_conversation,
    tokenize_prompt,
)
from cumo_model.processing.processor import image_seq_length
from cumo_model.processing.templates import TEMPLATES

INSTRUCT = [name for name, form in TEMPLATES.items() if form.instruct]
PICTURE = Image.new("RGB", (24, 24), "red")


@pytest.fixture(scope="module")
def tokenizers(mistral):
    return {
        "demo": train_tokenizer(["what is it?", "a red apple", "\nwhat colour?", "red"] * 20, 320),
        "mistral": mistral[0],
    }


texts = st.text(alphabet="ab é,\n", max_size=12)
parts = st.lists(st.one_of(st.none(), texts), min_size=1, max_size=5)  # None is a picture
talks = st.lists(st.tuples(parts, texts.filter(str.strip)), min_size=1, max_size=3)


def _value(parts: list[str | None]) -> str:
    """The text of a turn in a training record."""
    value = ""
    for part in parts:
        value += part if part is not None else "<image>" if value.replace("<image>\n", "") else "<image>\n"
    return value


def _message(parts: list[str | None], **picture) -> dict:
    content = [{"type": "text", "text": p} if p is not None else {"type": "image", **picture} for p in parts]
    return {"role": "user", "content": content}


@settings(max_examples=60, deadline=None)
@given(
    talk=talks,
    is_prompt=st.booleans(),
    template=st.sampled_from(INSTRUCT),
    kind=st.sampled_from(["demo", "mistral"]),
)
def test_every_way_gives_the_same_ids(tokenizers, talk, is_prompt, template, kind):
    assume(all(_value(asked).strip() for asked, _ in talk))
    tokenizer = tokenizers[kind]
    processor = build_processor(tokenizer, 24, 8, template=template)
    turns, messages, strings, pictures = [], [], [], []
    for asked, answer in talk:
        turns += [{"from": "human", "value": _value(asked)}, {"from": "gpt", "value": answer}]
        messages += [
            _message(asked, image=PICTURE),
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        strings += [{"role": "user", "content": _value(asked)}, {"role": "assistant", "content": answer}]
        pictures += [PICTURE] * asked.count(None)
    if is_prompt:
        turns, messages, strings = turns[:-1], messages[:-1], strings[:-1]
    tokenise = tokenize_prompt if is_prompt else tokenize_conversation
    wanted = tokenise(turns, tokenizer, template, image_seq_length(processor))
    wanted = wanted if is_prompt else wanted[0]

    def one_step(talks, **options):
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
        return processor.apply_chat_template(copy.deepcopy(talks), **options)

    got = {"one step": one_step(messages)}
    text = processor.apply_chat_template(copy.deepcopy(messages), tokenize=False)
    assert text == processor.apply_chat_template(strings, tokenize=False)
    assert text == tokenizer.bos_token + render(turns, template, tokenizer.bos_token, tokenizer.eos_token)[0]
    got["two steps"] = processor(text=text, images=pictures or None, return_tensors="pt")
    got["two steps, rows"] = processor(text=[text], images=[pictures], return_tensors="pt")
    if tokenizer("")["input_ids"]:  # it adds a BOS
        by_hand = text.removeprefix(tokenizer.bos_token)
        got["written by hand"] = processor(text=by_hand, images=pictures or None, return_tensors="pt")
    got["batch"] = one_step([messages, messages], processor_kwargs={"padding": True})
    if not pictures:
        got["strings"] = one_step(strings)
    for way, batch in got.items():
        assert torch.equal(batch["input_ids"][0], wanted), way
        assert ("pixel_values" in batch) == bool(pictures)
        if pictures:
            rows = 2 if way == "batch" else 1
            assert batch["pixel_values"].shape[0] == rows * len(pictures)


@pytest.mark.parametrize("template", INSTRUCT)
def test_pictures_keep_their_places_between_texts(tokenizers, template):
    processor = build_processor(tokenizers["demo"], 24, 8, template=template)
    picture = TEMPLATES[template].picture
    parts = [
        (["a ", None, " b ", None, " c"], "a <image> b <image> c"),
        ([None, None, "what?"], "<image>\n<image>\nwhat?"),
    ]
    parts += [
        ([None, "a", None, "b"], "<image>\na<image>b"),
        (["what is ", None, " it?"], "<image>\nwhat is  it?"),
    ]
    for pieces, value in parts:
        text = processor.apply_chat_template([_message(pieces)], tokenize=False)
        assert value.replace("<image>", picture) in text


def test_the_places_of_pictures_decide_their_order(tokenizers):
    processor = build_processor(tokenizers["demo"], 24, 8)
    red, blue = (Image.new("RGB", (24, 24), colour) for colour in ("red", "blue"))
    content = [
        {"type": "text", "text": "is "},
        {"type": "image", "image": blue},
        {"type": "text", "text": " or "},
    ]
    content += [{"type": "image", "image": red}, {"type": "text", "text": " red?"}]
    got = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    wanted = processor(images=[blue, red], text="<image><image>", return_tensors="pt")
    assert torch.equal(got["pixel_values"], wanted["pixel_values"])


def test_bos_is_added_where_it_is_missing(tokenizers):
    """C17 of the reports: a rendered text got one more BOS. Rows of one batch may differ."""
    tokenizer = tokenizers["demo"]
    bos = tokenizer.bos_token_id
    for template, starts in (("mistral_instruct", 2), ("vicuna_v1", 1)):
        processor = build_processor(tokenizer, 24, 8, template=template)
        text = processor.apply_chat_template([{"role": "user", "content": "what is it?"}], tokenize=False)
        assert text.startswith("<s>" * starts) and not text.startswith("<s>" * (starts + 1))
        wanted = processor(text=text)["input_ids"][0]
        assert wanted[: starts + 1].count(bos) == starts
        rows = [text, text.removeprefix("<s>"), "what is it?"]
        got = processor(text=rows)["input_ids"]
        assert got[0] == got[1] == wanted and got[2] == processor(text="what is it?")["input_ids"][0]
        assert got[2].count(bos) == 1
        more = processor(text=text, add_special_tokens=True)["input_ids"][0]  # what is asked for is done
        assert more == [bos, *wanted]
        more = processor(text=text, text_kwargs={"add_special_tokens": True})["input_ids"][0]
        assert more == [bos, *wanted]
        none = processor(text="what?", add_special_tokens=False)["input_ids"][0]
        assert bos not in none
    processor.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    text = processor.apply_chat_template([{"role": "user", "content": "what?"}], tokenize=False)
    assert processor(text=text)["input_ids"][0].count(bos) == 1


def test_a_template_that_is_given_or_chosen_gets_one_bos(tokenizers):
    tokenizer = tokenizers["demo"]
    custom = "{{ bos_token }}Q: {{ messages[0]['content'] }}"
    messages = [{"role": "user", "content": "what is it?"}]
    processor = build_processor(tokenizer, 24, 8)  # its own template writes two
    for chat in (custom, "other"):
        if chat == "other":
            processor.chat_template = {"default": processor.chat_template, "other": custom}
        one = processor.apply_chat_template(messages, chat_template=chat, tokenize=True)
        two = processor(text=processor.apply_chat_template(messages, chat_template=chat, tokenize=False))
        assert two["input_ids"] == list(one) and two["input_ids"][0].count(tokenizer.bos_token_id) == 1


def test_rows_with_and_without_bos_get_what_the_tokenizer_adds(tokenizers):
    """Also an EOS, to the rows that a chat template has not written."""
    tokenizer = copy.deepcopy(tokenizers["demo"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    processor = build_processor(tokenizer, 24, 8)
    text = processor.apply_chat_template([{"role": "user", "content": "what?"}], tokenize=False)
    alone = [processor(text=row)["input_ids"][0] for row in (text, "red")]
    assert processor(text=[text, "red"])["input_ids"] == alone
    assert alone[1][0] == bos and alone[1][-1] == eos and alone[0][-1] != eos


def _llama(tmp_path, **image):
    """A tokenizer that puts a space before the first text only, as Llama-2's with legacy=False."""
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        ["what is it? a b red"] * 9, BpeTrainer(vocab_size=120, special_tokens=special)
    )
    backend.add_special_tokens([AddedToken("<image>", special=True, **image)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@pytest.mark.parametrize("image", [{}, {"lstrip": True, "rstrip": True}])
def test_a_tokenizer_of_other_pieces_is_refused_or_changed_on_loading(tmp_path, image):
    tokenizer = _llama(tmp_path, **image)
    with pytest.raises(
        ValueError, match=r"tokenizer must give the text after <image> the ids that it has alone"
    ):
        build_processor(tokenizer, 24, 8)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    processor = build_processor(loaded, 24, 8, template="vicuna_v1")
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}]
    wanted = tokenize_prompt(turns, loaded, "vicuna_v1", image_seq_length(processor))
    got = processor.apply_chat_template(
        [_message([None, "what is it?"], image=PICTURE)], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(got["input_ids"][0], wanted)


@pytest.mark.parametrize(
    "message, told",
    [
        (
            {"content": "q", "images": [PICTURE]},
            "message 1 has images, which the chat template does not read",
        ),
        ({"content": "q", "image": PICTURE}, "has image"),
        ({"content": "q", "tool_calls": [{"id": 1}]}, "has tool_calls"),
        ({"content": [{"type": "text", "text": "q", "image": PICTURE}]}, "got image in a part of type text"),
        ({"content": [{"type": "image", "image": PICTURE, "text": "q"}]}, "got text in a part of type image"),
        (
            {"content": [{"type": "image", "image": [PICTURE, PICTURE]}]},
            "must have one picture .* got list of 2",
        ),
    ],
)
def test_what_a_message_has_beside_its_content_is_refused(tokenizers, message, told):
    processor = build_processor(tokenizers["demo"], 24, 8)
    with pytest.raises(ValueError, match=told):
        processor.apply_chat_template([{"role": "user", **message}], tokenize=True)
    harmless = {"role": "user", "content": "q", "name": "a", "images": [], "tool_calls": None}
    assert "q" in processor.apply_chat_template([harmless], tokenize=False)
    parts = [{"type": "image", "image": PICTURE, "text": None}, {"type": "text", "text": "q", "image": None}]
    filled = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False
    )  # by datasets
    assert "<image>\nq" in filled
    processor.chat_template = "{{ messages[0]['tool_calls'] }}"
    asked = [{"role": "user", "content": "q", "tool_calls": ["x"]}]
    assert "x" in processor.apply_chat_template(asked, tokenize=False)


def test_lists_that_mix_pictures_and_rows_and_no_text_are_refused(tokenizers):
    processor = build_processor(tokenizers["demo"], 24, 8)
    with pytest.raises(
        ValueError, match="images must be pictures, or a list of pictures for each row of text"
    ):
        processor(text=["<image>", "<image>"], images=[[PICTURE], PICTURE])
    with pytest.raises(ValueError, match="text must be a text or a list with at least one"):
        processor(text=[])


@pytest.mark.parametrize(
    "images, told",
    [
        ([[PICTURE, PICTURE], [PICTURE]], r"images must have \[1, 2\] pictures in the rows, .* got \[2, 1\]"),
        ([[PICTURE], [PICTURE]], "for each of the 3 <image> in text, got 2"),
        ([[], [PICTURE, PICTURE, PICTURE]], r"got \[0, 3\]"),
        ([[PICTURE, PICTURE, PICTURE]], r"got \[3\]"),
    ],
)
def test_pictures_in_rows_must_fit_their_rows(tokenizers, images, told):
    """C19 of the reports: they went to the markers of other rows."""
    processor = build_processor(tokenizers["demo"], 24, 8)
    rows = ["<image> what?", "<image><image> this?"]
    with pytest.raises(ValueError, match=told):
        processor(text=rows, images=images, padding=True)
    fitting = processor(text=rows, images=[[PICTURE], [PICTURE] * 2], padding=True, return_tensors="pt")
    flat = processor(text=rows, images=[PICTURE] * 3, padding=True, return_tensors="pt")
    assert torch.equal(fitting["pixel_values"], flat["pixel_values"])


@pytest.mark.parametrize("text", ["what is it?", ["what?", "this?"], ""])
def test_pictures_without_markers_are_refused(tokenizers, text):
    processor = build_processor(tokenizers["demo"], 24, 8)
    with pytest.raises(
        ValueError, match="images must have one picture for each of the 0 <image> in text, got 1"
    ):
        processor(text=text, images=PICTURE)


@pytest.mark.parametrize("name", ["videos", "audio"])
def test_other_media_are_refused(tokenizers, name):
    processor = build_processor(tokenizers["demo"], 24, 8)
    with pytest.raises(
        ValueError, match=f"{name} must be None, the model takes pictures only, got list of 1"
    ):
        processor(text="what?", **{name: [torch.zeros(3, 3, 4, 4)]})


@pytest.mark.parametrize(
    "content, told",
    [
        (
            [{"type": "video", "video": "a.mp4"}],
            "message 1 must have parts of type text or image, got 'video'",
        ),
        ([{"type": "audio", "audio": "a.wav"}], "got 'audio'"),
        ([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}], "got 'input_text'"),
        ([{"text": "a"}], "must have parts of type text or image, got keys text"),
        (["what?"], "got str"),
        ([{"type": "text"}], "must have text in a part of type text, got keys type"),
        ([{"type": "text", "text": None}], "must have text"),
        ([{"type": "image"}], "must have one of image, url, path, base64 in a part of type image, got none"),
        ([{"type": "image", "image": None}], "got none"),
        ([{"type": "image", "path": "a.png", "url": "b.png"}], "got url and path"),
        ([{"type": "image_url", "image_url": ""}], "must have image_url"),
        (None, "message 1 must have a role and content, text or a list of parts, got keys role, content"),
        (3, "must have a role and content"),
    ],
)
def test_parts_that_would_be_dropped_are_refused(tokenizers, content, told):
    processor = build_processor(tokenizers["demo"], 24, 8)
    messages = [{"role": "user", "content": content}]
    for talks in (messages, [messages]):
        with pytest.raises(ValueError, match=told):
            processor.apply_chat_template(talks, tokenize=True, return_dict=True)


@pytest.mark.parametrize("talks", [[], [[]], None, "hi"])
def test_no_messages_are_refused(tokenizers, talks):
    processor = build_processor(tokenizers["demo"], 24, 8)
    with pytest.raises(ValueError, match="conversation must be a non-empty list of messages"):
        processor.apply_chat_template(talks, tokenize=False)


def test_tools_are_refused_where_the_template_has_none(tokenizers):
    processor = build_processor(tokenizers["demo"], 24, 8)
    messages = [{"role": "user", "content": "hi"}]
    for name in ("tools", "documents"):
        with pytest.raises(
            ValueError, match=f"{name} must be None, the chat template does not use them, got 1"
        ):
            processor.apply_chat_template(messages, tokenize=False, **{name: [{"title": "a", "text": "b"}]})
    processor.chat_template = "{{ documents[0]['text'] }}"
    given = [{"title": "a", "text": "b"}]
    assert processor.apply_chat_template(messages, tokenize=False, documents=given) == "b"


@pytest.mark.parametrize("template", INSTRUCT)
@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_the_user_has_pictures(tokenizers, template, role):
    processor = build_processor(tokenizers["demo"], 24, 8, template=template)
    for content in ("<image>", [{"type": "text", "text": "a"}, {"type": "image", "image": PICTURE}]):
        messages = [{"role": role, "content": content}, {"role": "user", "content": "hi"}]
        if role == "assistant":
            messages.reverse()
        with pytest.raises(
            TemplateError, match=f"only messages of the user may have images, got one of {role}"
        ):
            processor.apply_chat_template(messages, tokenize=False)


def test_image_url_parts_are_pictures(tokenizers, tmp_path):
    processor = build_processor(tokenizers["demo"], 24, 8)
    PICTURE.save(tmp_path / "a.png")
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    path = str(tmp_path / "a.png")
    for part in ({"image_url": {"url": path}}, {"image_url": path}):
        content = [{"type": "image_url", **part}, {"type": "text", "text": "what?"}]
        got = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        wanted = processor.apply_chat_template([_message([None, "what?"], image=PICTURE)], **options)
        assert torch.equal(got["input_ids"], wanted["input_ids"])
        assert torch.equal(got["pixel_values"], wanted["pixel_values"])


def test_templates_are_recognised_by_what_they_write():
    for name in TEMPLATES:
        assert template_of(chat_template(name), tuple(TEMPLATES)) == name
        older = chat_template(name).replace("{% generation %}", "").replace("{% endgeneration %}", "")
        assert template_of(older, tuple(TEMPLATES)) == name
    assert template_of("{{ messages[0]['content'] }}", tuple(TEMPLATES)) is None
    assert template_of("{{ broken", tuple(TEMPLATES)) is None
    assert template_of(None, tuple(TEMPLATES)) is None
