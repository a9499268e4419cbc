"""Runs verify in a second process, next to this one or in its place, and reads its results."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from cumo_kernels.verification.verdicts import Result


class Beside:
    """A verify that runs in its own process from now on; `stop` must be called at the end.

    Args:
        options: its command line, with --device and --backend.
        switches: environment variables that it has in addition.
    """

    def __init__(self, options: list[str], switches: dict[str, str]):
        self._options, self._switches, self._done = options, switches, 0
        self._folder = tempfile.TemporaryDirectory()
        self._report = Path(self._folder.name, "report.json")
        command = [sys.executable, "-m", "cumo_kernels", "verify", "--quiet", "--json", str(self._report)]
        environment = {**os.environ, **switches}
        environment.pop("CUMO_BACKEND", None)
        self._process = subprocess.Popen([*command, *options], env=environment, stdout=subprocess.DEVNULL)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def done(self) -> int:
        """The number of cases that have ended so far."""
        with suppress(FileNotFoundError):  # it exists from the first case to the last
            self._done = Path(f"{self._report}.lines").read_bytes().count(b"\n")
        return self._done

    def results(self) -> tuple[list[Result], list[str]]:
        """Wait for its end -> results, and messages about what was not checked."""
        code = self._process.wait()
        try:
            report = json.loads(self._report.read_text())
            return [Result(**row) for row in report["results"]], report["not_checked"]
        except (OSError, json.JSONDecodeError, KeyError):
            options = self._options
            words = " ".join([*(f"{name}={value}" for name, value in self._switches.items()), *options])
            failure = f"a separate process ended with {code} and no result: verify {words}"
            device, backend = (options[options.index(name) + 1] for name in ("--device", "--backend"))
            return [Result("expert_mlp", backend, device, failures=[failure])], []

    def stop(self) -> None:
        """End the process if it still runs, and remove its files."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def elsewhere(options: list[str], switches: dict[str, str]) -> tuple[list[Result], list[str]]:
    """Verify in a separate process and wait for it -> what `Beside.results` returns."""
    beside = Beside(options, switches)
    try:
        return beside.results()
    finally:
        beside.stop()
