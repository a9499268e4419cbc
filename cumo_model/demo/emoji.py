"""Emoji as pictures: fetch, match, rasterise, measure and split them.

Four sets of emoji ("families") contain drawings of the same Unicode concepts. Names, kinds, groups and
keywords are those of Unicode. The data come from five pinned npm packages (see packages.py).

    tarballs = fetch()                       {"noto": Path(...tgz), ...}
    drawings = load(tarballs, "core")        list[Drawing], in a fixed order
    pixels = rasterise(drawings, 48)         (D, 48, 48, 4) uint8, straight alpha
    parts = split(drawings)                  {"train" | "test_a" | "test_b": indices into drawings}
"""

import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cumo_model.demo.packages import fetch as fetch
from cumo_model.demo.packages import write_atomically

FAMILIES = ("emojione", "fluent", "noto", "twemoji")
GROUPS = {  # Unicode group -> answer to the question for the group
    "animals-nature": "nature",
    "food-drink": "food",
    "travel-places": "travel",
    "activities": "activity",
    "objects": "object",
}
KINDS = {  # Unicode subgroup -> answer to the question for the kind; equal answers form one kind
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-reptile": "reptile",
    "animal-marine": "marine",
    "animal-bug": "bug",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "dish",
    "food-asian": "dish",
    "food-sweet": "sweet",
    "drink": "drink",
    "transport-ground": "vehicle",
    "transport-water": "boat",
    "transport-air": "aircraft",
    "place-building": "building",
    "place-geographic": "landscape",
    "sky-weather": "weather",
    "sport": "sport",
    "game": "game",
    "event": "event",
    "clothing": "clothing",
    "musical-instrument": "instrument",
    "computer": "computer",
    "book-paper": "paper",
    "office": "office",
    "tool": "tool",
    "household": "household",
}
CORE_KINDS = ("mammal", "bird", "bug", "fruit", "sweet", "drink", "vehicle", "sport", "clothing")
CONCEPT_SETS = ("core", "full")

# A second view, a part, a sign or a phase of another concept. The name cannot be derived from the picture, so
# these concepts are not used.
NOT_ASKED = frozenset(
    name.strip()
    for name in """
    monkey face; dog face; guide dog; service dog; cat face; black cat; tiger face; horse face; cow face;
    pig face; pig nose; mouse face; rabbit face; two-hump camel; paw prints; ewe; feather; wing; black bird;
    front-facing baby chick; hatching chick; dragon face; spider web; microbe; spouting whale;
    clinking beer mugs; clinking glasses; pouring liquid; oncoming bus; oncoming police car; oncoming taxi;
    oncoming automobile; bus stop; motorway; railway track; station; stop sign; construction;
    police car light; horizontal traffic light; railway car; tram car; light rail; bullet train; oil drum;
    wheel; small airplane; airplane departure; airplane arrival; motor boat; waxing crescent moon;
    first quarter moon; waxing gibbous moon; waning gibbous moon; last quarter moon; waning crescent moon;
    new moon face; first quarter moon face; last quarter moon face; full moon face; sun with face;
    sun behind small cloud; sun behind large cloud; sun behind rain cloud; cloud with rain; cloud with snow;
    cloud with lightning; umbrella with rain drops; umbrella on ground; snowman without snow; glowing star;
    spade suit; heart suit; diamond suit; club suit; softball; low battery; open file folder;
    tear-off calendar; spiral calendar; spiral notepad; round pushpin; linked paperclips; green book;
    blue book; orange book; notebook with decorative cover; rolled-up newspaper; page facing up;
    leafless tree; brown mushroom; house with garden; Japanese post office; love hotel; hotel;
    department store; wedding; flat shoe
    """.split(";")
)


@dataclass(frozen=True)
class Concept:
    """One Unicode emoji. Each family has at most one drawing of it."""

    codepoint: str  # "1f34e", joined by "-", without fe0f
    name: str  # CLDR short name, lower case
    kind: str  # a value of KINDS
    group: str  # a value of GROUPS
    keywords: tuple[str, ...]  # CLDR keywords that are not part of the name


@dataclass(frozen=True)
class Drawing:
    """The drawing of a concept in one family."""

    concept: Concept
    family: str  # a name of FAMILIES
    svg: str

    @property
    def key(self) -> str:
        return f"{self.concept.codepoint}-{self.family}"


def load(tarballs: dict[str, Path], concept_set: str = "core") -> list[Drawing]:
    """Match the four families to the concepts of a set.

    Args:
        tarballs: from `fetch`.
        concept_set: "core" (9 kinds) or "full" (all KINDS).

    Returns:
        All drawings of the concepts that at least two families contain, in Unicode order, then by family.
    """
    if concept_set not in CONCEPT_SETS:
        raise ValueError(f"concept_set must be one of {CONCEPT_SETS}, got {concept_set!r}")
    records, meta = _members(tarballs["emojibase"], "en/data.json", "meta/groups.json")
    concepts = _concepts(records, meta, CORE_KINDS if concept_set == "core" else tuple(KINDS.values()))
    icons = {family: _members(tarballs[family], "icons.json", "chars.json") for family in FAMILIES}
    drawn = [
        [
            Drawing(concept, family, svg)
            for family in FAMILIES
            if (svg := _svg(*icons[family], concept.codepoint, label))
        ]
        for concept, label in concepts
    ]
    # a drawing that matches two concepts is a wrong match by name (emojione's "cricket" is the game)
    uses = Counter(drawing.svg for members in drawn for drawing in members)
    drawn = [[drawing for drawing in members if uses[drawing.svg] == 1] for members in drawn]
    return [drawing for members in drawn if len(members) >= 2 for drawing in members]


def _members(tarball: Path, *names: str) -> list:
    """JSON members of an npm tarball, whose paths all start with package/."""
    with tarfile.open(tarball) as archive:
        return [json.load(archive.extractfile(f"package/{name}")) for name in names]


def _concepts(records: list[dict], meta: dict, kinds: tuple[str, ...]) -> list[tuple[Concept, str]]:
    found = []
    for record in sorted((r for r in records if "group" in r), key=lambda r: r["order"]):
        kind = KINDS.get(meta["subgroups"][str(record["subgroup"])])
        group = GROUPS.get(meta["groups"][str(record["group"])])
        label = record["label"]
        if kind in kinds and group and label not in NOT_ASKED:
            name = _ascii(label)
            keywords = tuple(
                t.lower() for t in record.get("tags", ()) if t.isascii() and t.lower() not in name
            )
            found.append((Concept(_codepoint(record["hexcode"]), name, kind, group, keywords), label))
    return found


def _ascii(label: str) -> str:
    """Lower case, without accents and typographic apostrophes."""
    plain = unicodedata.normalize("NFKD", label.lower().replace("\u2019", "'"))
    return "".join(letter for letter in plain if letter.isascii())


def _codepoint(hexcode: str) -> str:
    """A hexcode ("1F34E-FE0F") in iconify's form: lower case, no variation selector, no leading zeros."""
    return "-".join(part.lstrip("0") for part in hexcode.lower().split("-") if part != "fe0f")


def _svg(icons: dict, chars: dict, codepoint: str, label: str) -> str | None:
    """The drawing as a square SVG document, or None. A family without a chars table is matched by name."""
    name = (
        chars.get(codepoint)
        if chars
        else re.sub("[^a-z0-9]+", "-", _ascii(label).replace("'", "")).strip("-")
    )
    alias = icons.get("aliases", {}).get(name)
    if alias:
        if set(alias) != {"parent"}:  # mirrored or rotated: not a drawing of this concept
            return None
        name = alias["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top = (icon.get(side, icons.get(side, 0)) for side in ("left", "top"))
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side} {side}">{icon["body"]}</svg>'
    )


def rasterise(
    drawings: list[Drawing], size: int = 48, cache_dir: str | os.PathLike | None = None
) -> np.ndarray:
    """Render all drawings.

    Args:
        drawings: D drawings.
        size: side in pixels.
        cache_dir: folder of a .npz file with the results of an earlier call; None for no cache.

    Returns:
        (D, size, size, 4) uint8, RGB and straight alpha.
    """
    import resvg_py

    digest = hashlib.sha256(f"resvg {size}".encode())
    for drawing in drawings:
        digest.update(drawing.svg.encode())
    path = Path(cache_dir) / "drawings" / f"{digest.hexdigest()[:24]}.npz" if cache_dir is not None else None
    if path is not None and path.is_file():
        with np.load(path) as stored:
            return stored["pixels"]
    pixels = np.empty((len(drawings), size, size, 4), np.uint8)
    for i, drawing in enumerate(drawings):
        png = bytes(resvg_py.svg_to_bytes(svg_string=drawing.svg, width=size, height=size))
        with Image.open(io.BytesIO(png)) as image:
            pixels[i] = np.asarray(image.convert("RGBA"))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, pixels=pixels)
        write_atomically(path, buffer.getvalue())
    return pixels


COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")


def colour_shares(pixels: np.ndarray) -> np.ndarray:
    """Share of each colour in each drawing, from HSV bins of its opaque pixels.

    Args:
        pixels: (D, h, w, 4) uint8.

    Returns:
        (D, 11) fp32, columns as COLOURS, rows sum to 1 (0 for an empty drawing).
    """
    rgb = pixels[..., :3].astype(np.float32) / 255
    value, low = rgb.max(-1), rgb.min(-1)
    chroma = value - low
    saturation = chroma / np.maximum(value, 1e-6)
    r, g, b = np.moveaxis(rgb, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    hue = 60 * np.select(
        [value == r, value == g], [(g - b) / safe % 6, (b - r) / safe + 2], (r - g) / safe + 4
    )
    bluish = (hue >= 150) & (hue < 290)
    grey = (saturation < 0.15) | bluish & (chroma < 0.18) & (value < 0.7)  # slate counts as grey, not blue
    rosy = (hue < 18) | (hue >= 345)
    rules = [  # the first rule that is true applies
        ("black", (value < 0.22) | grey & (value < 0.3)),
        ("white", grey & (value > 0.88)),
        ("grey", grey),
        ("brown", (hue >= 8) & (hue < 60) & (value < 0.8) | rosy & (value < 0.55)),
        ("pink", rosy & (saturation < 0.6) | (hue >= 290) & (hue < 345)),
        ("red", rosy),
        ("orange", hue < 40),
        ("yellow", hue < 68),
        ("green", hue < 168),
        ("blue", hue < 258),
    ]
    index = np.select(
        [rule for _, rule in rules], [COLOURS.index(name) for name, _ in rules], COLOURS.index("purple")
    )
    opaque = pixels[..., 3] >= 128
    counts = np.stack([((index == c) & opaque).sum((1, 2)) for c in range(len(COLOURS))], 1).astype(
        np.float32
    )
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


TWIN_DISTANCE = 0.03  # mean absolute difference of RGB in [0, 1], on white, at 24 px


def split(drawings: list[Drawing], pixels: np.ndarray | None = None) -> dict[str, list[int]]:
    """Split the drawings into training and test sets by the md5 of the concept.

    The split is therefore the same for all concept sets and seeds. One concept in twelve is not in the
    training set (test_b: unseen concepts). Of each other concept with drawings of three or more families, one
    drawing is in test_a (unseen drawings of known concepts).

    Args:
        drawings: D drawings.
        pixels: (D, s, s, 4) uint8, s even. If given, a held-out drawing that is nearly the same as a training
            drawing of its concept (simple shapes such as a full moon) is left out of all sets, because it
            would test memorisation.

    Returns:
        "train", "test_a", "test_b": disjoint lists of indices.
    """
    by_concept: dict[str, list[int]] = {}
    for i, drawing in enumerate(drawings):
        by_concept.setdefault(drawing.concept.codepoint, []).append(i)
    looks = None if pixels is None else _on_white(pixels)
    parts: dict[str, list[int]] = {"train": [], "test_a": [], "test_b": []}
    for codepoint, members in by_concept.items():
        number = int(hashlib.md5(codepoint.encode()).hexdigest(), 16)
        if number % 12 == 0:
            parts["test_b"] += members
            continue
        held = members[number // 12 % len(members)] if len(members) >= 3 else None
        rest = [i for i in members if i != held]
        parts["train"] += rest
        if held is not None and (
            looks is None or np.abs(looks[rest] - looks[held]).mean(-1).min() >= TWIN_DISTANCE
        ):
            parts["test_a"].append(held)
    return parts


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """Drawings on white at 24 px: (D, s, s, 4) uint8 -> (D, 3 * 24 * 24) fp32 in [0, 1].

    For s = 48 each value is a mean of 2x2 pixels.
    """
    looks = []
    for picture in pixels:
        image = Image.new("RGB", picture.shape[:2], "white")
        drawing = Image.fromarray(picture)
        image.paste(drawing, mask=drawing)
        looks.append(np.asarray(image.resize((24, 24), Image.Resampling.BOX), np.float32).ravel() / 255)
    return np.stack(looks)
