"""The command that starts vLLM: what it refuses, what it passes on, how it ends. vLLM itself does not run."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cumo_model.checkpoints.convert import convert_checkpoint
from cumo_model.command_line import parsed
from cumo_model.processing.pictures import MEMORY
from cumo_model.serving import serve as serving
from cumo_model.serving.serve import command_of, run, serve
from cumo_model.serving.vllm.requests import problem_of
from tests.serve.checkpoints import write

ROOT = Path(__file__).parents[3]
VARIABLES = ("HF_HUB_OFFLINE", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_MAX_IMAGE_PIXELS")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write(tmp_path_factory.mktemp("saved") / "tiny", "mixtral", scales=[1, 3])


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A copy that a test may damage; none of the variables is set by the caller."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def options(words: list[str]) -> dict[str, str]:
    """Options of vLLM with their values."""
    return {word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def changed(folder: Path, **values) -> None:
    """Other values in config.json, with __ for nested keys."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in values.items():
        *above, last = key.split("__")
        inner = config
        for name in above:
            inner = inner[name]
        inner[last] = value
    path.write_text(json.dumps(config))


def test_the_defaults_are_those_of_the_checkpoint(folder):
    words, environment = command_of(folder)
    found = options(words)
    assert found["--model"] == str(folder)
    assert (found["--host"], found["--port"]) == ("127.0.0.1", "8000")
    assert found["--served-model-name"] == "tiny"
    assert found["--max-model-len"] == "512"
    assert found["--dtype"] == "float32"
    assert json.loads(found["--limit-mm-per-prompt"]) == {"image": 8}
    assert "--allowed-local-media-path" not in found
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["VLLM_MAX_IMAGE_PIXELS"] == str(MEMORY // 3)
    assert ("--enforce-eager" in found) != torch.cuda.is_available()


def test_what_is_given_reaches_vllm(folder, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5}, raising=False)
    words, environment = command_of(
        folder, "::1", 9, "name", 300, 2, "bfloat16", 2, ["--max-num-seqs", "3"]
    )  # fmt: skip
    found = options(words)
    given = (
        "host",
        "port",
        "served-model-name",
        "max-model-len",
        "tensor-parallel-size",
        "dtype",
        "max-num-seqs",
    )
    assert [found[f"--{name}"] for name in given] == ["::1", "9", "name", "300", "2", "bfloat16", "3"]
    assert json.loads(found["--limit-mm-per-prompt"]) == {"image": 2}
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    if not torch.cuda.is_available():
        assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,5|1"


def test_keys_and_values_of_long_prompts_have_room(folder):
    text = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128}
    config, _ = serving._described(folder)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    wanted = min(serving.ROWS * 32768 * 2 * 32 * 8 * 128 * 2, half)
    found = int(serving._for_cpu(config, torch.bfloat16, 32768, 1)["VLLM_CPU_KVCACHE_SPACE"])
    assert found - 1 < wanted / 2**30 <= found


REFUSED = {
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "has no processor_config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
    "rounding": (lambda f: changed(f, compat="cumo"), "compat must be None"),
    "activation": (
        lambda f: changed(f, text_config__hidden_act="gelu"),
        "must be one of silu, swish",
    ),
    "not ours": (lambda f: changed(f, model_type="llama"), "must be of model_type cumo"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no folder": (shutil.rmtree, "which is not a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_vllm_cannot_run_is_refused(name, folder):
    damage, message = REFUSED[name]
    damage(folder)
    with pytest.raises(ValueError) as caught:
        command_of(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_model_len": 513}, "max_model_len must be at most the model's 512 positions, got 513"),
        ({"max_model_len": 16}, "max_model_len must be more than the 16 tokens of a picture, got 16"),
        ({"tensor_parallel": 3}, "tensor_parallel must divide text_config.num_attention_heads, 2, got 3"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(given, message, folder):
    with pytest.raises(ValueError) as caught:
        command_of(folder, **given)
    assert message in str(caught.value)


def test_without_pictures_a_short_context_is_enough(folder):
    words, _ = command_of(folder, max_model_len=16, images_per_prompt=0)
    assert options(words)["--max-model-len"] == "16"


def test_more_ranks_than_the_machine_has(folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="at most the 1 cores of this machine, got 2"):
        command_of(folder, tensor_parallel=2)


def test_the_released_layout_has_to_be_converted(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "released", "original", 2**30)
    with pytest.raises(ValueError, match=r"released layout, which vLLM cannot read: first run .*convert"):
        command_of(tmp_path / "released")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_message_says_what_to_install(folder):
    command = [sys.executable, "-m", "cumo_model", "serve", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cumo: serve needs vLLM, which is not installed: pip install 'cumo[serve]'")
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_refused(folder, monkeypatch):
    monkeypatch.setattr(serving, "check_vllm", lambda: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"port \d+ of host '127.0.0.1' cannot be used: Address already"):
            serve(folder, port=taken.getsockname()[1])


def test_words_behind_two_dashes_are_for_vllm():
    args = parsed(["serve", "folder", "--port", "9", "--", "--max-num-seqs", "3", "--", "a=b"])
    assert (args.port, args.extra) == (9, ["--max-num-seqs", "3", "--", "a=b"])
    assert parsed(["serve", "folder"]).extra == []
    with pytest.raises(SystemExit):
        parsed(["serve", "folder", "--max-num-seqs", "3"])


CHILD = "import os, signal, subprocess, sys, time; "
DEAF = CHILD + (
    "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "signal.signal(signal.SIGTERM, lambda *_: None if sys.argv[2] == 'deaf' else sys.exit(0)); "
    "open(sys.argv[1], 'w').write(str(inner.pid)); [time.sleep(0.1) for _ in range(600)]"
)


@pytest.mark.parametrize("kind", ["orderly", "deaf"])
def test_an_exception_ends_the_server_and_what_it_started(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "PATIENCE", 1)
    path, popen = tmp_path / "pid", subprocess.Popen

    class Stopping(popen):
        """Its first wait ends as Ctrl-C does, once the process has started another one."""

        asked = False

        def wait(self, timeout=None):
            if self.asked:
                return super().wait(timeout)
            self.asked = True
            while not path.exists() or not path.read_text():
                time.sleep(0.01)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Stopping)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-c", DEAF, str(path), kind], dict(os.environ))
    assert time.monotonic() - begin < 50, "the deaf process has ended by itself, after a minute"
    end = time.monotonic() + 10
    while _lives(int(path.read_text())) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _lives(int(path.read_text()))


def _lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not fetched by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_exit_code_is_that_of_the_server():
    before = signal.getsignal(signal.SIGTERM)
    assert run([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == 3
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "body, is_refused",
    [
        ({"messages": [{"role": "user", "content": "what <image> is it"}]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}]}, True),
        ({"prompt": ["one", "<image>two"]}, True),
        ({"messages": [{"role": "user", "content": "what is an image"}]}, False),
        ({"<image>": 1}, False),
    ],
)
def test_the_marker_of_pictures_is_refused_as_text(body, is_refused):
    assert (problem_of(json.dumps(body).encode()) is not None) == is_refused
    escaped = json.dumps(body).replace("<", "\\u003c").encode()
    assert (problem_of(escaped) is not None) == is_refused
    assert (problem_of(json.dumps(body).encode("utf-16")) is not None) == is_refused


def test_the_marker_in_two_parts_is_refused():
    """The chat template joins the texts of a message."""
    texts = [{"type": "text", "text": text} for text in ("<ima", "ge> what?")]
    split = lambda parts: json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()
    assert problem_of(split(texts)) is not None
    assert problem_of(split(texts[::-1])) is None


def test_what_is_no_json_is_left_to_vllm():
    for body in (b"<image>", b"", b"\xff<image>", b"[" * 100_000 + b'"<image>"'):
        assert problem_of(body) is None
