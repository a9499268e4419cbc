"""Tests of runs on several processes: those that cumo starts itself, and the torchrun lines of the docs."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from cumo_model.__main__ import main
from cumo_model.training import launch
from cumo_model.training.launch import reported_once, supervise
from cumo_model.training.lock import locked
from cumo_model.training.recover import Interrupted
from cumo_model.training.run_folder import checkpoints
from cumo_model.training.trainer import training_arguments
from tests.model.test_documentation import blocks, commands
from tests.model.training.small_runs import write_recipe
from tests.model.training.test_recover import as_a_user, reached, same_result, start, wait_for
from tests.model.training.toy_stage import toy_recipe
from tests.processes import Forked, finish, free_port

ROOT = Path(__file__).parents[3]
TWO = {"trainer__per_device_train_batch_size": 1, "model__text_experts": 0}  # for two processes


def lines_of(page: str) -> list[list[str]]:
    """The commands of a page that start several processes, as words."""
    code = [block.code for block in blocks((ROOT / page).read_text()) if block.language == "bash"]
    found = [words for text in code for words in commands(text, keep_variables=True)]
    return [words for words in found if "torchrun" in words or "--processes" in words]


LINES = lines_of("docs/training.md")


def as_documented(words: list[str], recipe: Path) -> subprocess.Popen:
    """Start a command of the docs with two processes on this machine and another recipe."""
    words = (
        words[: words.index("--config") + 1] + [str(recipe)] + (["--processes", "2"] * (words[0] == "python"))
    )
    here = {
        "torchrun": f"{sys.executable} -m torch.distributed.run",
        "python": sys.executable,
        "--nnodes=2": "--nnodes=1",
        "--nproc-per-node=8": "--nproc-per-node=2",
        "--rdzv-endpoint=node0:29400": f"--rdzv-endpoint=localhost:{free_port()}",
    }
    line = " ".join(here.get(word, shlex.quote(word)) for word in words)
    line = re.sub(r"^((?:\w+=\w+ )*)", r"exec env \1", line)
    return as_a_user(line)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "cumo_model" in child.cmdline()]


def test_the_docs_have_a_line_for_one_machine_and_for_several():
    texts = [shlex.join(words) for words in LINES]
    for option in ("--processes 8", "--standalone", "--rdzv-backend=c10d"):
        assert sum(option in text for text in texts) == 1, texts
    (readme,) = lines_of("README.md")  # the same, with fewer overrides; these are replaced below
    assert readme in [words[: len(readme)] for words in LINES]


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("words", LINES, ids=["processes", "several-machines", "standalone"])
def test_a_line_of_the_docs_restarts_after_a_worker_is_killed(folder, words):
    """SIGKILL for one of two workers; all start again from the last checkpoint, with the same result."""
    steps = {"trainer__max_steps": 12, "trainer__save_steps": 3, **TWO}
    finish(start(write_recipe(folder, "whole", **steps), 2))
    process = as_documented(words, write_recipe(folder, "killed", **steps))
    wait_for(lambda: reached(folder / "killed", 3), process)
    alive = workers(process)
    assert len(alive) == 2
    alive[1].kill()
    out = finish(process, seconds=200)
    assert "SIGKILL" in out or "-9" in out
    same_result(folder / "whole", folder / "killed")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_all_workers_save(folder, number):
    steps = {"trainer__max_steps": 5000, "trainer__save_steps": 5, **TWO}
    run = folder / "asked"
    process = as_documented(
        ["python", "-m", "cumo_model", "train", "--config"], write_recipe(folder, "asked", **steps)
    )
    wait_for(lambda: reached(run, 5), process)
    os.kill(process.pid, number)
    out = finish(process, code=130)
    last = checkpoints(run)[-1]
    step = last.name.removeprefix("checkpoint-")
    lines = [line for line in out.splitlines() if line.startswith("cumo:")]
    assert lines == [f"cumo: {run}: stopped at step {step}, progress is saved"]
    assert {path.name for path in last.glob("window_*")} == {"window_0_of_2.pt", "window_1_of_2.pt"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_of_the_recipe_is_one_line_and_is_not_tried_again(folder):
    """The workers find it, because the number of processes is known only there."""
    recipe = write_recipe(folder, "bad", stage__batch_size=3, **TWO)
    process = as_documented(["python", "-m", "cumo_model", "train", "--config"], recipe)
    out = finish(process, code=1)
    wanted = "cumo: stage.batch_size must be a multiple of 1 (micro-batch) x 2 (processes), got 3"
    assert [line for line in out.splitlines() if "cumo:" in line or "Error" in line] == [wanted]


def test_arguments_are_refused_in_one_line(folder, monkeypatch, capsys):
    recipe = str(write_recipe(folder))
    train = ["train", "--config", recipe]

    def refused(*words: str) -> str:
        assert main([*train, *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert refused("--processes", "0") == "cumo: --processes must be at least 1, got 0"
    assert refused("--processes", "-2") == "cumo: --processes must be at least 1, got -2"
    assert "--max-restarts must be at least 0, got -1" in refused("--processes", "2", "--max-restarts", "-1")
    assert "stage.nothing" in refused("--processes", "2", "stage.nothing=1")
    monkeypatch.setenv("RANK", "0")
    for words in (["--processes", "2"], ["--processes", "1"], ["--max-restarts", "2"]):
        assert "must be left out in a process that torchrun" in refused(*words)


def test_one_process_is_this_process(folder, monkeypatch):
    monkeypatch.setattr(launch, "supervise", None)
    recipe = write_recipe(folder, trainer__max_steps=1)
    assert main(["train", "--config", str(recipe), "--processes", "1"]) == 0
    assert (folder / "run" / "model").is_dir()


# Workers without imports. FILE is the file that says what the workers of an attempt have reported.
PRELUDE = """
import os, signal, sys, time
rank, file = os.environ.get("RANK", "0"), os.environ["TORCHELASTIC_ERROR_FILE"]
attempt = os.path.dirname(os.path.dirname(file))
FILE, first = attempt + "/reported.json", attempt.endswith("-0")
open(sys.argv[1] + "/started", "a").write(rank)
"""
READY = "open(f'{sys.argv[1]}/ready-{rank}', 'w').write(str(os.getpid()))\n"
SAVES = """
def save(*signal):
    time.sleep(0.5)
    open(FILE, "w").write('{"is_final": true}')
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
"""


def run(tmp_path: Path, code: str, processes: int = 2, max_restarts: int = 3) -> tuple[int, int]:
    """(exit code, number of attempts) of workers with this code."""
    found = supervise([sys.executable, "-c", PRELUDE + code, str(tmp_path)], processes, max_restarts)
    return found, (tmp_path / "started").read_text().count("0")


@pytest.mark.parametrize("processes", [1, 3])
def test_workers_find_each_other_and_share_the_cores(tmp_path, monkeypatch, processes):
    for name in ("OMP_NUM_THREADS", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "cores", lambda: 8)
    code = "import json; json.dump(dict(os.environ), open(f'{sys.argv[1]}/{rank}.json', 'w'))"
    assert run(tmp_path, code, processes) == (0, 1)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    assert {env["OMP_NUM_THREADS"] for env in found} == {str(8 // processes)}
    if processes > 1:
        assert [env["RANK"] for env in found] == [env["LOCAL_RANK"] for env in found] == ["0", "1", "2"]
        assert {env["WORLD_SIZE"] for env in found} == {"3"}
        assert len({env["MASTER_PORT"] for env in found}) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    run(tmp_path, code, processes)
    assert json.loads((tmp_path / "0.json").read_text())["OMP_NUM_THREADS"] == "5"


def test_a_killed_worker_is_restarted_and_no_more_than_asked(tmp_path, capfd):
    kill = "os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else None"
    assert run(tmp_path, f"if first: {kill}") == (0, 2)
    said = "cumo: worker 1 was killed by SIGKILL: restart 1 of 3, from the last checkpoint\n"
    assert capfd.readouterr().err == said
    (tmp_path / "started").unlink()
    assert run(tmp_path, kill, max_restarts=2) == (1, 3)
    assert capfd.readouterr().err.splitlines()[-1] == "cumo: worker 1 was killed by SIGKILL"


@pytest.mark.parametrize("is_final, attempts", [(True, 1), (False, 3)])
def test_only_an_error_that_may_pass_is_tried_again(tmp_path, capfd, is_final, attempts):
    report = (
        f"open(FILE, 'w').write('{{\"is_final\": {str(is_final).lower()}}}'); print('cumo: bad'); sys.exit(1)"
    )
    assert run(tmp_path, f"if rank == '1': {report}", max_restarts=2) == (1, attempts)
    assert capfd.readouterr().out == "cumo: bad\n" * attempts


def test_workers_that_wait_for_a_failed_one_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    stay = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    assert run(tmp_path, f"sys.exit(1) if rank == '1' else None\n{stay}", max_restarts=0) == (1, 1)


def in_process(tmp_path: Path, code: str) -> Forked:
    """`supervise` in a process of its own, after the workers have started."""
    words = [sys.executable, "-c", PRELUDE + code, str(tmp_path)]
    program = "import sys; from cumo_model.training.launch import supervise; "
    program += "sys.exit(supervise(sys.argv[1:], 2, 3))"
    process = Forked(["-c", program, *words], tmp_path / "out.txt")
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, process)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_as_sigterm(tmp_path, number):
    process = in_process(tmp_path, f"{SAVES}{READY}time.sleep(100)")
    process.send_signal(number)
    assert finish(process, code=130) == ""


def test_workers_that_end_before_they_can_report_are_reported(tmp_path):
    process = in_process(tmp_path, f"{READY}time.sleep(100)")
    process.send_signal(signal.SIGTERM)
    assert finish(process, code=130) == "cumo: stopped\n"


def test_workers_end_with_their_launcher(tmp_path):
    process = in_process(tmp_path, f"{READY}time.sleep(100)")
    pids = [int(path.read_text()) for path in tmp_path.glob("ready-*")]
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_folder_in_use_is_refused_before_workers_start(folder, monkeypatch, capsys):
    monkeypatch.setattr(launch, "supervise", None)
    recipe = write_recipe(folder)
    with locked(folder / "run"):
        assert main(["train", "--config", str(recipe), "--processes", "2"]) == 1
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert main(["train", "--config", str(recipe), "--processes", "2", "data.images=[]"]) == 1
    assert "data.images must name" in capsys.readouterr().err


def test_the_first_worker_that_fails_reports(tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for error, is_final in (
            (ValueError("x"), "true"),
            (FloatingPointError("nan"), "true"),
            (Interrupted("stopped"), "true"),
            (KeyboardInterrupt(), "true"),
            (RuntimeError("device"), "false"),
            (OSError("disk"), "false"),
            (OSError(errno.ENOSPC, "No space left on device"), "true"),
        ):
            attempt = tmp_path / f"{type(error).__name__}-{is_final}"
            attempt.mkdir()
            monkeypatch.setenv(launch.ERROR_FILE, str(attempt / "0" / "error.json"))
            with pytest.raises(type(error)), reported_once():
                raise error
            assert (attempt / launch.REPORTED).read_text() == f'{{"is_final": {is_final}}}'
            monkeypatch.setenv(launch.ERROR_FILE, str(attempt / "1" / "error.json"))
            with pytest.raises(SystemExit) as found, reported_once():
                raise error
            assert found.value.code == (130 if isinstance(error, Interrupted | KeyboardInterrupt) else 1)
            monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "nowhere" / "0" / "error.json"))
            with pytest.raises(type(error)), reported_once():
                raise error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("kind", [StaticTCPRendezvous, DynamicRendezvousHandler])
@pytest.mark.parametrize("variable", ["0", "1"])
@pytest.mark.parametrize("restarts", ["0", "3"])
def test_the_warning_is_given_where_restarted_workers_would_wait(
    tmp_path, monkeypatch, kind, variable, restarts
):
    """What torch's rendezvous says decides: the static one shares its store whatever the variable says."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", variable)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(kind.__new__(kind).use_agent_store))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        training_arguments(toy_recipe(tmp_path))
    texts = [str(warning.message) for warning in found if "torchrun" in str(warning.message)]
    waits = restarts == "3" and (kind is StaticTCPRendezvous or variable == "0")
    assert len(texts) == waits
    for text in texts:
        for remedy in (
            "--processes",
            "--standalone",
            "--rdzv-backend=c10d",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ):
            assert remedy in text
