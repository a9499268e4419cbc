"""Objects that a model sees where there are none: POPE's questions and CHAIR from any labelled pictures.

The folder has labels.json, {"name of a picture": ["dog", "car"]}, and the pictures beside it or in images/.
CHAIR also needs vocabulary.json, {"dog": ["dogs", "puppy"]}.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from cumo_model.evaluation.files import found, read_json
from cumo_model.evaluation.scorers.chair import Vocabulary, chair_counts, chair_figures
from cumo_model.evaluation.scorers.yes_no import pope_says_yes
from cumo_model.evaluation.task import Data, Item, Judge, Row, Task
from cumo_model.evaluation.tasks.common import SHORT_ANSWER, OneByOne, ask
from cumo_model.evaluation.tasks.pope import KINDS, pope_figures

LABELS, VOCABULARY = "labels.json", "vocabulary.json"
QUESTION = "Is there {a} {object} in the image?"
CAPTION = "Describe this image in detail."
CONSONANTS, VOWELS = ("uni", "use", "eu", "ufo", "one"), ("hour", "heir", "honest")  # by their sound
EACH = 3  # present objects, and as many absent ones, that are asked about in a picture
SEED = 0
CAPTION_TOKENS = 512
Labels = Mapping[str, Sequence[str]]


class ObjectsPope(OneByOne):
    """POPE (arXiv 2305.10355) on pictures of one's own: questions made from the labels."""

    name, title = "objects_pope", "POPE on own pictures"
    metric = "F1, %, mean of three kinds"
    folders = ("objects",)

    def read(self, folder: Path) -> Data:
        path = found(folder, LABELS)
        items = pope_items(read_labels(path), f"{QUESTION}\n{SHORT_ANSWER}", place=str(path))
        return Data(items, [_pictures(folder)], {"source": str(path)})

    def score(self, item: Item, answer: str) -> dict[str, Any]:
        return {"said": pope_says_yes(answer), "label": item.reference}

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        return pope_figures(rows)


class Chair(Task):
    """CHAIR (arXiv 1809.02156): absent objects in captions, by a given vocabulary."""

    name, title = "chair", "CHAIR"
    metric = "CHAIR_s, %: captions with an absent object (lower is better)"
    folders = ("objects",)
    max_new_tokens = CAPTION_TOKENS
    lower_is_better = True

    def read(self, folder: Path) -> Data:
        path, labels = folder / LABELS, read_labels(found(folder, LABELS))
        vocabulary = read_vocabulary(found(folder, VOCABULARY))
        items = []
        for picture, names in labels.items():
            objects = [vocabulary.object_of(name) for name in names]
            if None in objects:
                unknown = names[objects.index(None)]
                raise ValueError(
                    f"{folder / VOCABULARY} must have {unknown!r}, an object of picture {picture}"
                )
            items.append(Item(ask(picture, CAPTION, picture, f"{path}, {picture}"), objects))
        return Data(items, [_pictures(folder)], {"source": str(path), "vocabulary": vocabulary})

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        return [
            Row(
                str(item.question.id),
                "",
                chair_counts(answer, item.reference, data.more["vocabulary"]),
                item.question.images[0],
            )
            for item, answer in zip(data.items, answers, strict=True)
        ]

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        return chair_figures([row.values for row in rows])


def read_labels(path: Path) -> dict[str, list[str]]:
    """The objects in each picture, each once.

    Raises:
        ValueError: the file is not an object whose values are lists of names.
    """
    labels = read_json(path, dict)
    if not labels:
        raise ValueError(f"{path} must hold at least one picture, got none")
    for picture, objects in labels.items():
        _check_names(objects, f"{path}, picture {picture}")
    return {
        picture: list(dict.fromkeys(" ".join(name.split()) for name in objects))
        for picture, objects in labels.items()
    }


def read_vocabulary(path: Path) -> Vocabulary:
    """The names of objects, from an object whose values are lists of names.

    Raises:
        ValueError: the file is not such an object, or a name is that of two objects.
    """
    words = read_json(path, dict)
    for name, others in words.items():
        _check_names(others, f"{path}, {name}")
    try:
        return Vocabulary(words)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_names(names: Any, place: str) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{place}: must be a list of names, got {names!r:.80}")


def _pictures(folder: Path) -> Path:
    return folder / "images" if (folder / "images").is_dir() else folder


def pope_items(
    labels: Labels,
    template: str = QUESTION,
    kinds: Sequence[str] = KINDS,
    each: int = EACH,
    seed: int = SEED,
    place: str = "labels",
) -> list[Item]:
    """POPE's questions about labelled pictures, as many with the answer yes as with no.

    All kinds ask about the same present objects. The absent ones are drawn ("random"), the most frequent in
    all pictures ("popular"), or those that are most often in a picture with the present ones ("adversarial");
    of equally frequent ones the first by name. A picture with fewer than `each` present or absent objects
    gets fewer questions of both sorts, and one that shows all or no objects gets none.

    The official script has a list of companions for each present object; here the times that an absent object
    is with any of the present ones are added.

    Args:
        labels: name of a picture -> its objects. The objects of all pictures are those that can be absent.
        template: the question; {object} is replaced by the object and {a} by its article, "a" or "an".
        kinds: of absent objects, from `KINDS`.
        each: present objects of a picture that are asked about, and as many absent ones.
        seed: of the draws, which depend on nothing but this and the name and objects of a picture.
        place: where the labels are from, for messages.

    Returns:
        Items whose reference is whether the object is present and whose group is the kind.

    Raises:
        ValueError: an argument is out of range, or no picture gives a question.
    """
    if each < 1:
        raise ValueError(f"each must be at least 1, got {each}")
    if unknown := next((kind for kind in kinds if kind not in KINDS), None):
        raise ValueError(f"kinds must be from {', '.join(KINDS)}, got {unknown!r}")
    if "{object}" not in template:
        raise ValueError(f"template must hold {{object}}, got {template!r}")
    labels = {picture: sorted(set(objects)) for picture, objects in labels.items()}
    frequency = Counter(name for objects in labels.values() for name in objects)
    together = Counter(pair for objects in labels.values() for pair in permutations(objects, 2))
    items = []
    for kind in kinds:
        for picture, present in labels.items():
            draw = random.Random(f"{seed}/{picture}")
            absent = sorted(frequency.keys() - present)
            count = min(each, len(present), len(absent))
            asked = draw.sample(present, count)
            if kind == "random":
                others = draw.sample(absent, count)
            elif kind == "popular":
                others = sorted(absent, key=lambda name: (-frequency[name], name))[:count]
            else:
                near = {name: sum(together[name, one] for one in present) for name in absent}
                others = sorted(absent, key=lambda name: (-near[name], name))[:count]
            for shown, hidden in zip(asked, others, strict=True):
                for name in (shown, hidden):
                    items.append(_item(picture, name, kind, name == shown, template, place))
    if not items:
        raise ValueError(f"{place} must have a picture that shows some of the objects and not all, got none")
    return items


def _item(picture: str, name: str, kind: str, label: bool, template: str, place: str) -> Item:
    is_vowel = name[:1].lower() in tuple("aeiou") and not name.lower().startswith(CONSONANTS)
    article = "an" if is_vowel or name.lower().startswith(VOWELS) else "a"
    text = template.replace("{object}", name).replace("{a}", article)
    question = ask(f"{kind}/{picture}/{name}", text, picture, f"{place}, picture {picture}", kind)
    return Item(question, label, kind)
