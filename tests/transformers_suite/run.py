"""Runs the common tests of transformers on CuMo and compares the outcomes with the list of exceptions.

    python -m tests.transformers_suite.run CHECKOUT   all variants
    python -m tests.transformers_suite.run CHECKOUT --only Dense -k generate
    python -m tests.transformers_suite.run CHECKOUT --peers   and count the peers' outcomes

CHECKOUT is a checkout of transformers, or its folder `tests`; nothing is downloaded and nothing is written
there. The tests run in a process of their own, in a temporary project in which `tests` is the package of the
checkout. A test that fails here is repeated on the peer, which is Llava, or CLIP for the tower. The checkout
may be of another release than the installed transformers, and a test that fails on the peer too says nothing
about CuMo. A test that is skipped here is repeated too: many tests ask the model what it supports, and a skip
may hide a missing promise.

The exit code is 1 if a test that is not listed in `exceptions.py` fails here but not on the peer, or is
skipped here and passes on the peer. It is also 1 if a listed test passes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from PIL import Image

from tests.transformers_suite.exceptions import EXCEPTIONS

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
MODELS, TOWERS, PROCESSORS = ("Dense", "MoE", "Mixtral"), ("DenseTower", "Tower"), ("Cumo", "Anyres")
CLASSES = {
    **{name: (f"{name}ModelTest", "LlavaModelTest") for name in MODELS},
    **{name: (f"{name}ModelTest", "ClipModelTest") for name in TOWERS},
    **{f"{name}Processor": (f"{name}ProcessorTest", "LlavaProcessorTest") for name in PROCESSORS},
}  # variant -> its class in cases.py, and the class that it is compared with
FAILED = ("failed", "xfailed")


@dataclass(frozen=True)
class Outcome:
    """Outcome of one test: passed, failed, skipped or xfailed, and the first line of the reason."""

    outcome: str
    why: str = ""


@dataclass
class Verdict:
    """Tests of one variant, by what they mean."""

    unexpected: dict[str, str]  # fails, is not listed, does not fail on the peer: name -> error
    skipped: dict[str, str]  # is skipped, is not listed, passes on the peer: name -> reason of the skip
    of_peer: dict[str, str]  # fails, is not listed, fails on the peer too
    listed: dict[str, str]  # fails or is skipped, and is listed: name -> reason of the list
    now_passing: list[str]  # is listed and passes
    counts: Counter


def tests_folder(checkout: str | os.PathLike) -> Path:
    """The package `tests` of a checkout of transformers.

    Raises:
        ValueError: the folder has no common tests.
    """
    for folder in (Path(checkout) / "tests", Path(checkout)):
        if (folder / "test_modeling_common.py").is_file():
            return folder.resolve()
    raise ValueError(
        "TRANSFORMERS_TESTS must be a checkout of transformers, with tests/test_modeling_common.py, "
        f"got {os.fspath(checkout)!r}"
    )


def reason_of(variant: str, name: str, exceptions: dict[str, str]) -> str | None:
    """The reason with which a test is listed; keys are `VARIANT::TEST`, both with wildcards."""
    return next((why for key, why in exceptions.items() if fnmatchcase(f"{variant}::{name}", key)), None)


def judge(
    variant: str, found: dict[str, Outcome], peer: dict[str, Outcome], exceptions: dict[str, str]
) -> Verdict:
    """Compare the outcomes of one variant with the list of exceptions and with the peer's outcomes."""
    verdict = Verdict({}, {}, {}, {}, [], Counter(outcome.outcome for outcome in found.values()))
    for name, result in found.items():
        reason = reason_of(variant, name, exceptions)
        other = peer[name].outcome if name in peer else None
        if reason is not None:
            if result.outcome == "passed":
                verdict.now_passing.append(name)
            else:
                verdict.listed[name] = reason
        elif result.outcome in FAILED:
            (verdict.of_peer if other in FAILED else verdict.unexpected)[name] = result.why
        elif result.outcome == "skipped" and other == "passed":
            verdict.skipped[name] = result.why
    return verdict


def run_tests(folder: Path, selected: Sequence[str], options: Sequence[str] = ()) -> dict[str, Outcome]:
    """Run tests `CLASS` or `CLASS::TEST` of cases.py.

    Args:
        folder: the package `tests` of transformers.
        selected: tests.
        options: further arguments of pytest.

    Returns:
        The outcome of each test, by its name `CLASS::TEST`.
    """
    if not selected:
        return {}
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        (project / "tests").symlink_to(folder)
        (project / "utils").symlink_to(folder.parent / "utils")  # has modules that the tests import
        (project / "pytest.ini").write_text(
            "[pytest]\naddopts = -p no:cacheprovider --import-mode=importlib\n"
        )
        shutil.copy(HERE / "cases.py", project / "test_processing_cumo.py")
        shutil.copy(HERE / "recorder.py", project / "conftest.py")
        shutil.copy(HERE / "stand_ins.py", project)
        Image.new("RGB", (300, 200), "orange").save(project / "picture.png")
        results = project / "results.jsonl"
        results.touch()
        (project / "selected.json").write_text(json.dumps(list(selected)))
        # pytest-xdist of an outer run must not make the recorder take this one for a worker of it
        outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = {
            **outer,
            "PYTHONPATH": os.pathsep.join([str(project), str(ROOT)]),
            "CUMO_SUITE_RESULTS": str(results),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "--tb=short", "-rN", *options]
        command.append("test_processing_cumo.py")
        done = subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        if done.returncode not in (0, 1, 5) or (not lines and done.returncode != 5):  # 5: nothing selected
            raise RuntimeError(f"pytest stopped with code {done.returncode}:\n{done.stdout}{done.stderr}")
    found: dict[str, Outcome] = {}
    for line in lines:
        first = line["why"].strip().splitlines()[:1]
        # a failure of setup or teardown counts more than the outcome of the test itself
        if line["name"] not in found or line["outcome"] == "failed":
            found[line["name"]] = Outcome(line["outcome"], "".join(first))
    return found


def of_class(found: dict[str, Outcome], name: str) -> dict[str, Outcome]:
    """The outcomes of one class, by the names of its tests."""
    return {key.split("::")[1]: value for key, value in found.items() if key.split("::")[0] == name}


def run_suite(
    checkout: str | os.PathLike,
    variants: Iterable[str] = tuple(CLASSES),
    options: Sequence[str] = (),
    with_peers: bool = False,
) -> tuple[dict[str, Verdict], dict[str, Counter]]:
    """Run the variants, then the peers: all its tests, or those that do not pass on a variant.

    Returns:
        The verdict of each variant, and the counts of the peers' outcomes if they ran completely.
    """
    folder, variants = tests_folder(checkout), list(variants)
    found = run_tests(folder, [CLASSES[variant][0] for variant in variants], options)
    others = sorted({CLASSES[variant][1] for variant in variants})
    if with_peers:
        peers = run_tests(folder, others, options)
    else:
        open_ = {
            f"{CLASSES[variant][1]}::{name}"
            for variant in variants
            for name, result in of_class(found, CLASSES[variant][0]).items()
            if result.outcome != "passed" and reason_of(variant, name, EXCEPTIONS) is None
        }
        peers = run_tests(folder, sorted(open_), options)
    verdicts = {
        variant: judge(variant, of_class(found, ours), of_class(peers, other), EXCEPTIONS)
        for variant, (ours, other) in CLASSES.items()
        if variant in variants
    }
    counts = (
        {o: Counter(r.outcome for r in of_class(peers, o).values()) for o in others} if with_peers else {}
    )
    return verdicts, counts


def is_bad(verdict: Verdict) -> bool:
    return bool(verdict.unexpected or verdict.skipped or verdict.now_passing)


def told(counts: Counter) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no tests"


def report(verdicts: dict[str, Verdict], counts: dict[str, Counter]) -> str:
    """The outcomes as text: a line of counts per variant, and a line per test that needs attention."""
    lines = []
    for variant, verdict in verdicts.items():
        lines.append(
            f"{variant}: {told(verdict.counts)}; {len(verdict.listed)} are listed, "
            f"{len(verdict.of_peer)} fail on the peer too"
        )
        lines += [f"  fails on the peer too: {name}: {why}" for name, why in verdict.of_peer.items()]
        lines += [f"  FAILED: {name}: {why}" for name, why in verdict.unexpected.items()]
        lines += [
            f"  SKIPPED, BUT PASSES ON THE PEER: {name}: {why}" for name, why in verdict.skipped.items()
        ]
        lines += [f"  LISTED, BUT PASSES: {name}" for name in verdict.now_passing]
    return "\n".join(lines + [f"{name}: {told(count)}" for name, count in counts.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", default=os.environ.get("TRANSFORMERS_TESTS"))
    parser.add_argument("--only", nargs="+", choices=CLASSES, default=list(CLASSES), metavar="VARIANT")
    parser.add_argument("--peers", action="store_true", help="run all tests of the peers too, and count them")
    parser.add_argument("-k", metavar="WORDS", help="as in pytest")
    parser.add_argument("-n", default="2", metavar="N", help="processes")
    parser.add_argument("--seconds", default="300", help="time limit of one test")
    given = parser.parse_args(arguments)
    if not given.checkout:
        print("set TRANSFORMERS_TESTS to a checkout of transformers")
        return 2
    options = ["-n", given.n, f"--timeout={given.seconds}", *(["-k", given.k] if given.k else [])]
    verdicts, counts = run_suite(given.checkout, given.only, options, given.peers)
    print(report(verdicts, counts))
    return int(any(map(is_bad, verdicts.values())))


if __name__ == "__main__":
    sys.exit(main())
