"""The server of `python -m cumo_model serve`, asked by the client of OpenAI on this machine."""

import base64
import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make serve-test", allow_module_level=True)

import psutil
from openai import BadRequestError, OpenAI
from PIL import Image

from tests.serve.checkpoints import write
from tests.serve.engine import ROOT
from tests.serve.questions import NEW_TOKENS, TALKS, Right, messages, url

WAIT = 300  # seconds for a server to start, on a machine that has other work
LONG = 300
pytestmark = pytest.mark.timeout(WAIT + 100)


class Server:
    """The command, and a client of it."""

    def __init__(self, folder: Path, log: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.name = log, folder.name
        words = [sys.executable, "-m", "cumo_model", "serve", str(folder), "--port", str(self.port), *options]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait(self) -> None:
        end = time.monotonic() + WAIT
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        self.process.kill()
        raise AssertionError(self.log.read_text()[-4000:])

    def ask(self, talk: tuple, new_tokens: int = NEW_TOKENS, **options):
        return self.client.chat.completions.create(
            model=self.name, messages=messages(talk, "image_url"), max_tokens=new_tokens, temperature=0,
            **options,
        )  # fmt: skip

    def tokens(self, talk: tuple) -> list[int]:
        """Ids of the answer; its text lacks the beginning of a letter at the end."""
        found = self.ask(talk, extra_body={"return_token_ids": True}).choices[0]
        assert found.message.content
        return found.token_ids

    def family(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def running(self) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served"), "mixtral", scales=[1, 3])


@pytest.fixture(scope="module")
def right(folder):
    return Right(folder)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    started = Server(folder, tmp_path_factory.mktemp("log") / "server.log")
    started.wait()
    yield started
    for process in started.family() if started.process.poll() is None else []:
        process.kill()


def refused(server: Server, content, role: str = "user", **options) -> str:
    """The message of HTTP 400."""
    with pytest.raises(BadRequestError) as caught:
        server.client.chat.completions.create(
            model=server.name, messages=[{"role": role, "content": content}], max_tokens=4, **options
        )
    return str(caught.value)


def test_a_picture_two_pictures_text_and_turns(server, right):
    for number in (0, 1, 3, 6, 9, 11, 13):
        assert server.tokens(TALKS[number]) == right.answer(TALKS[number])[1], TALKS[number]


def test_an_answer_is_streamed(server, right):
    texts, tokens = [], []
    for chunk in server.ask(TALKS[2], stream=True, extra_body={"return_token_ids": True}):
        texts.append(chunk.choices[0].delta.content or "")
        tokens += getattr(chunk.choices[0], "token_ids", None) or []
    assert tokens == right.answer(TALKS[2])[1]
    said = right.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert said.startswith("".join(texts))
    assert sum(map(bool, texts)) > 2


def test_sixteen_requests_at_once(server, right):
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(server.tokens, TALKS[:16]))
    assert found == [right.answer(talk)[1] for talk in TALKS[:16]]


def test_a_client_that_leaves_in_the_middle_of_an_answer(server, right):
    stream = server.ask(TALKS[0], LONG, stream=True, extra_body={"ignore_eos": True})
    for _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    end = time.monotonic() + 60
    while server.running() and time.monotonic() < end:
        time.sleep(0.05)
    assert not server.running()
    assert server.tokens(TALKS[0]) == right.answer(TALKS[0])[1]


def test_what_cannot_be_answered_is_an_error_of_the_request(server, right):
    text = {"type": "text", "text": "what is in the picture"}
    link = lambda where: [{"type": "image_url", "image_url": {"url": where}}, text]
    assert "Failed to load image" in refused(server, link("data:image/png;base64,AAAA"))
    damaged = url(0)[:-400]
    assert "400" in refused(server, link(damaged[: len(damaged) - len(damaged) % 4]))
    assert "local files" in refused(server, link(f"file://{ROOT}/docs/images/cumo.png"))
    assert "got judge" in refused(server, "what is in the picture", role="judge")
    assert "context length" in refused(server, "one two three " * 200)
    assert "<image>" in refused(server, "what <image> is in the picture")
    assert "<image>" in refused(server, [*link(url(0))[:1], {"type": "text", "text": "in <image>"}])
    assert "At most 8" in refused(server, link(url(0))[:1] * 9)
    assert server.tokens(TALKS[0]) == right.answer(TALKS[0])[1]


@pytest.mark.parametrize("side", [30_000, 8_000])
def test_a_picture_bomb_is_not_decoded(server, right, side):
    file, limit = io.BytesIO(), Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        Image.new("1", (side, side)).save(file, "PNG", compress_level=1)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    where = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    before = [process.memory_info().rss for process in server.family()]
    message = refused(server, [{"type": "image_url", "image_url": {"url": where}}])
    after = [process.memory_info().rss for process in server.family()]
    assert "exceed" in message
    assert sum(after) - sum(before) < side * side // 2
    assert server.tokens(TALKS[0]) == right.answer(TALKS[0])[1]


def test_ctrl_c_ends_the_server_and_all_that_it_started(server):
    family = server.family()
    assert len(family) > 2
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 130
    assert "cumo: stopped" in server.log.read_text()
    assert "Traceback" not in server.log.read_text().rpartition("stopped")[0][-2000:]
    assert psutil.wait_procs(family, 10)[1] == []


def test_a_server_that_still_starts_is_ended_too(folder, tmp_path):
    server = Server(folder, tmp_path / "log")
    end = time.monotonic() + 60
    while len(server.family()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(2)
    family = server.family()
    server.process.terminate()
    assert server.process.wait(60) == 130
    assert psutil.wait_procs(family, 10)[1] == []
