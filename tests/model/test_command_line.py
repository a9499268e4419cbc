"""The command line before torch is imported: help, refused paths and numbers, and signals at any moment."""

import importlib
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cumo_model import __main__ as program
from cumo_model.__main__ import main
from cumo_model.command_line import parsed, parser
from cumo_model.serving.sampling import Sampling
from cumo_model.training import launch
from tests.processes import kill

HEAVY = {"torch", "transformers", "numpy", "PIL", "cumo_kernels"}
COMMANDS = ("demo", "ablate", "chat", "answer", "eval", "serve", "data", "train", "experts", "convert",
            "quantize", "upcycle")  # fmt: skip


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders and files that pass the checks of paths, and some that do not; none holds a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "text", "clip", "full", "silent"):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{}")
    Path("model/tokenizer.json").touch()
    Path("data.json").write_text("[]")
    Path("empty").mkdir()
    Path("pictures").mkdir()
    Path("a.png").touch()
    return tmp_path


UPCYCLE = "upcycle --vision clip --text text --out new"
EXPERTS = "experts --checkpoint model --data data.json --out new"
CHAT = "chat --checkpoint model --question what"
ANSWER = "answer model --questions data.json --out new.jsonl"
EVAL = "eval model --task gqa --data pictures"
REFUSED = {  # words of a command -> part of the message
    "demo --out full": "full contains something that is not a demo",
    "demo --out data.json": "--out must be a folder, got 'data.json', which is a file",
    "demo --seed -1": "--seed must be at least 0, got -1",
    "ablate --seeds 0": "--seeds must be at least 1, got 0",
    "ablate --steps 0": "--steps must be at least 1, got 0",
    "ablate --out full": "full contains something that is not a demo",
    "chat --checkpoint nowhere": "--checkpoint must be a folder, got 'nowhere', which does not exist",
    "chat --checkpoint data.json": "--checkpoint must be a folder, got 'data.json', which is not a folder",
    "chat --checkpoint empty": "got 'empty', which has no config.json and has no tokenizer",
    "chat --checkpoint silent": "'silent' cannot be loaded: it has no tokenizer (tokenizer.json or",
    f"{CHAT} --max-new-tokens 0": "--max-new-tokens must be at least 1, got 0",
    f"{CHAT} --max-new-tokens 99999999999": "--max-new-tokens must be at most 2147483647, got 99999999999",
    f"{CHAT} --image none.png": "image 'none.png' does not exist",
    f"{CHAT} --image pictures": "image 'pictures' must be a file, got a folder",
    f"{CHAT} --template none": "--template: template must be one of ",
    f"{CHAT} --temperature -1": "--temperature must be 0, or from 1e-06 to 1e+06, got -1.0",
    f"{CHAT} --temperature inf": "--temperature must be 0, or from 1e-06 to 1e+06, got inf",
    f"{CHAT} --top-p 0": "--top-p must be above 0 and at most 1, got 0.0",
    f"{CHAT} --seed -1": "--seed must be at least 0, got -1",
    f"{CHAT} --system <image>": "--system must be text without <image>, got '<image>'",
    f"{CHAT} --web": "--question must not be given with --web",
    "chat model --web --image a.png": "--image must not be given with --web",
    "chat model --web --port 65536": "--port must be at most 65535, got 65536",
    "chat": "the folder of a checkpoint, or --endpoint, must be given, got neither",
    "chat model --checkpoint model": "the checkpoint must be given once, got 'model' and --checkpoint",
    "chat model --endpoint http://h": "a checkpoint must not be given with --endpoint",
    "chat --endpoint http://h --load-4bit": "--load-4bit or --load-8bit must not be given with --endpoint",
    "chat --endpoint h:8000": "--endpoint must be an address such as http://127.0.0.1:8000/v1, got 'h:8000'",
    f"{CHAT} --template plain": "--template: template must be an instruct template, got 'plain'",
    "answer --questions data.json --out new": "the folder of a checkpoint, or --endpoint, must be given",
    "answer model --questions none.jsonl --out new": "--questions must be a file, got 'none.jsonl'",
    "answer model --questions pictures --out new": "--questions must be a file, got 'pictures', which is",
    "answer silent --questions data.json --out new": "'silent' cannot be loaded: it has no tokenizer",
    "answer model --questions data.json --out pictures": "--out must be a file, got 'pictures', which",
    f"{ANSWER} --images none": "--images must be a folder or a .tar file, got 'none'",
    f"{ANSWER} --batch-size 0": "--batch-size must be at least 1, got 0",
    f"{ANSWER} --at-once 0": "--at-once must be at least 1, got 0",
    f"{ANSWER} --limit 0": "--limit must be at least 1, got 0",
    f"{ANSWER} --processes 0": "--processes must be at least 1, got 0",
    f"{ANSWER} --temperature -1": "--temperature must be 0, or from 1e-06 to 1e+06, got -1.0",
    "answer --endpoint http://x --questions data.json --out new --processes 2": "--at-once is for it",
    "eval model --data pictures": "--task must be given, or --compare",
    "eval model --task gqa": "--data must be given, or --compare",
    "eval --task gqa --data pictures": "the folder of a checkpoint, or --endpoint, must be given",
    "eval model --task gqa --data none": "--data must be a folder, got 'none', which does not exist",
    f"{EVAL} --out data.json": "--out must be a folder, got 'data.json', which is a file",
    f"{EVAL} --limit 0": "--limit must be at least 1, got 0",
    f"{EVAL} --judge-url http://h": "--judge-url must not be given without --judge",
    f"{EVAL} --judge m --judge-url h": "--judge-url must be an address such as",
    f"{EVAL} --answers data.json": "a checkpoint must not be given with --answers",
    "eval --task gqa --data pictures --answers none": "--answers must be a file, got 'none', which does not",
    "eval --compare model": "--compare must have at least two folders, got 1",
    "eval --compare model none": "--compare must be a folder, got 'none', which does not exist",
    "eval model --compare model full": "a checkpoint must not be given with --compare",
    "serve nowhere": "checkpoint must be a folder, got 'nowhere', which does not exist",
    "serve silent": "'silent' cannot be loaded: it has no tokenizer (tokenizer.json or",
    "serve model --port 0": "--port must be at least 1, got 0",
    "serve model --port 65536": "--port must be at most 65535, got 65536",
    "serve model --tensor-parallel 0": "--tensor-parallel must be at least 1, got 0",
    "serve model --images-per-prompt -1": "--images-per-prompt must be at least 0, got -1",
    "serve model --max-model-len 0": "--max-model-len must be at least 1, got 0",
    "data check none.json": None,
    "data check none*.json a?.jsonl": None,
    "data check data.json --images none": "--images must be a folder or a .tar file, got 'none'",
    "data check data.json --template none": "--template: template must be one of ",
    "train --config none.yaml": "config must be a YAML file or one of demo/pft, ",
    "train --config pictures": "config must be a YAML file, got 'pictures', which is a folder",
    "train --config mistral-7b/sft stage": "overrides must look like key=value, got 'stage'",
    f"{EXPERTS} --limit -1": "--limit must be at least 1, got -1",
    f"{EXPERTS} --batch-size 0": "--batch-size must be at least 1, got 0",
    f"{EXPERTS} --data none*.json": "--data: none*.json: the file does not exist",
    f"{EXPERTS} --images none.tar": "--images must be a folder or a .tar file, got 'none.tar'",
    f"{EXPERTS} --picture none.png": "image 'none.png' does not exist",
    f"{EXPERTS} --checkpoint silent": "'silent' cannot be loaded: it has no tokenizer",
    f"{EXPERTS} --out full": "--out full exists already",
    f"{EXPERTS} --out a.png/x": "--out must lie in a folder, got 'a.png/x'",
    "convert nowhere new": "source must be a folder, got 'nowhere'",
    "convert empty new": "source must be a folder of a model, got 'empty', which has no config.json",
    "convert model full": "target full exists already",
    "convert model a.png": "target a.png exists already",
    "convert model new --shard-gb nan": "--shard-gb must be positive, got nan",
    "convert model new --shard-gb 0": "--shard-gb must be positive, got 0.0",
    "convert model new --remote-code --layout original": "--layout must be cumo with --remote-code",
    "quantize nowhere --out new": "source must be a folder, got 'nowhere'",
    "quantize empty --out new": "source must be a folder of a model, got 'empty', which has no config.json",
    "quantize model --out full": "--out full exists already",
    "quantize model --out new --group 48": "--group must be one of 32, 64, 128, 256, got 48",
    "quantize model --out new --asymmetric": "--asymmetric must be given with --bits int4 only, got none",
    "quantize model --out new --bits nf4 --asymmetric": "with --bits int4 only, got nf4",
    "upcycle --out new": "give either a checkpoint, or vision and text; got neither",
    "upcycle --checkpoint model --vision clip --out new": "got a checkpoint and vision",
    f"{UPCYCLE} --vision nowhere": "--vision must be a folder, got 'nowhere'",
    f"{UPCYCLE} --text empty": "--text must be a folder of a model, got 'empty'",
    f"{UPCYCLE} --clip none.bin": "--clip must be a file, got 'none.bin', which does not exist",
    f"{UPCYCLE} --projector pictures": "--projector must be a file, got 'pictures', which is a folder",
    f"{UPCYCLE} --tokenizer empty": "--tokenizer must be a folder with a tokenizer, got 'empty'",
    f"{UPCYCLE} --out full": "--out full exists already",
    f"{UPCYCLE} --top-k 0": "--top-k must be at least 1, got 0",
    f"{UPCYCLE} --vision-experts 4 --top-k 9": "--top-k must be at most 4, got 9",
    f"{UPCYCLE} --text-experts 4 --text-top-k 5": "--text-top-k must be at most 4, got 5",
    f"{UPCYCLE} --text-experts -1": "--text-experts must be at least 0, got -1",
    f"{UPCYCLE} --noise nan": "--noise must be finite and not negative, got nan",
    f"{UPCYCLE} --drop 1.5": "--drop must lie in [0, 1], got 1.5",
}
ALL = """
import json, sys
from cumo_model.__main__ import main
for command in sys.argv[1:]:
    sys.stderr.write(f"> {command}\\n")
    code = main(command.split())
    sys.stderr.write(f"= {code}\\n")
print(json.dumps(sorted(sys.modules)))
"""


def test_overrides_may_stand_anywhere(capsys):
    words = [
        "train",
        "--config",
        "x",
        "a=1",
        "b=",
        "--processes",
        "2",
        "c.d=[1, 2]",
        "--max-restarts=1",
        "e=-3",
    ]
    args = parsed(words)
    assert args.overrides == ["a=1", "b=", "c.d=[1, 2]", "e=-3"] and (args.processes, args.max_restarts) == (
        2,
        1,
    )
    for wrong in (["train", "--config", "x", "--nothing=1"], ["chat", "x", "a=1"]):
        with pytest.raises(SystemExit):
            parsed(wrong)
        assert "unrecognized arguments: " in capsys.readouterr().err


def test_what_is_refused_is_one_line_before_torch_is_imported(folders):
    """All commands in one process, which at the end has imported nothing that takes long."""
    done = subprocess.run([sys.executable, "-c", ALL, *REFUSED], capture_output=True, text=True)
    assert not HEAVY & set(json.loads(done.stdout.splitlines()[-1]))
    for said, (command, words) in zip(done.stderr.split("> ")[1:], REFUSED.items(), strict=True):
        first, *lines, code = said.splitlines()
        assert (first, code) == (command, "= 1"), said
        assert not lines if words is None else len(lines) == 1 and lines[0].startswith("cumo: "), said
        assert words is None or words in lines[0], said
    for name in ("none.json", "none*.json", "a?.jsonl"):
        assert f"{name}: the file does not exist" in done.stdout


@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in COMMANDS), ["data", "check", "-h"]]
)
def test_help_needs_nothing_heavy(words):
    code = (
        "import sys\nfrom cumo_model.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"assert not {HEAVY} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: cumo"), done.stderr


@pytest.mark.parametrize(
    "words", [["--help"], ["chat", "--checkpoint", "nowhere"], ["nothing"], ["chat", "-x"]]
)
def test_it_answers_at_once(words):
    """Half a second is the aim; a loaded machine may need more, so that the time of its CPU is measured."""
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "cumo_model", *words], capture_output=True, text=True)
    now = os.times()
    assert done.returncode == {"--help": 0, "nothing": 2}.get(words[0], 2 if "-x" in words else 1)
    assert now.children_user + now.children_system - before.children_user - before.children_system < 0.5


def start(words):
    command = [sys.executable, "-m", "cumo_model", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_line_of_ours(process) -> None:
    """Wait until the process has set its handlers, which Linux says in /proc."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = int(status.read_text().split("SigCgt:")[1].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("words", [CHAT, UPCYCLE, "demo --quick --out run", "data check data.json"])
def test_a_signal_during_imports_ends_a_command_without_a_traceback(folders, words, number):
    for delay in (0.0, 0.05, 0.4):
        process = start(words.split())
        first_line_of_ours(process)
        time.sleep(delay)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (130, "cumo: stopped\n")
        kill(process)


def test_a_module_that_catches_the_signal_does_not_keep_the_command(monkeypatch, capsys):
    """Python ignores exceptions in a destructor, and modules make others of them."""

    class Caught:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def command(args):
        def run():
            caught = Caught()
            del caught
            time.sleep(30)

        return run

    monkeypatch.setitem(program.COMMANDS, "demo", command)
    begin = time.monotonic()
    assert main(["demo"]) == 130 and time.monotonic() - begin < 20
    assert capsys.readouterr().err == "cumo: stopped\n"

    def other(args):
        def run():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as error:
                raise TypeError("numpy cannot be imported") from error

        return run

    monkeypatch.setitem(program.COMMANDS, "demo", other)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "cumo: stopped\n"


def test_bitsandbytes_does_not_warn_of_a_kernel_that_is_not_used(monkeypatch, capsys):
    def command(args):
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
        return lambda: 0

    monkeypatch.setitem(program.COMMANDS, "demo", command)
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    assert main(["demo"]) == 0
    assert capsys.readouterr().err == ""


def test_defaults_are_those_that_the_help_says():
    """Numbers; what has no default of its own is decided later."""
    seen = 0
    for command in parser()._subparsers._group_actions[0].choices.values():
        for action in command._actions:
            said = re.search(r"\(default: ([\d.]+)\)", action.help or "")
            if said and action.default is not None:
                assert action.default == float(said[1]), (command.prog, action.dest)
                seen += 1
    assert seen >= 10
    later = parsed(["train", "--config", "x"])
    assert (later.processes, later.max_restarts, launch.MAX_RESTARTS) == (None, None, 3)


REACHES = {  # command -> the function that it calls, and the arguments that are not those of the defaults
    "demo --quick --out d --seed 5": ("demo.run.run_demo", {"out_dir": "d", "is_quick": True, "seed": 5}),
    "demo": ("demo.run.run_demo", {"out_dir": "runs/demo"}),
    "demo --quick": ("demo.run.run_demo", {"out_dir": "runs/demo-quick", "is_quick": True}),
    "ablate --out d --seeds 5 --rows clip e8 --steps 7 --quick": (
        "demo.ablation.run_ablation",
        {"out_dir": "d", "seeds": 5, "rows": ["clip", "e8"], "steps": 7, "is_quick": True},
    ),
    "ablate": ("demo.ablation.run_ablation", {"out_dir": "runs/ablation"}),
    "chat --checkpoint c --image i --image j --question q --template t --max-new-tokens 9 --temperature 0.5 "
    "--top-p 0.25 --seed 3 --system s --device cpu --dtype float16 --load-4bit": (
        "serving.chat.chat",
        {"checkpoint": "c", "images": ["i", "j"], "question": "q", "template": "t", "system": "s",
         "device": "cpu", "dtype": "float16", "bits": 4, "sampling": Sampling(9, 0.5, 0.25, 3)},
    ),
    "chat --checkpoint c --web --host h --port 9 --share --template t --top-p 0.5": (
        "serving.web.server.serve_page",
        {"checkpoint": "c", "host": "h", "port": 9, "share": True, "template": "t",
         "sampling": Sampling(512, 0.0, 0.5)},
    ),
    "chat --endpoint http://h/v1 --load-8bit": (
        "serving.chat.chat",
        {"endpoint": "http://h/v1", "bits": 8},
    ),
    "eval --checkpoint c --task gqa,pope --data d --limit 5 --judge m --judge-url http://h/v1 --at-once 3 "
    "--batch-size 2 --dtype float16": (
        "evaluation.command.run_eval",
        {"checkpoint": "c", "task": "gqa,pope", "data": "d", "out": "runs/eval", "limit": 5, "judge": "m",
         "judge_url": "http://h/v1", "at_once": 3, "batch_size": 2, "dtype": "float16"},
    ),
    "eval --task gqa --data d --answers a --out o": (
        "evaluation.command.run_eval",
        {"checkpoint": None, "task": "gqa", "data": "d", "answers": "a", "out": "o"},
    ),
    "eval --compare a b --out o": (
        "evaluation.command.run_compare", {"runs": [Path("a"), Path("b")], "out": "o"},
    ),
    "serve c": (
        "serving.serve.serve",
        {"checkpoint": "c",
         "options": {"name": None, "max_model_len": None, "tensor_parallel": 1, "dtype": None,
                     "images_per_prompt": 8, "extra": []}},
    ),
    "serve c --host h --port 9 --name n --max-model-len 5 --tensor-parallel 2 --dtype float16 "
    "--images-per-prompt 3 -- --x y": (
        "serving.serve.serve",
        {"checkpoint": "c", "host": "h", "port": 9,
         "options": {"name": "n", "max_model_len": 5, "tensor_parallel": 2, "dtype": "float16",
                     "images_per_prompt": 3, "extra": ["--x", "y"]}},
    ),
    "train --config r --processes 2 --max-restarts 0 a=1 b=2": (
        "training.launch.launch",
        {"config": "r", "processes": 2, "max_restarts": 0, "overrides": ["a=1", "b=2"]},
    ),
    "train --config r --max-restarts 5": (
        "training.launch.launch",
        {"config": "r", "max_restarts": 5, "overrides": []},
    ),
    "experts --checkpoint c --data a b --images i --images j --out o --by f --template t --limit 5 "
    "--batch-size 3 --picture p": (
        "analysis.experts.report_experts",
        {"checkpoint": "c", "files": ["a", "b"], "images": ["i", "j"], "out": "o", "by": "f", "template": "t",
         "limit": 5, "batch_size": 3, "pictures": ["p"]},
    ),
    "data check a b --images i --decode --template t": (
        "data.report.check_files",
        {"files": ["a", "b"], "image_root": ["i"], "decode": True, "template": "t"},
    ),
    "convert s t --layout original --shard-gb 0.5": (
        "checkpoints.convert.convert_checkpoint",
        {"source": "s", "target": "t", "layout": "original", "shard_bytes": 500_000_000},
    ),
    "quantize s --out o": (
        "checkpoints.quantize_checkpoint.run_quantize",
        {"source": "s", "out": "o", "format": None, "group": None, "symmetric": True},
    ),
    "quantize s --bits int4 --out o --group 32 --asymmetric": (
        "checkpoints.quantize_checkpoint.run_quantize",
        {"source": "s", "out": "o", "format": "int4", "group": 32, "symmetric": False},
    ),
    "upcycle --out o --vision v --clip c --text t --projector p --tokenizer k --vision-experts 2 "
    "--vision-top-k 1 --projector-experts 3 --projector-top-k 4 --text-experts 5 --text-top-k 6 --top-k 7 "
    '--noise 0.5 --drop 0.25 --dtype float16 --seed 8 --router {"noisy":true}': (
        "checkpoints.upcycle_checkpoint.upcycle_checkpoint",
        {"out": "o", "vision": "v", "clip": "c", "text": "t", "projector": "p", "tokenizer": "k",
         "dtype": "float16",
         "options": {"vision_experts": 2, "vision_top_k": 1, "projector_experts": 3, "projector_top_k": 4,
                     "text_experts": 5, "text_top_k": 6, "top_k": 7, "noise": 0.5, "drop": 0.25, "seed": 8,
                     "router": {"noisy": True}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", ["noisy", "[1]", "3"])
def test_options_of_routers_are_an_object(text, capsys):
    with pytest.raises(SystemExit):
        parsed(["upcycle", "--out", "o", "--router", text])
    assert f"argument --router: must be an object in JSON, got '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("words", REACHES)
def test_every_option_reaches_the_function_of_its_command(words, monkeypatch):
    where, wanted = REACHES[words]
    module, _, name = where.rpartition(".")
    module = importlib.import_module(f"cumo_model.{module}")
    signature, seen = inspect.signature(getattr(module, name)), []

    def called(*given, **options):
        bound = signature.bind(*given, **options)
        bound.apply_defaults()
        seen.append(bound.arguments)
        return {"entropy": {}} if name == "report_experts" else 0

    monkeypatch.setattr(module, name, called)
    args = parsed(words.split())
    program.COMMANDS[args.command](args)()
    (found,) = seen
    usual = {key: p.default for key, p in signature.parameters.items()}
    plain = lambda value: str(value) if isinstance(value, Path) else value
    assert {key: plain(value) for key, value in found.items()} == {**usual, **wanted}
