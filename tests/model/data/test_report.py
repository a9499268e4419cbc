"""The command `data check`: every problem with its line, in order, and what was not looked at."""

import json
import tarfile

import pytest
from PIL import Image

from cumo_model.__main__ import main
from cumo_model.data import check
from cumo_model.data.records import _in_order
from cumo_model.data.report import check_files


def _record(number, image=None, question="what?"):
    marker = "" if image is None else "<image>"
    turns = [{"from": "human", "value": marker + question}, {"from": "gpt", "value": "red"}]
    return {"id": number, "conversations": turns} | ({} if image is None else {"image": image})


def _write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def _run(capsys, *arguments):
    code = main(["data", "check", *map(str, arguments)])
    return code, capsys.readouterr().out.splitlines()


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    return tmp_path


def test_it_says_what_was_not_looked_at(folder, capsys):
    path = _write(folder / "x.jsonl", [_record(0, "a.png"), _record(1), _record(2, ["a.png"])])
    counted = f"{path}: 3 records, 0 cannot be used"
    assert _run(capsys, path) == (
        0,
        [counted, f"{path}: 2 pictures were not looked at; --images names their folder"],
    )
    assert _run(capsys, path, "--images", folder) == (
        0,
        [counted, f"{path}: 2 pictures were found, not decoded; --decode reads them"],
    )
    assert _run(capsys, path, "--images", folder, "--decode") == (0, [counted])
    text = _write(folder / "text.jsonl", [_record(1), {**_record(2), "image": None}])
    assert _run(capsys, text) == (0, [f"{text}: 2 records, 0 cannot be used"])


def test_it_names_lines_of_records_without_labels(folder, capsys):
    records = [_record(n, question="see </s>" if n % 2 else "what?") for n in range(13)]
    path = _write(folder / "x.jsonl", records)
    code, lines = _run(capsys, path)
    assert code == 0 and lines[-1] == (
        f"{path}: 13 records, 0 cannot be used, 6 have no usable label (lines 2, 4, 6, 8, 10, ...)"
    )
    assert lines[0].startswith(f"{path}:2: record 1 (id 1): turn 1 holds </s>") and len(lines) == 7
    one = _write(folder / "one.jsonl", records[:2])
    assert _run(capsys, one)[1][-1].endswith("1 have no usable label (line 2)")


def test_every_file_is_looked_at_once_and_a_missing_one_counts(folder, capsys):
    """The pictures of a shard are those in it, also without --images."""
    good = _write(folder / "good.jsonl", [_record(0)])
    bad = _write(folder / "bad.jsonl", [_record(0), {"id": 1}, _record(2), {"id": 3}])
    shard = folder / "x.tar"
    with tarfile.open(shard, "w") as tar:
        for number, name in enumerate(("a.png", "gone.png")):
            tar.add(_write(folder / "record", [_record(number, name)]), f"{number}.json")
        tar.add(folder / "a.png", "a.png")
    gone = folder / "gone*.jsonl"
    assert check_files([good, gone, bad, folder / "*.jsonl", shard]) == 1 + 2 + 1
    lines = capsys.readouterr().out.splitlines()
    counted = [line for line in lines if "cannot be used" in line]
    assert counted == [
        f"{good}: 1 record, 0 cannot be used",
        f"{bad}: 4 records, 2 cannot be used",
        f"{shard}: 2 records, 1 cannot be used",
    ]
    assert lines[0] == f"{gone}: the file does not exist"
    assert lines[-1] == f"{shard}: 1 picture was found, not decoded; --decode reads it"
    assert check_files([good]) == 0 and check_files([gone]) == 1


@pytest.mark.parametrize("shard", [False, True])
def test_decoding_in_parallel_keeps_the_order(folder, shard):
    """Many more records than are decoded at once, some of them bad; the last problem is that of the file."""
    records = [_record(n, "a.png" if n % 3 else f"bad{n % 2}.png") for n in range(400)]
    (folder / "bad0.png").write_bytes((folder / "a.png").read_bytes()[:20])
    (folder / "bad1.png").write_bytes(b"")
    root = folder
    if shard:
        root = folder / "all.tar"
        with tarfile.open(root, "w") as tar:
            for name in ("a.png", "bad0.png", "bad1.png"):
                tar.add(folder / name, name)
    path = folder / "x.json"
    path.write_text(json.dumps(records, indent=1)[:-1])
    count = [0]
    problems = list(check(path, root, decode=True, count=count))
    assert [problem.record for problem in problems] == [*range(0, 400, 3), 400] and count == [401]
    assert all(f"bad{p.record % 2}.png" in p.reason for p in problems[:-1])
    assert "the file ends inside the list" in problems[-1].reason


def test_a_key_that_is_repeated_is_a_problem(folder, capsys):
    twice = '{"id": 1, "image": "b.png", "image": "a.png", "conversations": []}'
    inside = '{"id": 1, "conversations": [{"from": "human", "value": "a", "value": "b"}]}'
    path = _write(folder / "x.jsonl", [_record(0), twice, inside])
    code, lines = _run(capsys, path)
    assert code == 1 and lines[:2] == [
        f"{path}:2: record 1: has the key 'image' more than once",
        f"{path}:3: record 2: has the key 'value' more than once",
    ]


def test_what_was_begun_is_finished_when_reading_fails():
    def numbers():
        yield from range(3)
        raise ValueError("torn")

    done = []
    with pytest.raises(ValueError, match="torn"):
        for number in _in_order(lambda number: -number, numbers()):
            done.append(number)
    assert done == [0, -1, -2]
