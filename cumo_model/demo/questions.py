"""The data set of the demo, in LLaVA's format: emoji on coloured backgrounds, with captions and questions.

    manifest = make_dataset("data/demo")

    images/{train,test_a,test_b}/*.png
    stage1_caption.json   one short caption per picture (template plain)
    stage2_detail.json    one longer description per picture
    stage3_vqa.json       five questions with short answers per record, one with yes or no, or a choice
    test_a.json           unseen drawings of known concepts, one question per record
    test_b.json           unseen concepts
    baselines.json        per kind of question: the most frequent training answer, its accuracy on each test
    text.txt              facts about the training concepts, one per line, for stage 0 of the language model
    contrastive.json      picture, name and keywords of the training drawings, for stage 0 of the vision tower
    tokenizer/            BPE trained on the training text
    ATTRIBUTION.md, manifest.json

A test record also has "kind", "answer" and "choices": four possible answers, including the right one, for
scoring by likelihood. Choices are answers of the training set, except the names of test_b, which are those of
its own concepts. A question for a name also has "choices_same_kind" if its kind has at least four names.
Records are in random order, so the first n are a representative sample.
"""

import hashlib
import io
import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cumo_model.checkpoints.folders import new_directory
from cumo_model.demo import emoji, packages
from cumo_model.demo.emoji import COLOURS, Drawing
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.conversation import tokenize_conversations

QUESTIONS = {  # kind of question -> its text
    "name": "what is it?",
    "kind": "what kind?",
    "colour": "what colour?",
    "background": "what background?",
    "group": "what group?",
}
IS_KIND = "is the kind {object}?"  # the form of POPE: answered with yes or no
WHICH = "which of {choices}?"  # the form of MMBench: answered with one of the choices
BACKGROUNDS = {
    "white": (255, 255, 255),
    "pink": (255, 178, 200),
    "yellow": (250, 226, 110),
    "green": (150, 215, 150),
    "blue": (140, 190, 245),
    "purple": (196, 165, 236),
    "grey": (168, 168, 174),
}
CLEAR = 1.5  # the colour is asked only if its area is at least this many times that of the second colour
VARIANTS = {"core": 16, "full": 8}  # pictures per training drawing
QUICK_VARIANTS = 4
RECORDS_PER_PICTURE = 2  # stage 3
VOCAB_SIZE = 1200
FORMAT = 4  # to be increased when pictures, texts or their mixture change


@dataclass(frozen=True)
class Picture:
    """A drawing on a background, with the properties that questions are asked about."""

    drawing: Drawing
    image: str  # path in the data set
    background: str
    colours: tuple[str, ...]  # colours that cover 15 % or more of the drawing, largest first
    clear: bool  # whether the first colour exceeds the second by the factor CLEAR

    @property
    def answers(self) -> dict[str, str]:
        """The answer to each kind of question that can be asked about the picture."""
        concept = self.drawing.concept
        answers = {
            "name": concept.name,
            "kind": concept.kind,
            "background": self.background,
            "group": concept.group,
        }
        return answers | ({"colour": self.colours[0]} if self.clear else {})


def make_dataset(
    out_dir: str | os.PathLike,
    image_size: int = 48,
    concept_set: str = "core",
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> dict:
    """Write the data set, unless it exists.

    Args:
        out_dir: folder of the data set, created atomically. It must not exist, be empty, or contain a data
            set with the same settings.
        image_size: side of the pictures in pixels, even.
        concept_set: "core" (9 kinds) or "full" (28 kinds).
        seed: seed of backgrounds, positions and questions; the split does not depend on it.
        quick: fewer pictures per training drawing; the test sets are the same.
        progress: print progress.
        cache_dir: folder for downloads and rendered drawings; by default `packages.default_cache()`.

    Returns:
        The manifest: settings, counts, checksums.

    Raises:
        ValueError: `image_size` or `concept_set` is not valid, or `out_dir` contains something else, which is
            not changed.
        RuntimeError: the packages could not be fetched.
    """
    if image_size < 16 or image_size % 2:
        raise ValueError(f"image_size must be even and at least 16, got {image_size}")
    if concept_set not in emoji.CONCEPT_SETS:
        raise ValueError(f"concept_set must be one of {emoji.CONCEPT_SETS}, got {concept_set!r}")
    out = Path(out_dir)
    settings = {
        "format": FORMAT,
        "image_size": image_size,
        "concept_set": concept_set,
        "seed": seed,
        "quick": quick,
        "packages": {p.tarball: p.sha256 for p in packages.PACKAGES.values()},
    }
    finished = _finished(out, settings)
    if finished:
        return finished
    say = _Progress(progress)
    cache = Path(cache_dir) if cache_dir is not None else packages.default_cache()
    drawings = emoji.load(packages.fetch(cache, progress), concept_set)
    pixels = emoji.rasterise(drawings, image_size, cache)
    parts = emoji.split(drawings, pixels)
    say(f"{len(drawings)} drawings of {len({d.concept for d in drawings})} concepts")

    with new_directory(out) as work:
        shares = emoji.colour_shares(pixels)
        variants = QUICK_VARIANTS if quick else VARIANTS[concept_set]
        digest, pictures = hashlib.sha256(), {}
        for part, members in parts.items():
            painter = _Painter(work, part, image_size, seed, digest)
            pictures[part] = [
                painter.paint(drawings[i], pixels[i], shares[i], variant)
                for i in members
                for variant in range(variants if part == "train" else 1)
            ]
            say(f"{len(pictures[part])} pictures for {part}")
        counts = _write_records(work, pictures, seed)
        tokens = _write_tokenizer(work, pictures["train"])
        packages.write_atomically(work / "ATTRIBUTION.md", packages.attribution().encode())
        manifest = {
            "settings": settings,
            "records": counts,
            "drawings": {part: len(members) for part, members in parts.items()},
            "concepts": {part: len({p.drawing.concept for p in pictures[part]}) for part in parts},
            "tokens_per_vqa_record": tokens,
            "images": {"count": sum(map(len, pictures.values())), "sha256": digest.hexdigest()},
            "files": {path.name: _sha256(path) for path in sorted(work.iterdir()) if path.is_file()},
        }
        _write_json(work / "manifest.json", manifest, indent=1)
    say(f"done: {out}")
    return manifest


def _finished(out: Path, settings: dict) -> dict | None:
    """The manifest of a complete data set with these settings, or None if `out` is missing or empty.

    Raises:
        ValueError: `out` contains anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        files, settled = manifest["files"], manifest["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"out_dir {str(out)!r} contains something that is not a demo data set: choose another folder"
        ) from None
    differ = [name for name in settings if settled.get(name) != settings[name]]
    if differ:
        raise ValueError(
            f"out_dir {str(out)!r} contains a data set with another {', '.join(differ)}: "
            "choose another folder or delete it"
        )
    broken = [
        name for name, digest in files.items() if not (out / name).is_file() or _sha256(out / name) != digest
    ]
    if sum(1 for _ in out.glob("images/*/*.png")) != manifest["images"]["count"]:
        broken.append("images")
    if broken:
        raise ValueError(
            f"out_dir {str(out)!r} contains a damaged data set ({', '.join(broken)}): "
            "delete it to make it again"
        )
    return manifest


class _Painter:
    """Draws the pictures of one part and writes them as PNG files."""

    def __init__(self, root: Path, part: str, image_size: int, seed: int, digest):
        self.root, self.part, self.size, self.seed, self.digest = root, part, image_size, seed, digest
        (root / "images" / part).mkdir(parents=True)

    def paint(self, drawing: Drawing, pixels, shares, variant: int) -> Picture:
        rng = random.Random(f"{self.seed} {self.part} {drawing.key} {variant}")
        background = rng.choice(list(BACKGROUNDS))
        path = f"images/{self.part}/{drawing.key}-{variant}.png"
        buffer = io.BytesIO()
        compose(Image.fromarray(pixels), background, self.size, rng).save(buffer, "png", compress_level=1)
        self.digest.update(path.encode() + buffer.getvalue())
        (self.root / path).write_bytes(buffer.getvalue())
        order = sorted(range(len(COLOURS)), key=lambda c: -shares[c])
        colours = tuple(COLOURS[c] for n, c in enumerate(order) if n == 0 or shares[c] >= 0.15)
        return Picture(drawing, path, background, colours, bool(shares[order[0]] > CLEAR * shares[order[1]]))


def compose(drawing: Image.Image, background: str, size: int, rng: random.Random) -> Image.Image:
    """Place a drawing (RGBA) on a plain background, at a random position and 75 to 100 % of the side.

    Returns:
        An RGB picture of size x size.
    """
    side = round(size * rng.uniform(0.75, 1))
    left, top = rng.randint(0, size - side), rng.randint(0, size - side)
    image = Image.new("RGB", (size, size), BACKGROUNDS[background])
    drawing = drawing.resize((side, side), Image.Resampling.BILINEAR)
    image.paste(drawing, (left, top), drawing)
    return image


def caption(picture: Picture) -> str:
    """The short caption of a picture, for stage 1."""
    return f"{picture.drawing.concept.name} on {picture.background}."


def description(picture: Picture) -> str:
    """The longer description of a picture, for stage 2."""
    concept = picture.drawing.concept
    thoughts = f" think of: {', '.join(concept.keywords[:3])}." if concept.keywords else ""
    colours = ", ".join(picture.colours[:2])
    return f"{caption(picture)} kind: {concept.kind}. group: {concept.group}. colour: {colours}.{thoughts}"


def facts(pictures: list[Picture]) -> Iterator[str]:
    """Lines of text about the concepts of these pictures, without information about a picture."""
    members = defaultdict(list)
    for concept in dict.fromkeys(picture.drawing.concept for picture in pictures):
        members[concept.kind].append(concept.name)
        yield f"{concept.name}. kind: {concept.kind}. group: {concept.group}."
        yield from (f"{concept.name} on {background}." for background in BACKGROUNDS)
        if concept.keywords:
            yield f"{concept.name}. think of: {', '.join(concept.keywords)}."
    for kind, names in members.items():
        for start in range(0, len(names), 4):
            yield f"kind: {kind}. {', '.join(names[start : start + 4])}."


def _conversation(picture: Picture, turns: list[tuple[str, str]], number: int | str) -> dict:
    """A record in LLaVA's format; the first question contains the image marker."""
    conversations = []
    for order, (question, answer) in enumerate(turns):
        value = question if order else f"<image>\n{question}".strip()
        conversations += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {
        "id": f"{Path(picture.image).stem}-{number}",
        "image": picture.image,
        "conversations": conversations,
    }


def _choose_names(picture: Picture, names: list[str], rng: random.Random) -> list[str]:
    """The right name and three others, in random order."""
    right = picture.drawing.concept.name
    options = [right, *rng.sample([name for name in names if name != right], 3)]
    rng.shuffle(options)
    return options


def which(choices: list[str]) -> str:
    """The question that asks for one of several names."""
    return WHICH.format(choices=", ".join(choices))


def _vqa(picture: Picture, number: int, names: list[str], kinds: list[str], rng: random.Random) -> dict:
    answers = picture.answers
    asked = [kind for kind in QUESTIONS if kind in answers]
    if len(asked) == 5:  # with the fifth turn below; one always asks for the name
        asked.remove(rng.choice([kind for kind in asked if kind != "name"]))
    turns = [(QUESTIONS[kind], answers[kind]) for kind in asked]
    if number % 2:
        turns.append((which(_choose_names(picture, names, rng)), answers["name"]))
    elif rng.random() < 0.5:
        turns.append((IS_KIND.format(object=answers["kind"]), "yes"))
    else:
        other = rng.choice([kind for kind in kinds if kind != answers["kind"]])
        turns.append((IS_KIND.format(object=other), "no"))
    rng.shuffle(turns)
    return _conversation(picture, turns, number)


def _test_records(
    picture: Picture, pools: dict[str, list[str]], kind_names: dict[str, list[str]], rng: random.Random
) -> Iterator[dict]:
    """One record for each kind of question."""
    for kind, answer in picture.answers.items():
        if kind == "name":
            choices = _choose_names(picture, pools["name"], rng)
        else:
            choices = [answer, *rng.sample([word for word in pools[kind] if word != answer], 3)]
            rng.shuffle(choices)
        record = _conversation(picture, [(QUESTIONS[kind], answer)], kind)
        record |= {"kind": kind, "answer": answer, "choices": choices}
        alike = kind_names[picture.drawing.concept.kind]
        if kind == "name" and len(alike) >= 4:
            record["choices_same_kind"] = _choose_names(picture, alike, rng)
        yield record


def _write_records(root: Path, pictures: dict[str, list[Picture]], seed: int) -> dict[str, int]:
    train = pictures["train"]
    names = _distinct(p.drawing.concept.name for p in train)
    kinds = _distinct(p.drawing.concept.kind for p in train)
    rng = random.Random(f"{seed} vqa")
    stages = {
        "stage1_caption": [_conversation(p, [("", caption(p))], "caption") for p in train],
        "stage2_detail": [_conversation(p, [("describe it.", description(p))], "detail") for p in train],
        "stage3_vqa": [
            _vqa(p, number, names, kinds, rng) for p in train for number in range(RECORDS_PER_PICTURE)
        ],
    }
    pools = {kind: _distinct(p.answers[kind] for p in train if kind in p.answers) for kind in QUESTIONS}
    for part in ("test_a", "test_b"):
        own = _distinct(p.drawing.concept.name for p in pictures[part])
        part_pools = pools | {"name": own if part == "test_b" and len(own) >= 4 else names}
        kind_names = defaultdict(list)
        for concept in dict.fromkeys(
            p.drawing.concept for p in pictures["train" if part == "test_a" else part]
        ):
            kind_names[concept.kind].append(concept.name)
        rng = random.Random(f"{seed} {part}")
        stages[part] = [
            record for p in pictures[part] for record in _test_records(p, part_pools, kind_names, rng)
        ]
    for name, records in stages.items():
        random.Random(f"{seed} order {name}").shuffle(records)
        _write_json(root / f"{name}.json", records)
    _write_json(root / "baselines.json", _baselines(stages), indent=1)
    contrastive = [
        {"image": p.image, "name": p.drawing.concept.name, "keywords": list(p.drawing.concept.keywords)}
        for p in train
    ]
    _write_json(root / "contrastive.json", contrastive)
    (root / "text.txt").write_text("\n".join(facts(train)) + "\n")
    return {name: len(records) for name, records in stages.items()}


def _baselines(stages: dict[str, list[dict]]) -> dict[str, dict]:
    """Accuracy without using the picture: per kind, always the most frequent answer of the training set."""
    kinds = {question: kind for kind, question in QUESTIONS.items()}
    answers: dict[str, Counter] = defaultdict(Counter)
    for record in stages["stage3_vqa"]:
        turns = record["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if kind := kinds.get(question["value"].removeprefix("<image>\n")):
                answers[kind][answer["value"]] += 1
    table = {}
    for kind in QUESTIONS:
        answer, count = answers[kind].most_common(1)[0]
        table[kind] = {
            "answer": answer,
            "train_share": round(count / answers[kind].total(), 4),
            "train_answers": len(answers[kind]),
        }
        for part in ("test_a", "test_b"):
            asked = [record for record in stages[part] if record["kind"] == kind]
            hits = sum(record["answer"] == answer for record in asked)
            table[kind][part] = {
                "questions": len(asked),
                "accuracy": round(hits / max(len(asked), 1), 4),
            }
    overall = {}
    for part in ("test_a", "test_b"):
        rows = [row[part] for row in table.values()]
        total = sum(row["questions"] for row in rows)
        score = sum(row["questions"] * row["accuracy"] for row in rows) / max(total, 1)
        overall[part] = {"questions": total, "accuracy": round(score, 4)}
    return table | {"all": overall}


def _write_tokenizer(root: Path, train: list[Picture]) -> float:
    """Train and save the tokenizer.

    Returns:
        The mean number of text tokens of a stage 3 record, with the template mistral_instruct.
    """
    records = json.loads((root / "stage3_vqa.json").read_text())
    texts = (root / "text.txt").read_text().splitlines(keepends=True)
    texts += [description(picture) for picture in train]
    texts += [turn["value"].removeprefix("<image>") for record in records for turn in record["conversations"]]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    tokenizer.save_pretrained(root / "tokenizer")
    sample = [record["conversations"] for record in records[:500]]
    lengths = [len(ids) for ids, _ in tokenize_conversations(sample, tokenizer, "mistral_instruct", 0)]
    return round(sum(lengths) / len(lengths), 2)


def _distinct(words: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _write_json(path: Path, content, indent: int | None = None) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Progress:
    """Prints lines with the seconds since its creation."""

    def __init__(self, wanted: bool):
        self.wanted, self.start = wanted, time.perf_counter()

    def __call__(self, line: str) -> None:
        if self.wanted:
            print(f"[{time.perf_counter() - self.start:5.1f} s] {line}", flush=True)
