"""Tests of the demo's data: fetching, matching, rendering, splitting and questions, on fixtures.

Two of the four families contain real drawings, the other two contain plain shapes.
"""

import hashlib
import io
import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from cumo_model.data import ConversationDataset, check
from cumo_model.demo import emoji, packages, questions
from cumo_model.demo.emoji import COLOURS, Concept, Drawing, colour_shares
from cumo_model.processing.processor import build_processor

FIXTURES = Path(__file__).parents[2] / "fixtures" / "emoji"
PAINTS = {
    "red": "#e02020",
    "yellow": "#f5d020",
    "green": "#20a040",
    "blue": "#2060e0",
    "purple": "#7b30c0",
    "white": "#fdfdfd",
}
OTHER_COLOURS = [
    ("red", (220, 30, 30)),
    ("orange", (250, 150, 20)),
    ("brown", (120, 70, 40)),
    ("black", (20, 20, 22)),
    ("grey", (100, 115, 125)),
]


def _tarball(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _plain_family(names, shape):
    """A family with one plain shape per concept; shapes differ by colour and size."""
    paints = list(PAINTS.values())
    bodies = {
        name: {"body": shape.format(paint=paints[i % len(paints)], size=20 + i)}
        for i, name in enumerate(names)
    }
    return {"icons": bodies, "aliases": {}, "width": 128, "height": 100}


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("npm")
    base = json.loads((FIXTURES / "emojibase.json").read_text())
    made = {
        "emojibase": _tarball(
            folder / "e.tgz", {"en/data.json": base["data"], "meta/groups.json": base["groups"]}
        )
    }
    for family in ("noto", "fluent"):
        content = json.loads((FIXTURES / f"{family}.json").read_text())
        made[family] = _tarball(
            folder / f"{family}.tgz", {"icons.json": content["icons"], "chars.json": content["chars"]}
        )
    chars = content["chars"]
    square = _plain_family(chars.values(), '<rect x="5" y="5" width="{size}" height="60" fill="{paint}"/>')
    made["twemoji"] = _tarball(folder / "t.tgz", {"icons.json": square, "chars.json": chars})
    slugs = [re.sub("[^a-z0-9]+", "-", r["label"].lower().replace("\u2019", "")) for r in base["data"]]
    round_ = _plain_family(slugs, '<circle cx="64" cy="50" r="{size}" fill="{paint}"/>')
    made["emojione"] = _tarball(folder / "o.tgz", {"icons.json": round_, "chars.json": {}})
    return made


@pytest.fixture(scope="module")
def drawings(tarballs):
    return emoji.load(tarballs, "core")


@pytest.fixture(scope="module")
def dataset(tarballs, tmp_path_factory):
    """(folder, manifest) of a data set made from the fixtures."""
    patch = pytest.MonkeyPatch()
    patch.setattr(packages, "fetch", lambda cache, progress: tarballs)
    out = tmp_path_factory.mktemp("data") / "demo"
    manifest = questions.make_dataset(
        out, quick=True, progress=False, cache_dir=tmp_path_factory.mktemp("cache")
    )
    patch.undo()
    return out, manifest


def _records(dataset, name):
    return json.loads((dataset[0] / f"{name}.json").read_text())


def test_every_family_is_matched_to_every_concept(drawings):
    assert Counter(d.family for d in drawings) == dict.fromkeys(emoji.FAMILIES, 21)
    concepts = {d.concept.name: d.concept for d in drawings}
    assert concepts["red apple"].codepoint == "1f34e"
    assert (concepts["red apple"].kind, concepts["red apple"].group) == ("fruit", "food")
    assert "woman's sandal" in concepts  # a plain apostrophe, and matched by name to a key without one
    assert all("apple" not in word for word in concepts["red apple"].keywords)


def test_one_picture_under_two_names_is_dropped(tarballs, tmp_path):
    base = json.loads((FIXTURES / "noto.json").read_text())
    icons = base["icons"]
    icons["icons"]["pear"] = icons["icons"]["lemon"]
    mixed = tarballs | {
        "noto": _tarball(tmp_path / "n.tgz", {"icons.json": icons, "chars.json": base["chars"]})
    }
    found = {d.key for d in emoji.load(mixed, "core")}
    assert "1f350-noto" not in found and "1f34b-noto" not in found and "1f350-fluent" in found


def test_mirrored_aliases_are_not_drawings_of_the_concept():
    icons = {
        "icons": {"left": {"body": "x"}},
        "aliases": {"right": {"parent": "left", "hFlip": True}, "l": {"parent": "left"}},
    }
    assert emoji._svg(icons, {"1": "right", "2": "l"}, "1", "right") is None
    assert "x</svg>" in emoji._svg(icons, {"1": "right", "2": "l"}, "2", "l")


def test_concept_set_is_checked(tarballs):
    with pytest.raises(ValueError, match=r"concept_set must be one of \('core', 'full'\), got 'all'"):
        emoji.load(tarballs, "all")


def test_rasterise_is_square_transparent_and_cached(drawings, tmp_path, monkeypatch):
    pixels = emoji.rasterise(drawings[:6], 32, tmp_path)
    assert pixels.shape == (6, 32, 32, 4) and pixels.dtype == np.uint8
    assert pixels[..., 3].min() == 0 and pixels[..., 3].max() == 255
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    monkeypatch.setattr("resvg_py.svg_to_bytes", None)
    assert np.array_equal(emoji.rasterise(drawings[:6], 32, tmp_path), pixels)


@pytest.mark.parametrize("name, rgb", [*questions.BACKGROUNDS.items(), *OTHER_COLOURS])
def test_colours_have_their_usual_names(name, rgb):
    pixels = np.full((1, 4, 4, 4), 255, np.uint8)
    pixels[..., :3] = rgb
    assert COLOURS[colour_shares(pixels)[0].argmax()] == name


def test_colour_shares_count_opaque_pixels_only():
    pixels = np.zeros((2, 4, 4, 4), np.uint8)
    pixels[0, :2] = (220, 30, 30, 255)
    pixels[0, 1, 2:] = (40, 90, 230, 255)
    shares = colour_shares(pixels)
    assert shares[0, COLOURS.index("red")] == 6 / 8 and shares[0].sum() == 1
    assert (shares[1] == 0).all()


def _many_drawings(families):
    concepts = [Concept(f"1f{i:03x}", f"n{i}", "fruit", "food", ()) for i in range(600)]
    return [Drawing(concept, family, "") for concept in concepts for family in families]


def test_split_holds_out_whole_drawings_and_concepts():
    drawings = _many_drawings(emoji.FAMILIES)
    parts = emoji.split(drawings)
    every = [index for members in parts.values() for index in members]
    assert sorted(every) == list(range(len(drawings)))
    concepts = {part: Counter(drawings[i].concept for i in members) for part, members in parts.items()}
    assert not concepts["test_b"].keys() & (concepts["train"].keys() | concepts["test_a"].keys())
    assert concepts["train"].keys() == concepts["test_a"].keys()
    assert set(concepts["test_a"].values()) == {1} and set(concepts["train"].values()) == {3}
    assert 600 / 12 * 0.6 < len(concepts["test_b"]) < 600 / 12 * 1.4
    held = Counter(drawings[i].family for i in parts["test_a"])
    assert min(held.values()) > 0.6 * max(held.values())  # the hash distributes them over all families
    for concept in concepts["test_b"]:
        assert int(hashlib.md5(concept.codepoint.encode()).hexdigest(), 16) % 12 == 0


def test_two_families_are_too_few_to_hold_one_out():
    assert emoji.split(_many_drawings(("noto", "fluent")))["test_a"] == []


def test_a_held_out_twin_is_in_no_part():
    drawings = [d for d in _many_drawings(emoji.FAMILIES) if d.concept.codepoint == "1f001"]
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 8, 8, 4), np.uint8)
    pixels[..., 3] = 255
    (held,) = emoji.split(drawings, pixels)["test_a"]
    pixels[held] = pixels[(held + 1) % 4]
    parts = emoji.split(drawings, pixels)
    assert parts["test_a"] == [] and held not in parts["train"]


def test_the_manifest_counts_what_is_there(dataset):
    out, manifest = dataset
    assert manifest == json.loads((out / "manifest.json").read_text())
    for name, count in manifest["records"].items():
        assert len(_records(dataset, name)) == count
    pictures = 0
    for part, count in manifest["drawings"].items():
        found = Counter(p.stem.rsplit("-", 1)[0] for p in out.glob(f"images/{part}/*.png"))
        assert len(found) == count and set(found.values()) == {4 if part == "train" else 1}
        pictures += found.total()
    assert manifest["images"]["count"] == pictures
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert "Apache-2.0" in (out / "ATTRIBUTION.md").read_text()
    assert not list(out.parent.glob(".demo-*"))


@pytest.mark.parametrize("name", ["stage1_caption", "stage2_detail", "stage3_vqa", "test_a", "test_b"])
def test_every_file_is_a_valid_conversation_file(dataset, name):
    assert list(check(dataset[0] / f"{name}.json", dataset[0], decode=True)) == []


def test_no_test_drawing_and_no_unseen_concept_is_trained_on(dataset):
    out, _ = dataset
    drawn = {
        part: {p.stem.rsplit("-", 1)[0] for p in out.glob(f"images/{part}/*.png")}
        for part in ("train", "test_a", "test_b")
    }
    assert drawn["test_a"] and drawn["test_b"]
    assert not drawn["train"] & (drawn["test_a"] | drawn["test_b"])
    unseen = {r["answer"] for r in _records(dataset, "test_b") if r["kind"] == "name"}
    for name in ("stage1_caption", "stage2_detail", "stage3_vqa"):
        assert all(r["image"].startswith("images/train/") for r in _records(dataset, name))
    training_text = " ".join(
        (out / name).read_text()
        for name in ("stage2_detail.json", "stage3_vqa.json", "text.txt", "contrastive.json")
    )
    assert len(unseen) >= 3
    for name in unseen:
        assert not re.search(rf"\b{re.escape(name)}\b", training_text)


def _facts(dataset):
    """Reference answers for each image, derived only from its drawing and its pixels."""
    base = {
        emoji._codepoint(r["hexcode"]): r
        for r in json.loads((FIXTURES / "emojibase.json").read_text())["data"]
    }
    meta = json.loads((FIXTURES / "emojibase.json").read_text())["groups"]
    names = {rgb: name for name, rgb in questions.BACKGROUNDS.items()}
    facts = {}
    for path in dataset[0].glob("images/*/*.png"):
        record = base[path.stem.split("-")[0]]
        with Image.open(path) as image:
            assert image.size == (48, 48) and image.mode == "RGB"
            corners = Counter(
                image.getpixel(place)
                for place in ((0, 0), (47, 0), (0, 47), (47, 47), (0, 24), (24, 0), (47, 24), (24, 47))
            )
        ground = next(rgb for rgb, _ in corners.most_common() if rgb in names)
        facts[path.relative_to(dataset[0]).as_posix()] = {
            "name": record["label"].lower().replace("\u2019", "'"),
            "kind": emoji.KINDS[meta["subgroups"][str(record["subgroup"])]],
            "group": emoji.GROUPS[meta["groups"][str(record["group"])]],
            "background": names[ground],
        }
    return facts


def test_answers_are_correct_for_their_pictures(dataset):
    facts, words = _facts(dataset), {text: kind for kind, text in questions.QUESTIONS.items()}
    asked = Counter()
    for record in _records(dataset, "stage3_vqa") + _records(dataset, "test_a") + _records(dataset, "test_b"):
        reference = facts[record["image"]]
        turns = record["conversations"]
        texts = [turn["value"].removeprefix("<image>\n") for turn in turns[::2]]
        assert len(texts) == len(set(texts))
        for text, answer in zip(texts, turns[1::2], strict=True):
            said = answer["value"]
            if choices := re.fullmatch("which of (.*), (.*), (.*), (.*)\\?", text):
                assert (
                    said == reference["name"] and said in choices.groups() and len({*choices.groups()}) == 4
                )
                asked["which", choices.groups().index(said)] += 1
            elif kind := re.fullmatch("is the kind (.*)\\?", text):
                assert said == ("yes" if kind[1] == reference["kind"] else "no")
                asked[said] += 1
            else:
                kind = words[text]
                asked[kind] += 1
                assert said in COLOURS if kind == "colour" else said == reference[kind]
    assert asked.keys() == {*questions.QUESTIONS, "yes", "no", *(("which", place) for place in range(4))}
    assert 0.8 < asked["yes"] / asked["no"] < 1.25


def test_vqa_records_have_five_turns_one_of_them_with_yes_or_no_or_a_choice(dataset):
    for record in _records(dataset, "stage3_vqa"):
        texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"][::2]]
        assert len(texts) == 5 and sum(text in questions.QUESTIONS.values() for text in texts) == 4


@pytest.mark.parametrize("part", ["test_a", "test_b"])
def test_choices_hold_the_answer_once(dataset, part):
    records = _records(dataset, part)
    assert Counter(r["kind"] for r in records).keys() == questions.QUESTIONS.keys()
    places = Counter()
    for record in records:
        assert len(set(record["choices"])) == 4 and record["answer"] in record["choices"]
        places[record["choices"].index(record["answer"])] += 1
        assert record["conversations"][1]["value"] == record["answer"] and len(record["conversations"]) == 2
    assert len(places) == 4


def test_baselines_are_the_training_majority(dataset):
    table = json.loads((dataset[0] / "baselines.json").read_text())
    answers = [
        turns[i + 1]["value"]
        for turns in (record["conversations"] for record in _records(dataset, "stage3_vqa"))
        for i in range(0, len(turns), 2)
        if turns[i]["value"].endswith(questions.QUESTIONS["kind"])
    ]
    answer, count = Counter(answers).most_common(1)[0]
    assert (table["kind"]["answer"], table["kind"]["train_share"]) == (answer, round(count / len(answers), 4))
    asked = [r for r in _records(dataset, "test_a") if r["kind"] == "kind"]
    assert table["kind"]["test_a"]["accuracy"] == round(
        sum(r["answer"] == answer for r in asked) / len(asked), 4
    )


def test_same_settings_make_the_same_data_set(dataset, tarballs, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "fetch", lambda cache, progress: tarballs)
    again = questions.make_dataset(tmp_path / "again", quick=True, progress=False, cache_dir=tmp_path)
    assert again == dataset[1]
    other = questions.make_dataset(tmp_path / "other", quick=True, progress=False, cache_dir=tmp_path, seed=1)
    assert other["images"]["sha256"] != again["images"]["sha256"] and other["drawings"] == again["drawings"]


def test_a_finished_data_set_is_found_and_never_overwritten(dataset, monkeypatch, tmp_path):
    out, manifest = dataset
    monkeypatch.setattr(packages, "fetch", lambda *_: pytest.fail("a finished data set needs no packages"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert questions.make_dataset(out, quick=True, progress=False) == manifest
    with pytest.raises(
        ValueError, match="contains a data set with another seed, quick: choose another folder or delete it"
    ):
        questions.make_dataset(out, seed=3, progress=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    older = {name: value for name, value in manifest["settings"].items() if name != "format"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"settings": older}))
    with pytest.raises(ValueError, match="contains a data set with another format: choose"):
        questions.make_dataset(tmp_path, quick=True, progress=False)


def test_foreign_and_damaged_folders_are_refused(dataset, tarballs, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "fetch", lambda cache, progress: tarballs)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="contains something that is not a demo data set"):
        questions.make_dataset(tmp_path / "mine", progress=False)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    questions.make_dataset(tmp_path / "d", quick=True, progress=False, cache_dir=tmp_path)
    (tmp_path / "d" / "test_a.json").write_text("[]")
    next((tmp_path / "d").glob("images/train/*.png")).unlink()
    with pytest.raises(ValueError, match=r"contains a damaged data set \(test_a.json, images\)"):
        questions.make_dataset(tmp_path / "d", quick=True, progress=False)


def test_a_failure_leaves_no_files(tarballs, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "fetch", lambda cache, progress: tarballs)
    monkeypatch.setattr(questions, "_write_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        questions.make_dataset(tmp_path / "out" / "demo", quick=True, progress=False, cache_dir=tmp_path)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ValueError, match="image_size must be even and at least 16, got 47"):
        questions.make_dataset(tmp_path / "demo", image_size=47)
    with pytest.raises(ValueError, match=r"concept_set must be one of \('core', 'full'\), got 'all'"):
        questions.make_dataset(tmp_path / "demo", concept_set="all")


def test_records_are_short(dataset):
    out, manifest = dataset
    assert manifest["tokens_per_vqa_record"] <= 45
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    for word in ("red", "yellow", "fruit", "nature", "penguin", "what", "colour"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


def test_the_data_set_loads_and_batches(dataset):
    out, manifest = dataset
    processor = build_processor(AutoTokenizer.from_pretrained(out / "tokenizer"), 48, 8)
    for name, template in (
        ("stage1_caption", "plain"),
        ("stage2_detail", "mistral_instruct"),
        ("stage3_vqa", "mistral_instruct"),
    ):
        loaded = ConversationDataset(out / f"{name}.json", out, processor, template)
        assert len(loaded) == manifest["records"][name]
        assert loaded.batch(range(8))["pixel_values"].shape == (8, 3, 48, 48)


def test_compose_keeps_the_background_outside_the_drawing():
    drawing = Image.new("RGBA", (48, 48), (0, 0, 0, 255))
    image = np.asarray(questions.compose(drawing, "pink", 48, random.Random(0)))
    ground = (image == questions.BACKGROUNDS["pink"]).all(-1)
    side = round(np.sqrt((~ground).sum()))
    assert (~ground).sum() == side * side and 36 <= side <= 48
