"""Names and patterns of files: sorted, each once, relative or absolute; places of pictures."""

from pathlib import Path

import pytest

from cumo_model.data.patterns import check_roots, exists, matching, record_files

NUMBERS = [7, 2, 9, 4, 11, 0, 5, 1, 10, 3, 8, 6]  # the order in which a folder may list its files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for number in NUMBERS:
        (tmp_path / "sub" / f"{number:02}.jsonl").touch()
    for name in ("b.json", "a.json", "x[1].json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_of_a_pattern_are_sorted(folder):
    wanted = [f"sub/{number:02}.jsonl" for number in range(12)]
    assert matching("sub/*.jsonl") == record_files("sub/*.jsonl") == wanted
    absolute = [str(folder / name) for name in wanted]
    assert matching(str(folder / "sub" / "*.jsonl")) == matching(folder / "*" / "[01]?.jsonl") == absolute
    assert matching("sub/1?.jsonl") == wanted[10:]


def test_files_of_several_patterns_are_listed_once_in_the_order_of_the_patterns(folder):
    assert record_files(["b.json", Path("[ab].json"), "sub/0[01]*"]) == [
        "b.json", "a.json", "sub/00.jsonl", "sub/01.jsonl",
    ]  # fmt: skip
    assert record_files(Path("a.json")) == ["a.json"]
    for wrong, told in (
        (["a.json", "c*.json"], r"c\*\.json: the file does not exist"),
        ([], "one name or more"),
    ):
        with pytest.raises(ValueError, match=told):
            record_files(wrong)


def test_a_name_exists_as_it_is_or_as_a_pattern(folder):
    assert exists("a.json") and exists("x[1].json") and exists("sub") and exists("[a]*")
    assert not exists("c.json") and not exists("c*") and matching("x[1].json") == matching("c.json") == []


def test_places_of_pictures_are_folders_or_shards(folder):
    (folder / "0.tar").touch()
    (folder / "d.tar").mkdir()
    check_roots("must be", ["sub", "0.tar", "?.tar", str(folder), "d.tar"])
    for wrong in ("none", "1.tar", "[23].tar", "su*"):
        with pytest.raises(ValueError, match=r"^must be, got '.*', which does not exist"):
            check_roots("must be", ["sub", wrong])
    with pytest.raises(ValueError, match=r"must be, got the file 'a\.json'"):
        check_roots("must be", ["a.json"])
