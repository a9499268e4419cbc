"""What tasks of lmms-eval ask for; the model class itself is tested in tests/lmms."""

import subprocess
import sys

import pytest
from PIL import Image

from cumo_model.evaluation.lmms.requests import (
    NEW_TOKENS,
    MediaError,
    Wanted,
    conversation,
    from_messages,
    halved,
    in_batches,
    wanted,
)
from cumo_model.serving.sampling import Sampling

RED, BLUE = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))


@pytest.mark.parametrize(
    "options, sampling",
    [
        ({}, Sampling(NEW_TOKENS)),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False},
            Sampling(16),
        ),
        ({"temperature": 0.7, "do_sample": False}, Sampling(NEW_TOKENS)),
        ({"temperature": 0.7}, Sampling(NEW_TOKENS, 0.7)),
        ({"temperature": 0.7, "top_p": 0.9, "do_sample": True, "top_k": 0}, Sampling(NEW_TOKENS, 0.7, 0.9)),
        ({"do_sample": True}, Sampling(NEW_TOKENS, 1.0)),
        ({"do_sample": True, "temperature": 0}, Sampling(NEW_TOKENS)),
        ({"do_sample": True, "top_k": 1}, Sampling(NEW_TOKENS)),
        ({"top_p": None, "temperature": 0.5, "top_k": -1, "num_beams": None}, Sampling(NEW_TOKENS, 0.5)),
    ],
)
def test_sampling_of_a_task(options, sampling):
    assert wanted(options) == Wanted(sampling)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 5}, "num_beams must be 1 .* got 5: give --gen_kwargs num_beams=1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty must be 1 .* got 1.2"),
        ({"do_sample": True, "top_k": 50}, "top_k must be 0 or 1 .* got 50"),
        ({"temperature": 0.5, "top_p": 0}, "top_p must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1"),
        ({"until": 7}, "until must be a text or a list of texts, got 7"),
        ({"until": ["\n", None]}, "until must be a text or a list of texts"),
    ],
)
def test_what_changes_answers_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        wanted(options)


def test_an_answer_ends_before_the_first_of_several_texts():
    found = wanted({"until": ["\n\n", "", "ASSISTANT:"], "image_aspect_ratio": "original", "seed": 0})
    assert found.unused == ("image_aspect_ratio", "seed")
    assert found.cut("a dog ASSISTANT: no\n\nmore") == "a dog"
    assert found.cut("a dog \n\nASSISTANT:") == "a dog"
    assert found.cut("a dog\nand a cat") == "a dog\nand a cat"
    assert wanted({"until": "x"}).cut("axb") == "a" and wanted({}).cut("axb") == "axb"


def parts(message) -> list:
    """Texts, and the colours of pictures."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    return [part["text"] if part["type"] == "text" else part["image"].getpixel((0, 0)) for part in content]


@pytest.mark.parametrize(
    "text, visuals, wanted_parts",
    [
        ("what?", None, ["what?"]),
        ("what?", [RED], [(255, 0, 0), "what?"]),
        ("what? <image>", [RED], [(255, 0, 0), "what?"]),
        ("of <image> and <image>", [RED, BLUE], ["of ", (255, 0, 0), " and ", (0, 0, 255)]),
        ("which?", [BLUE, RED], [(0, 0, 255), (255, 0, 0), "which?"]),
    ],
)
def test_texts_and_messages_become_the_same_conversation(text, visuals, wanted_parts):
    given = [{"role": "user", "content": [{"type": "image", "url": v} for v in visuals or ()]}]
    given[0]["content"].append({"type": "text", "text": text})
    for talk in (conversation(text, visuals, "be brief"), from_messages(given, "be brief")):
        assert talk[0] == {"role": "system", "content": "be brief"} and len(talk) == 2
        assert talk[1]["role"] == "user" and parts(talk[1]) == wanted_parts
    assert len(conversation(text, visuals)) == 1


def test_messages_keep_turns_and_their_system_text():
    given = [
        {"role": "system", "content": [{"type": "text", "text": "you see"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "url": RED}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
    ]
    talk = from_messages(given, "be brief")
    assert [message["role"] for message in talk] == ["system", "user", "assistant", "user"]
    assert [parts(message) for message in talk] == [["you see"], ["a", (255, 0, 0)], ["b"], ["cd"]]


def test_pictures_are_read_from_files(tmp_path):
    RED.save(tmp_path / "red.png")
    (talk,) = conversation("what?", [str(tmp_path / "red.png")])
    assert parts(talk) == [(255, 0, 0), "what?"]
    with pytest.raises(ValueError, match=r"blue\.png"):
        conversation("what?", [str(tmp_path / "blue.png")])


@pytest.mark.parametrize("visual", ["film.mp4", "film", {"array": [0.0]}, {"type": "video"}, [RED], 7])
def test_other_media_are_refused(visual):
    with pytest.raises(MediaError, match="pictures are what CuMo takes, got"):
        conversation("what?", [visual])
    with pytest.raises(MediaError, match="pictures are what CuMo takes, got"):
        from_messages([{"role": "user", "content": [{"type": "image", "url": visual}]}])


def test_a_part_that_is_a_video_is_refused():
    with pytest.raises(MediaError, match="got video"):
        from_messages([{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}])


def test_markers_without_their_pictures_are_named():
    with pytest.raises(ValueError, match="one <image> for each of its 2 pictures, or none, got 1"):
        conversation("of <image>", [RED, BLUE])
    with pytest.raises(ValueError, match="question must be text, got int"):
        conversation(3, None)


def test_batches_hold_one_group_and_the_longest_first():
    found = in_batches([1, 5, 3, 5, 2], ["a", "b", "a", "a", "b"], 2)
    assert found == [[1, 4], [3, 2], [0]]
    assert in_batches([], [], 4) == []


def test_a_batch_is_halved_until_the_reason_is_found():
    calls = []

    def double(items):
        calls.append(list(items))
        if 3 in items:
            raise ValueError("conversation 1: three\nis too much")
        if len(items) > 2:
            raise MemoryError
        return [2 * item for item in items]

    assert halved(double, [0, 1, 2, 3, 4], (KeyError,)) == [0, 2, 4, "three is too much", 8]
    assert calls[0] == [0, 1, 2, 3, 4] and len(calls) < 12
    with pytest.raises(ValueError, match="three"):
        halved(double, [3], (ValueError,))


def test_the_entry_point_needs_no_torch():
    """It is loaded by each command of lmms-eval, also where no model is asked for."""
    code = "from cumo_model.evaluation.lmms.plugin import CLASSES\n"
    code += "import sys; print('torch' in sys.modules, CLASSES)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "cumo_model.evaluation.lmms.model"]
