"""Tests of tests/swept.py: the files that the hash covers, and when a record is invalid."""

from pathlib import Path

import pytest

from tests import swept


@pytest.fixture
def tree(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "kernel.cu").write_text("one")
    monkeypatch.setattr(swept, "ROOT", tmp_path)
    monkeypatch.setattr(swept, "RECORD", tmp_path / "swept.txt")
    for name in swept.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def printed(capsys) -> str:
    assert swept.main(["--print"]) == 0
    return capsys.readouterr().out.strip()


def test_every_file_that_marks_a_sweep_decides_the_hash():
    decide = set(swept.files())
    others = set((swept.ROOT / "tests").rglob("test_*.py")) - {Path(__file__).resolve()}
    marked = {path for path in others if "pytest.mark.sweep" in path.read_text()}
    assert len(marked) >= 5 and marked <= decide


def test_a_record_holds_until_a_file_changes(tree, capsys):
    assert swept.main([]) == 1  # no record exists
    assert swept.main(["--record", printed(capsys)]) == 0
    assert swept.main([]) == 0
    (tree / "csrc" / "kernel.cu").write_text("two")
    assert swept.main([]) == 1


def test_what_changed_on_the_way_or_was_switched_is_not_recorded(tree, capsys, monkeypatch):
    before = printed(capsys)
    (tree / "csrc" / "kernel.cu").write_text("two")
    assert swept.main(["--record", before]) == 1
    assert "not recorded: files changed" in capsys.readouterr().err
    monkeypatch.setenv("CUMO_BACKEND", "reference")
    assert swept.main(["--record", printed(capsys)]) == 1
    assert "not recorded: CUMO_BACKEND" in capsys.readouterr().err
    assert swept.main([]) == 1
