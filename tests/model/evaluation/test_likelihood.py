"""Log-probabilities of given answers, compared with one token after the other."""

import re

import pytest
import torch
from PIL import Image

from cumo_model.evaluation.likelihood import log_likelihoods
from cumo_model.serving.local import Local, load
from cumo_model.serving.messages import user_message
from cumo_model.serving.sampling import Sampling
from tests.model.serving.conftest import write_checkpoint
from tests.rounding import assert_same_formula, in_fp64

RED, BLUE = (Image.new("RGB", (20, 14), colour) for colour in ("red", "blue"))
TALKS = (
    [user_message("what is it?", [RED])],
    [user_message("what is it?", [BLUE])],
    [user_message("two pears or the blue door near some old house")],
    [{"role": "system", "content": "red or blue"}, user_message("which", [BLUE, RED])],
    [user_message("what", [RED]), {"role": "assistant", "content": "a door"}, user_message("old?")],
)
ANSWERS = ("a red apple", "green pears", " the old house near some door ", "it", "two")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from tests.model.conftest import tiny_config

    make = tiny_config.__wrapped__() if hasattr(tiny_config, "__wrapped__") else tiny_config
    folder = write_checkpoint(tmp_path_factory.mktemp("likely") / "model", make, positions=256, std=0.3)
    return Local(*load(folder, device="cpu", dtype=torch.float64))


@torch.no_grad()
def one_by_one(engine, talk, answer: str) -> tuple[float, bool, int]:
    """Sum of log-probabilities, whether each token is the best, and how many there are."""
    inputs = dict(engine.inputs(talk))
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    total, is_greedy = 0.0, True
    ids = engine.processor.tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]
    for token in ids:
        scores = engine.model(**inputs).logits[0, -1]
        scores[engine.processor.image_token_id] = -torch.inf
        total += scores.log_softmax(-1)[token].item()
        is_greedy &= scores.argmax().item() == token
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return total, is_greedy, len(ids)


def test_a_batch_has_the_probabilities_of_one_token_after_the_other(engine):
    with in_fp64():
        found = log_likelihoods(engine, TALKS, ANSWERS)
        wanted = [one_by_one(engine, talk, answer) for talk, answer in zip(TALKS, ANSWERS, strict=True)]
    assert len({length for *_, length in wanted}) > 2, "answers of several lengths"
    assert_same_formula([value for value, _ in found], [value for value, *_ in wanted])
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy, _ in wanted]
    assert found[0][0] != found[1][0]


def test_the_greedy_answer_is_told(engine, monkeypatch):
    """Where only whole words have a score, the text of a generated answer has the tokens of the answer."""
    head, tokenizer = engine.model.lm_head, engine.processor.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    is_word = torch.tensor([re.fullmatch("\u0120[a-z]{2,}", token) is not None for token in tokens])
    monkeypatch.setattr(head, "weight", torch.nn.Parameter(head.weight * is_word[:, None]))
    (reply,) = engine.answers([TALKS[1]], Sampling(3))
    other = " ".join([*reply.text.split()[:-1], "door"])
    assert len(reply.text.split()) == 3 and other != reply.text
    found = log_likelihoods(engine, [TALKS[1]] * 2, [reply.text, other])
    assert [is_greedy for _, is_greedy in found] == [True, False] and found[0][0] > found[1][0]


def test_nothing_gives_nothing(engine):
    assert log_likelihoods(engine, [], []) == []


@pytest.mark.parametrize(
    "talk, answer, message",
    [
        (TALKS[0], " ", "conversation 2: the answer must not be empty"),
        (
            TALKS[0],
            "a " * 300,
            "conversation 2: the conversation with its answer must have at most 256 tokens",
        ),
        (
            [user_message("old " * 300)],
            "a",
            "conversation 2: the conversation must have fewer than 256 tokens",
        ),
        ([user_message(" ")], "a", "conversation 2: the question must not be empty"),
    ],
)
def test_what_cannot_be_asked_is_named(engine, talk, answer, message):
    with pytest.raises(ValueError, match=message):
        log_likelihoods(engine, [TALKS[2], talk], ["a", answer])
