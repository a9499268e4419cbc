"""Streams of pieces: what is given while an answer grows, and its end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumo_model.serving.replies import CANCELLED, CONTEXT, LENGTH, STOP, Reply, Stream
from cumo_model.serving.sampling import Sampling


def source(pieces, ended=None, finish=STOP):
    try:
        yield from pieces
        return finish, len(pieces), 5
    finally:
        if ended is not None:
            ended.append(True)


@given(
    st.lists(st.text("a #<|>\n", max_size=4), max_size=8), st.sampled_from(["", "###", "<|im_end|>", "</s>"])
)
def test_the_pieces_joined_are_the_answer(pieces, end):
    stream = Stream(source([*pieces, end]), end)
    said = "".join(pieces).strip()
    given = list(stream)
    assert "".join(given) == stream.reply.text and "" not in given
    assert stream.reply == Reply(said, STOP, len(pieces) + 1, 5)


def test_an_end_mark_in_pieces_is_not_shown():
    given = []
    for piece in (stream := Stream(source([" a", " red #", "x ", " ##", "#"]), "###")):
        given.append(piece)
    assert given == ["a", " red", " #x"] and stream.reply.text == "a red #x"


def test_a_stream_that_is_left_ends_its_source_and_has_what_was_given():
    ended = []
    with Stream(source(["one ", "two ", "three"], ended)) as stream:
        for piece in stream:
            if piece == " two":
                break
    assert ended == [True] and stream.reply == Reply("one two", CANCELLED)


def test_an_error_of_the_source_reaches_the_reader():
    def broken():
        yield "a"
        raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        Stream(broken()).read()


def test_a_cut_answer_says_so():
    assert Reply("a", STOP, 3).note is None and Reply("a", CANCELLED, 3).note is None
    assert "cut after 3 tokens, the longest asked for" in Reply("a", LENGTH, 3).note
    assert "context is full" in Reply("a", CONTEXT, 3).note


@pytest.mark.parametrize(
    "options, told",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an int of at least 1, got True"),
        ({"temperature": -0.1}, "temperature must be 0, or from 1e-06 to .*, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0, or from 1e-06 to .*, got nan"),
        ({"temperature": 1e-45}, "temperature must be 0, or from 1e-06 to .*, got 1e-45"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": "1"}, "top_p must be above 0 and at most 1, got '1'"),
        ({"seed": -1}, "seed must be None or an int from 0"),
    ],
)
def test_an_option_out_of_range_is_named(options, told):
    with pytest.raises(ValueError, match=told):
        Sampling(**options)


def test_an_endpoint_gets_the_same_options():
    assert Sampling(7).for_endpoint() == {"max_tokens": 7, "temperature": 0.0}
    full = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert Sampling(7, 0.5, 0.9, 3).for_endpoint() == full
