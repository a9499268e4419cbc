"""The page's server without a browser: uploads, headers, what it refuses, its start and its end."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from cumo_model.serving.local import Local, load
from cumo_model.serving.replies import Stream
from cumo_model.serving.sampling import GREEDY, Sampling
from cumo_model.serving.web import uploads
from cumo_model.serving.web.server import served
from cumo_model.serving.web.talk import Talk
from tests.model.serving.conftest import write_checkpoint
from tests.processes import wait_until

PICTURE = b"\x89PNG\r\n--x--\r\n\r\nfilename=\r\n--x"


@pytest.fixture(scope="module")
def site(talker_folder):
    pytest.importorskip("gradio")
    with served(Local(*load(talker_folder)), port=0) as found:
        yield found


def multipart(*parts, boundary=b"xyz"):
    lines = [
        b"--"
        + boundary
        + b'\r\nContent-Disposition: form-data; name="files"; '
        + name
        + b"\r\n\r\n"
        + content
        for name, content in parts
    ]
    return b"\r\n".join([*lines, b"--" + boundary + b"--\r\n"])


def upload(site, body, kind="multipart/form-data; boundary=xyz"):
    request = urllib.request.Request(f"{site.address}gradio_api/upload", body, {"Content-Type": kind})
    with urllib.request.urlopen(request) as answer:
        return [Path(path) for path in json.loads(answer.read())]


def status(ask):
    try:
        ask()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "name",
    [
        b'filename="../../evil.png"',
        b'filename="/etc/evil.png"',
        b"filename=evil",
        b"filename*=UTF-8''evil.png",
        b'filename="evil\\".png"\r\nContent-Type: image/png',
        b'filename="evil.svg"; name="evil"',
    ],
)
def test_names_of_uploads_never_reach_the_file_system(site, name):
    body = multipart((name, PICTURE), (name, PICTURE))
    one, two = upload(site, body)
    assert one.read_bytes() == two.read_bytes() == PICTURE and one.name != two.name
    for path in (one, two):
        assert path.is_relative_to(site.folder) and re.fullmatch(r"[0-9a-f]{32}\.png", path.name)
    assert not [path for path in site.folder.rglob("*") if "evil" in path.name]


def test_an_upload_has_files_alone():
    body = multipart((b'filename="a"', PICTURE), (b"", b"field"), (b'filename="b"', b""))
    kept, boundary = uploads.anonymous(body, b"xyz")
    parts = kept.split(b"--" + boundary)
    assert len(parts) == 4 and parts[0] == b"" and parts[-1] == b"--\r\n"
    assert [part.partition(b"\r\n\r\n")[2] for part in parts[1:3]] == [PICTURE + b"\r\n", b"\r\n"]
    assert uploads.anonymous(b"nonsense", b"xyz")[0].startswith(b"--")


def test_uploads_that_are_none_or_too_large_are_refused(site, monkeypatch):
    body = multipart((b'filename="a"', PICTURE))
    told = (400, "an upload must be multipart/form-data\n")
    assert status(lambda: upload(site, body, "image/png")) == told
    monkeypatch.setattr(uploads, "UPLOAD", len(body) - 1)
    assert status(lambda: upload(site, body))[0] == 413
    monkeypatch.setattr(uploads, "UPLOAD", len(body))
    assert len(upload(site, body)) == 1


def test_no_other_file_is_served_and_no_other_server_is_allowed(site):
    with urllib.request.urlopen(site.address) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'self' data: blob:" in policy and "*" not in policy and "http" not in policy
    for path in (__file__, "/etc/hostname", "../../etc/hostname"):
        file = f"{site.address}gradio_api/file={path}"
        assert status(lambda file=file: urllib.request.urlopen(file))[0] in (403, 404)
    with urllib.request.urlopen(f"{site.address}config") as answer:
        config = json.loads(answer.read())
    assert not config["analytics_enabled"] and site.public is None
    assert {row["api_visibility"] for row in config["dependencies"]} == {"private"}


def test_an_address_is_not_fetched(site):
    from cumo_model.serving.web.page import gr, question_box

    keep = question_box().async_move_resource_to_block_cache
    with ThreadPoolExecutor() as pool, pytest.raises(gr.Error, match="must be uploaded, got an address"):
        pool.submit(asyncio.run, keep("HTTP://127.0.0.1:9/x.png")).result()


def test_a_model_without_experts_says_so(tiny_config, tmp_path):
    pytest.importorskip("gradio")
    write_checkpoint(tmp_path / "dense", tiny_config, vision_experts=1, projector_num_experts=1)
    with served(Local(*load(tmp_path / "dense")), port=0) as site:
        with urllib.request.urlopen(f"{site.address}config") as answer:
            assert "This model has no experts" in answer.read().decode()
        assert site.folder.is_dir()
    assert not site.folder.exists()


def test_what_cannot_be_served_is_named(talker, site, monkeypatch):
    def refused(told, **options):
        with pytest.raises(ValueError, match=told), served(talker, **{"port": 0, **options}):
            raise AssertionError

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(f"host and port must be free to listen at, got 127.0.0.1:{port}: Address already", port=port)
    refused("host and port must be .*, got no.such.host.invalid", host="no.such.host.invalid")
    refused("port must be from 0 to 65535, got 99999", port=99_999)
    refused(r"system must not hold \[/INST\]", system="a [/INST]")
    page = sys.modules.pop("cumo_model.serving.web.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused(re.escape("a page needs the package gradio: pip install 'cumo[web]'"))
    sys.modules["cumo_model.serving.web.page"] = page


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_deletes_its_files(talker_folder, tmp_path, number):
    pytest.importorskip("gradio")
    words = [sys.executable, "-m", "cumo_model", "chat", "--web", str(talker_folder), "--port", "0"]
    with open(tmp_path / "out.txt", "w") as out:
        environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONFAULTHANDLER": "1"}
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment)
    wait_until(process, lambda: "open http" in (tmp_path / "out.txt").read_text(), tmp_path / "out.txt")
    try:
        assert len(list(tmp_path.glob("cumo-web-*"))) == 1
        process.send_signal(number)
        assert process.wait(30) == 130
    finally:
        process.kill()
    out = (tmp_path / "out.txt").read_text()
    assert out.endswith("cumo: stopped\n") and "Traceback" not in out
    assert list(tmp_path.glob("cumo-web-*")) == []


def test_a_piece_is_shown_although_no_other_follows(tmp_path):
    pytest.importorskip("gradio")
    from cumo_model.serving.web.page import _Page

    seen = []

    def pieces():  # the first comes at once, and then the server is silent for as long as it is not seen
        yield "a"
        end = time.monotonic() + 30
        while "a" not in seen and time.monotonic() < end:
            yield ""
            time.sleep(0.01)
        yield " b"
        return "stop", 2, 1

    engine = SimpleNamespace(template=None, stream=lambda *_: Stream(pieces()))
    talk = Talk(tmp_path)
    for rows, *_ in _Page(engine, tmp_path, Sampling(), None)._shown(talk, talk.ask(engine, "?", [], GREEDY)):
        seen.append(rows[-1]["content"][0]["text"])
    assert seen == ["…", "a", "a b"]
