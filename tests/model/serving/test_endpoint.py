"""Answers of a server: the client's side of the wire. tests/serve asks vLLM itself."""

import base64
import io
import socket
import sys
import threading
import time

import pytest
from PIL import Image

pytest.importorskip("openai")

from cumo_model.serving.endpoint import Endpoint
from cumo_model.serving.engines import open_engine
from cumo_model.serving.messages import user_message
from cumo_model.serving.replies import CANCELLED, CONTEXT, LENGTH
from cumo_model.serving.sampling import Sampling
from tests.model.serving.endpoint_server import serving, silent
from tests.model.serving.test_local import RED, TALKS


@pytest.fixture
def server(talker):
    with serving(talker) as server:
        yield server


def test_answers_are_those_of_the_served_model(server, talker):
    engine, talks = Endpoint(server.url), list(TALKS.values())
    wanted = [talker.stream(talk, Sampling(9)).read() for talk in talks]
    assert [engine.stream(talk, Sampling(9)).read() for talk in talks] == wanted
    assert engine.answers(talks, Sampling(9)) == wanted
    assert wanted[0].finish == LENGTH and engine.name == "tiny"


def test_the_request_has_the_options_and_the_pixels_of_the_picture(server):
    engine = open_engine(endpoint=server.url)
    picture = Image.new("RGB", (5, 3), (1, 2, 3))
    engine.stream([user_message("what is it?", [picture])], Sampling(4, 0.5, 0.9, 3)).read()
    (asked,) = server.asked
    assert {key: asked[key] for key in ("model", "max_tokens", "temperature", "top_p", "seed")} == {
        "model": "tiny", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "seed": 3,
    }  # fmt: skip
    kind, data = asked["messages"][0]["content"][0]["image_url"]["url"].split(",")
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;base64" and sent.tobytes() == picture.tobytes()


def test_a_reader_who_leaves_closes_the_connection(server, talker):
    talker.model.generation_config.eos_token_id = None
    with Endpoint(server.url).stream(TALKS["a picture"], Sampling(490)) as pieces:
        next(iter(pieces))
    assert server.left.wait(20)


def test_what_the_server_refuses_is_told(server):
    with pytest.raises(ValueError, match=r"refuses it \(400\): the conversation must have fewer than 512"):
        Endpoint(server.url).stream([user_message("a red apple " * 400)]).read()
    with pytest.raises(ValueError, match=r"conversation 2: .*must not be empty"):
        Endpoint(server.url).answers([TALKS["a picture"], [user_message("")]])
    with pytest.raises(ValueError, match=r"model must be one of endpoint http.*, tiny, got 'large'"):
        Endpoint(server.url, "large")
    assert len(server.asked) == 2  # the second time without a length


def test_a_server_that_is_not_there_is_told(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match=f"endpoint {url} cannot be asked: Connection error"):
        Endpoint(url)
    with pytest.raises(ValueError, match="endpoint must be an address such as"):
        Endpoint("localhost:8000")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"needs the package openai: pip install 'cumo\[endpoint\]'"):
        Endpoint(url)


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, "exactly one of a checkpoint and an endpoint must be given, got neither"),
        ({"checkpoint": "a", "endpoint": "http://b"}, "must be given, got both"),
        ({"endpoint": "http://b", "device": "cpu"}, "device must be None with an endpoint"),
        ({"checkpoint": "a", "dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"checkpoint": "a", "template": "plain"}, "template must be an instruct template, got 'plain'"),
    ],
)
def test_options_of_engines_that_do_not_fit_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        open_engine(**options)


def test_a_picture_that_is_none_is_named_before_it_is_sent(server, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"note.png' is not a picture"):
        Endpoint(server.url).stream([user_message("what?", [tmp_path / "note.png", RED])]).read()
    assert not server.asked


def test_an_answer_ends_where_the_context_of_the_server_is_full(server, talker):
    """As vLLM, this server refuses a length that has no room, and takes what room there is without one."""
    server.positions = 512
    talker.model.generation_config.eos_token_id = None
    talk = TALKS["two turns"]
    reply = Endpoint(server.url).stream(talk, Sampling(600)).read()
    assert reply == talker.stream(talk, Sampling(600)).read() and reply.finish == CONTEXT
    with pytest.raises(ValueError, match="the conversation must have fewer than 512"):
        Endpoint(server.url).stream([user_message("a red apple " * 400)], Sampling(600)).read()


WRONG = {  # what a server sends for the list of models, and for an answer -> the error
    "a page": ("<html>", None, "does not have OpenAI's interface"),
    "a list": ("[1, 2]", None, "does not have OpenAI's interface"),
    "no list": ('{"data": null}', None, "does not have OpenAI's interface"),
    "no models": ('{"data": []}', None, "must list a model, got none"),
    "no stream": (None, '{"choices": [{"message": {"content": "a"}}]}', "has not sent a complete answer"),
    "no choices": (None, 'data: {"id": "a"}\n\n', "has not sent a complete answer"),
    "no delta": (None, 'data: {"choices": [{"index": 0}]}\n\n', "OpenAI's interface|a complete answer"),
    "torn": (None, 'data: {"choices": [{"ind\n\n', "endpoint http.* (cannot be asked|does not have)"),
    "half": (None, 'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n', "a complete answer"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_server_with_another_interface_is_named(server, kind, monkeypatch):
    models, answer, told = WRONG[kind]

    def send(self, content):
        self.send_response(200)
        kind = "text/event-stream" if self.command == "POST" else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    handler = server.RequestHandlerClass
    for method, content in (("do_GET", models), ("do_POST", answer)):
        if content is not None:
            monkeypatch.setattr(handler, method, lambda self, content=content: send(self, content))
    with pytest.raises(ValueError, match=told):
        Endpoint(server.url).stream(TALKS["a picture"]).read()


def test_the_servers_own_reason_for_an_end_is_told(server, monkeypatch):
    chunk = '{"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "content_filter"}]}'

    def answer(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"data: {chunk}\n\ndata: [DONE]\n\n".encode())

    monkeypatch.setattr(server.RequestHandlerClass, "do_POST", answer)
    reply = Endpoint(server.url).stream(TALKS["a picture"]).read()
    assert (reply.text, reply.finish) == ("a", "content_filter") and "content_filter" in reply.note


def test_a_silent_server_can_be_left(server, monkeypatch):
    is_over = threading.Event()
    monkeypatch.setattr(server.RequestHandlerClass, "do_POST", silent(is_over))
    try:
        stream = Endpoint(server.url).stream(TALKS["a picture"])
        began = time.monotonic()
        for piece in stream:
            assert piece == "a"
            stream.stop()
        assert stream.reply.finish == CANCELLED
        assert time.monotonic() - began < 60  # and not the time limit of a request
    finally:
        is_over.set()


def test_an_address_that_is_none_is_told(server):
    with pytest.raises(ValueError, match=r"endpoint http://\[::1/v1 does not have OpenAI's interface"):
        Endpoint("http://[::1/v1")
    with pytest.raises(ValueError, match=r"refuses it \(404\).*often end with /v1"):
        Endpoint(server.url.removesuffix("/v1"))
