"""Pictures by name: a name means the same in a folder and in a tar of it, and links stay inside the roots."""

import errno
import io
import json
import os
import re
import tarfile

import pytest
from PIL import Image

from cumo_model.data import ConversationDataset, Pictures, StreamedConversations, check, scan
from cumo_model.data.pictures import KNOWN_DIRECTORIES, is_system_failure
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing import build_processor

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]


def _png(colour):
    data = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(data, "PNG")
    return data.getvalue()


def _add(tar, name, data=None, **more):
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    info.size = len(data or b"")
    tar.addfile(info, None if data is None else io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(_png("red"))
    (root / "sub" / "b.png").write_bytes(_png("blue"))
    return root


@pytest.fixture(scope="module")
def processor():
    return build_processor(train_tokenizer(["what? red"] * 9, 300), 12, 4)


def _colour(pictures, name):
    return pictures.load(name).getpixel((0, 0))


SPELLINGS = {
    "a.png": "red",
    "./a.png": "red",
    "sub/b.png": "blue",
    "sub/./b.png": "blue",
    "sub//b.png": "blue",
}


@pytest.mark.parametrize("prefix", ["", "./", "/"])
def test_a_name_means_the_same_in_a_folder_and_in_a_tar(folder, tmp_path, prefix):
    shard = tmp_path / "all.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("a.png", "sub/b.png"):
            _add(tar, prefix + name, (folder / name).read_bytes())
    for pictures in (Pictures(folder), Pictures(shard)):
        for name, colour in SPELLINGS.items():
            assert pictures.problem(name) is None
            assert _colour(pictures, name) == {"red": (255, 0, 0), "blue": (0, 0, 255)}[colour]
        for name in ("a.png/", "A.png", "sub", "b.png", ".", "a\0.png"):
            assert "does not exist under" in pictures.problem(name), name
            with pytest.raises(ValueError, match="does not exist under"):
                pictures.load(name)
        for name in ("../root/a.png", "/a.png", "sub/../a.png", str(folder / "a.png")):
            assert "must lie under image_root" in pictures.problem(name), name
            with pytest.raises(ValueError, match="must lie under image_root"):
                pictures.load(name)


@pytest.mark.parametrize("shard", [False, True])
def test_an_absolute_path_in_a_data_file_is_refused(folder, tmp_path, processor, shard):
    """Also that of a picture under the root, by every reader; with skip_bad the record is left out."""
    root = folder
    if shard:
        root = tmp_path / "all.tar"
        with tarfile.open(root, "w") as tar:
            _add(tar, str(folder / "a.png").lstrip("/"), _png("red"))
            _add(tar, "a.png", _png("red"))
    records = [
        {"id": n, "image": name, "conversations": TURNS}
        for n, name in enumerate(("a.png", str(folder / "a.png")))
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    told = r"x\.jsonl:2: record 1 \(id 1\): image '/.*a\.png' must lie under image_root"
    for decode in (False, True):
        (problem,) = check(path, root, decode=decode)
        assert re.search(told, str(problem))
    for kind in (ConversationDataset, StreamedConversations):
        with pytest.raises(ValueError, match=told):
            kind(path, root, processor)
    with pytest.warns(UserWarning, match=f"left out: .*{told}"):
        data = StreamedConversations(path, root, processor, skip_bad=True)
    assert [data.record(i)["id"] for i in range(len(data))] == [0]


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c.png").write_bytes(_png("green"))
    (folder / "in.png").symlink_to("sub/b.png")
    (folder / "out.png").symlink_to(tmp_path / "out" / "c.png")
    (folder / "out").symlink_to(tmp_path / "out")
    pictures = Pictures(folder)
    assert _colour(pictures, "in.png") == (0, 0, 255)
    for name in ("out.png", "out/c.png"):
        for _ in range(2):
            assert "is a link that leads out of" in pictures.problem(name)
            with pytest.raises(ValueError, match=r"^image .*is a link that leads out of"):
                pictures.load(name)
    both = Pictures([folder, tmp_path / "out"])
    for name in ("out.png", "out/c.png", "c.png"):
        assert both.problem(name) is None and _colour(both, name) == (0, 128, 0)
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be reached through a link
    assert _colour(Pictures(tmp_path / "link"), "a.png") == (255, 0, 0)


def test_remembered_directories_are_bounded(folder, monkeypatch):
    monkeypatch.setattr("cumo_model.data.pictures.KNOWN_DIRECTORIES", 1)
    pictures = Pictures(folder)
    for name in ("a.png", "sub/b.png", "a.png"):
        assert pictures.problem(name) is None and len(pictures._inside) == 1
    assert KNOWN_DIRECTORIES > 1


def test_links_in_a_tar_are_followed_inside_it(tmp_path):
    shard = tmp_path / "links.tar"
    link, symbolic = {"type": tarfile.LNKTYPE}, {"type": tarfile.SYMTYPE}
    with tarfile.open(shard, "w") as tar:
        _add(tar, "./x/a.png", _png("red"))
        _add(tar, "x/hard.png", linkname="./x/a.png", **link)
        _add(tar, "x/soft.png", linkname="a.png", **symbolic)
        _add(tar, "y/soft.png", linkname="../x/soft.png", **symbolic)
        _add(tar, "out.png", linkname="../../etc/a.png", **symbolic)
        _add(tar, "etc.png", linkname="/etc/a.png", **symbolic)
        _add(tar, "loop.png", linkname="loop.png", **symbolic)
        _add(tar, "pipe.png", type=tarfile.FIFOTYPE)
    pictures = Pictures(shard)
    for name in ("x/a.png", "x/hard.png", "x/soft.png", "y/soft.png"):
        assert pictures.problem(name, decode=True) is None and _colour(pictures, name) == (255, 0, 0)
    for name in ("out.png", "etc.png", "loop.png"):
        assert "is a link to" in pictures.problem(name) and "links.tar" in pictures.problem(name)
    assert "is not a regular file" in pictures.problem("pipe.png")
    assert list(scan(shard)) == []  # an archive that ends with a link is not truncated


def test_links_to_directories_in_a_tar_are_followed_as_in_its_folder(folder, tmp_path):
    """Both give the same picture or the same refusal for every name."""
    for name, target in {
        "link": "sub",
        "sub/up": "..",
        "twice": "link/up/sub",
        "file.png": "twice/b.png",
        "out": "../other",
        "circle": "circle/x",
    }.items():
        (folder / name).symlink_to(target)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.png").write_bytes(_png("green"))
    shard = tmp_path / "all.tar"
    with tarfile.open(shard, "w") as tar:
        tar.add(folder, ".")
    both = Pictures(folder), Pictures(shard)
    for name in ("link/b.png", "sub/up/a.png", "twice/b.png", "file.png", "link/up/link/b.png"):
        for pictures in both:
            assert _colour(pictures, name) == ((255, 0, 0) if name.endswith("a.png") else (0, 0, 255)), name
    for name in ("link", "link/a.png", "out/c.png", "circle/b.png", "circle", "sub/up", "twice"):
        assert all(pictures.problem(name) for pictures in both), name
    assert "'out' in " in both[1].problem("out/c.png") and "is a link to '../other'" in both[1].problem(
        "out/c.png"
    )
    assert "does not exist under" in both[1].problem("link/a.png")


def test_a_picture_beside_a_record_that_is_a_link_out_is_named(tmp_path):
    shard = tmp_path / "out.tar"
    with tarfile.open(shard, "w") as tar:
        _add(tar, "a.json", json.dumps({"conversations": TURNS}).encode())
        _add(tar, "a.png", linkname="/data/a.png", type=tarfile.SYMTYPE)
        _add(tar, "b.json", json.dumps({"image": "a.png", "conversations": TURNS}).encode())
    first, second = (problem.reason for problem in check(shard, shard))
    said = "is a link to '/data/a.png', which is not a file of the same tar file"
    assert first == f"has 'a.png' beside it, which {said}"
    assert second.startswith("image 'a.png' in ") and second.endswith(said)


@pytest.mark.parametrize("image", [None, [], ""])
def test_a_record_that_says_it_has_no_picture_gets_none(tmp_path, image):
    """In a shard as in a list of records, also if a picture lies beside it."""
    shard, records = tmp_path / "none.tar", tmp_path / "none.json"
    text = [{**TURNS[0], "value": "what?"}, TURNS[1]]
    rows = [{"image": image, "conversations": turns} for turns in (text, TURNS)]
    records.write_text(json.dumps(rows))
    with tarfile.open(shard, "w") as tar:
        for number, row in enumerate(rows):
            _add(tar, f"{number}.json", json.dumps(row).encode())
            _add(tar, f"{number}.png", _png("red"))
    assert [row.value for row in scan(shard)] == rows and not any(row.beside for row in scan(shard))
    reasons = [[(p.record, p.reason) for p in check(file, shard)] for file in (shard, records)]
    assert reasons[0] == reasons[1] and [record for record, _ in reasons[0]] == [1]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_failure_of_the_system_is_not_a_missing_picture(folder, monkeypatch, code):
    def fails(path, *args, **more):
        raise OSError(code, os.strerror(code), path)

    pictures = Pictures(folder)
    monkeypatch.setattr("cumo_model.data.pictures.os.stat", fails)
    with pytest.raises(ValueError, match=f"image 'a.png' cannot be read: {os.strerror(code)}") as error:
        pictures.place("a.png")
    assert is_system_failure(error.value)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="does not exist") as error:
        pictures.place("gone.png")
    assert not is_system_failure(error.value)


def test_equal_records_that_tar_stores_as_links_are_read(tmp_path):
    shard = tmp_path / "records.tar"
    record = json.dumps({"conversations": TURNS}).encode()
    with tarfile.open(shard, "w") as tar:
        _add(tar, "./0.json", record)
        _add(tar, "./0.png", _png("red"))
        _add(tar, "./1.json", linkname="./0.json", type=tarfile.LNKTYPE)
        _add(tar, "./1.png", linkname="./0.png", type=tarfile.LNKTYPE)
        _add(tar, "2.json", linkname="gone.json", type=tarfile.SYMTYPE)
    assert [row.value["image"] for row in scan(shard) if not row.reason] == ["0.png", "1.png"]
    (problem,) = check(shard, shard, decode=True)
    assert "'2.json' is a link to 'gone.json'" in problem.reason


def test_the_last_member_of_a_name_is_used_and_the_first_shard(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        _add(tar, "a.png", _png("red"))
        _add(tar, "./a.png", _png("blue"))
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        _add(tar, "a.png", _png("green"))
    assert _colour(Pictures(tmp_path / "*.tar"), "a.png") == (0, 0, 255)


def test_of_several_roots_each_is_read(folder, tmp_path):
    """The first shard that has the name, else the first folder; a damaged picture names its own shard."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        _add(tar, "x.png", _png("red"))
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        _add(tar, "pad.png", _png("white"))
        _add(tar, "x.png", _png("blue"))
        _add(tar, "y.png", _png("lime"))
        _add(tar, "bad.png", b"no picture")
        _add(tar, "out.png", linkname="/etc/a.png", type=tarfile.SYMTYPE)
    (tmp_path / "more").mkdir()
    for name, colour in (("a.png", "black"), ("x.png", "black"), ("z.png", "white")):
        (tmp_path / "more" / name).write_bytes(_png(colour))
    pictures = Pictures([folder, tmp_path / "more", tmp_path / "0.tar", tmp_path / "1.tar"])
    found = {name: _colour(pictures, f"{name}.png") for name in "axyz"}
    red, lime, white = (255, 0, 0), (0, 255, 0), (255, 255, 255)
    assert found == {"a": red, "x": red, "y": lime, "z": white}
    assert _colour(Pictures([tmp_path / "1.tar", tmp_path / "0.tar"]), "x.png") == (0, 0, 255)
    for pattern in ("*.tar", "?.tar", "[01].tar"):
        assert [_colour(Pictures(tmp_path / pattern), f"{n}.png") for n in "xy"] == [red, lime]
    with pytest.raises(ValueError, match="fits no tar file"):
        Pictures(tmp_path / "[23].tar")
    assert re.search(
        r"image 'bad\.png in .*1\.tar' is not a picture", pictures.problem("bad.png", decode=True)
    )
    assert re.search(r"image 'out\.png' in '.*1\.tar' is a link to", pictures.problem("out.png"))
    (tmp_path / "0.tar").unlink()
    with pytest.raises(ValueError, match=r"image 'x\.png in .*0\.tar' cannot be read: No such file"):
        pictures.load("x.png")
    told = pictures.problem("none.png")
    assert all(repr(str(root)) in told for root in pictures.roots)


def test_a_picture_that_decodes_but_has_no_colours_is_a_problem(folder):
    Image.new("F", (4, 4), float("nan")).save(folder / "nan.tif")
    pictures = Pictures(folder)
    assert pictures.problem("nan.tif") is None
    assert "'nan.tif' must have finite values" in pictures.problem("nan.tif", decode=True)


def test_members_beside_a_record(tmp_path):
    """Every suffix of a picture, in any case; other media and a second record of a name are problems."""
    shard = tmp_path / "beside.tar"
    suffixes = ["jfif", "JPG", "tif", "tiff", "avif", "jpe", "webp", "PNG"]
    with tarfile.open(shard, "w") as tar:
        for number, suffix in enumerate(suffixes):
            _add(tar, f"./{number}.json", json.dumps({"conversations": TURNS}).encode())
            _add(tar, f"{number}.{suffix}", _png("red"))
    assert [row.value.get("image") for row in scan(shard)] == [f"{n}.{s}" for n, s in enumerate(suffixes)]
    assert list(check(shard, shard, decode=True)) == []
    with tarfile.open(shard, "w") as tar:  # the record with the longest name that begins that of the member
        for name in ("a", "a.b"):
            _add(tar, f"{name}.json", json.dumps({"conversations": TURNS}).encode())
        for name in ("a.0.left.png", "a.b.0.left.png", "c.png"):
            _add(tar, name, _png("red"))
    rows = list(scan(shard))
    assert [row.value["image"] for row in rows] == ["a.0.left.png", "a.b.0.left.png"]
    assert [(row.number, row.line) for row in rows] == [(0, 1), (1, 2)]
    record = json.dumps({"conversations": [{**TURNS[0], "value": "what?"}, TURNS[1]]}).encode()
    with tarfile.open(shard, "w") as tar:
        _add(tar, "a.json", record)
        _add(tar, "a.MP4", b"0")
        _add(tar, "b.json", record)
        _add(tar, "./b.json", record)
    assert [(p.record, p.reason) for p in check(shard, shard)] == [
        (0, "has 'a.MP4' beside it, but only pictures are read"),
        (2, "is the second member with the name 'b.json'"),
    ]
