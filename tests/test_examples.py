"""The scripts of examples/: short, with commands that are right, and with results that mean something."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
NAMES = [script.name for script in SCRIPTS]
NEEDS = {"lora_experts.py": "peft", "upcycle_and_train.py": "accelerate"}


def docstring(script: Path) -> str:
    return ast.get_docstring(ast.parse(script.read_text())) or ""


def commands(script: Path) -> list[list[str]]:
    """The words of every command that the docstring shows."""
    lines = docstring(script).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("    python ")]


def run(name: str, *words: str) -> str:
    """What the script prints, started as users start it."""
    pytest.importorskip(NEEDS.get(name, "torch"))
    done = subprocess.run(
        [sys.executable, FOLDER / name, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # this checkout, whichever is installed
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def in_process(name: str, *words: str, monkeypatch) -> None:
    """The script on a CPU, in this process, which has imported what it needs."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runpy.run_path(str(FOLDER / name), run_name="__main__")


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_an_example_is_short_and_says_how_to_run_it(script):
    assert len(script.read_text().splitlines()) <= 60
    shown = commands(script)
    assert shown[0] == ["python", f"examples/{script.name}"]
    assert len(shown) >= 2


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_commands_of_a_docstring_are_understood(script, monkeypatch):
    """Each is parsed by the script itself, which stops there."""
    pytest.importorskip(NEEDS.get(script.name, "torch"))

    class Parsed(Exception):
        pass

    parse = ArgumentParser.parse_args

    def stop(self, *args):
        raise Parsed(vars(parse(self, *args)))

    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    for words in commands(script):
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


def test_the_table_has_every_example():
    rows = re.findall(r"^\| \[(\S+)\]\((\S+)\) \|.*\| `(.+)` \|$", (FOLDER / "README.md").read_text(), re.M)
    assert sorted(rows) == [(name, name, f"python examples/{name}") for name in NAMES]


@pytest.mark.slow
def test_mixtral_experts():
    out = run("mixtral_experts.py", "--tokens", "256")
    assert re.findall(r"^(\w+) +relative error of logits", out, re.M) == ["cumo", "grouped_mm"]
    errors = numbers(r"(\d\.\de-\d\d)", out)
    assert len(errors) == 4 and all(0 < error < 1e-5 for error in errors)
    ours, theirs, ratio = numbers(r"(\d+\.\d+) ?(?:ms|x)", out)
    assert ratio == pytest.approx(theirs / ours, abs=0.02)
    assert "do not predict times on a GPU" in out


def test_mixtral_experts_times_nothing_that_is_wrong(monkeypatch, capsys):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import cumo_model  # noqa: F401

    right = ALL_EXPERTS_FUNCTIONS["cumo"]
    wrong = lambda *inputs: right(*inputs) * (1 + 1e-4)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "cumo", wrong)
    with pytest.raises(SystemExit, match="less exact"):
        in_process("mixtral_experts.py", "--tokens", "32", "--runs", "1", monkeypatch=monkeypatch)
    assert " ms" not in capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path) -> str:
    """A Mixtral of three layers with a tokenizer, as users have them, only smaller."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=300)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([], 300, special_tokens=["<s>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(tmp_path / "mixtral")
    return str(tmp_path / "mixtral")


def test_mixtral_experts_of_ones_own(checkpoint, monkeypatch, capsys):
    words = ["--model", checkpoint, "--layers", "2", "--tokens", "32", "--runs", "1"]
    in_process("mixtral_experts.py", *words, monkeypatch=monkeypatch)
    assert re.search(r"^cumo \S+ ms, grouped_mm \S+ ms", capsys.readouterr().out, re.M)


def test_lora_on_a_mixtral_of_ones_own(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    (tmp_path / "notes.txt").write_text("experts all the way down " * 10)
    words = ["--model", checkpoint, "--text", str(tmp_path / "notes.txt"), "--out", str(tmp_path / "adapter")]
    in_process("lora_experts.py", *words, "--steps", "5", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    losses = numbers(r"step +\d+ +loss (\S+)", out)
    assert losses[-1] < losses[0] and "same logits True" in out
    kept = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == checkpoint


@pytest.mark.slow
def test_moe_layer():
    out = run("moe_layer.py")
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [int(row[0]) for row in rows] == [0, 10, 20, 30, 40, 50, 60]
    entropy, balance, z = ([float(row[column]) for row in rows] for column in (1, 2, 3))
    assert entropy[-1] < entropy[0] / 2
    assert all(0.95 < value < 1.2 for value in balance)  # 4 where one expert gets all
    assert z[-1] < z[0] / 2
    loads = [int(word.rstrip("%")) for row in rows for word in row[4:]]
    assert len(loads) == 2 * len(rows) and all(25 <= load < 50 for load in loads)


@pytest.mark.slow
def test_lora_experts(tmp_path):
    out = run("lora_experts.py", "--out", str(tmp_path / "adapter"))
    losses = numbers(r"step +\d+ +loss (\S+)", out)
    assert len(losses) == 6 and losses[-1] < losses[0] - 1
    assert "same logits True" in out
    assert numbers(r"relative difference (\S+)", out)[0] < 1e-5
    from safetensors.torch import load_file

    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    learned = {name: value for name, value in adapter.items() if ".experts." in name and "lora_B" in name}
    assert len(learned) == 2 * 2 and all(value.any() for value in learned.values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_upcycle_and_train(tmp_path):
    out = run("upcycle_and_train.py", "--out", str(tmp_path / "cumo"))
    ran = [line.split() for line in out.splitlines() if line.startswith("$ ")]
    assert [words[3] for words in ran] == ["cumo_model", "torch.distributed.run"]
    assert numbers(r"step-0 difference: (\S+)", out)[0] < 1e-5
    losses = [float(word) for word in out.splitlines()[-1].removeprefix("language loss:").split()]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5
    run_folder = tmp_path / "cumo/run"
    assert len({path.name for path in run_folder.rglob("rng_state_*.pth")}) == 2  # one for each process
    config = json.loads((run_folder / "model/config.json").read_text())
    assert config["projector_num_experts"] == config["vision_config"]["num_experts"] == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_verify_and_bench(tmp_path):
    out = run("verify_and_bench.py", "--log", str(tmp_path / "log.txt"))
    assert (tmp_path / "log.txt").read_text() == out
    ran = re.findall(r"^\$ python -m (.+)$", out, re.M)
    assert [command.split()[:2] for command in ran] == [
        ["cumo_kernels", "explain"],
        ["cumo_kernels", "verify"],
        ["benchmarks", "--dry"],
    ]
    explained, verified, timed = re.split(r"^\$ .+$", out, flags=re.M)[1:]
    assert "chosen" in explained
    assert numbers(r"all (\d+) cases passed", verified)[0] >= 36
    times = dict(re.findall(r"^ +both +cpu +(\S+) +(\S+) ms", timed, re.M))
    assert {"cumo/torch", "cumo/reference", "transformers-grouped_mm"} <= times.keys()


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("passes", [False, True])
def test_verify_and_bench_times_nothing_unverified(gpu, passes, monkeypatch, capsys):
    ran = []

    class Process:
        def __init__(self, words, **options):
            ran.append(words[2:])
            self.stdout = iter(())

        def wait(self) -> int:
            return int("verify" in ran[-1] and not passes)

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(sys, "argv", ["verify_and_bench.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / "verify_and_bench.py"), run_name="__main__")
    assert ended.value.code == (0 if passes else 1)
    assert [words[0] for words in ran].count("benchmarks") == passes
    assert ("nothing is timed" in capsys.readouterr().out) != passes
