"""conftest.py of the temporary project: selects tests, and writes each outcome as a line of JSON."""

import json
import os

from stand_ins import import_tests

for module in ("generation.test_utils", "test_modeling_common", "test_processing_common"):
    common = import_tests(f"tests.{module}")
PICTURE = os.path.abspath("picture.png")  # instead of downloads
common.MODALITY_INPUT_DATA["images"] = [PICTURE] * 2
common.url_to_local_path = lambda *_: PICTURE


def pytest_collection_modifyitems(config, items):
    """Keep the classes and tests that are named in selected.json."""
    selected = set(json.loads((config.rootpath / "selected.json").read_text()))
    kept = [item for item in items if selected & {item.cls.__name__, f"{item.cls.__name__}::{item.name}"}]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    is_part = report.when != "call" or hasattr(report, "context")  # setup and teardown, or a subtest
    if is_part and report.outcome == "passed":
        return
    outcome = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if outcome == "skipped" else "failed"
    _, _, name = report.nodeid.partition("::")
    why = ""
    if report.longrepr is not None:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else str(report.longrepr[-1] if report.skipped else report.longrepr)
    line = {"name": name, "outcome": outcome, "why": why, "seconds": round(report.duration, 2)}
    with open(os.environ["CUMO_SUITE_RESULTS"], "a") as out:
        out.write(json.dumps(line) + "\n")
