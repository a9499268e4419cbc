"""Objects that captions name and pictures do not show: CHAIR.

Formula: Object Hallucination in Image Captioning (arXiv 1809.02156) and its official repository
LisaAnne/Hallucination, utils/chair.py. CHAIR_i is the share of mentions whose object is absent, CHAIR_s the
share of captions with such a mention. The official code takes off plurals by a library; here the vocabulary
has all forms. So the figures depend on the vocabulary, and are comparable only where it is the same.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence


class Vocabulary:
    """Finds the objects that a caption names.

    Args:
        words: object -> its other names, such as plurals and synonyms; the object itself is one of its names.

    Raises:
        ValueError: there is no object, a name is empty, or two objects have the same name.
    """

    def __init__(self, words: Mapping[str, Iterable[str]]):
        if not words:
            raise ValueError("the vocabulary must hold at least one object, got none")
        self._objects: dict[str, str] = {}
        for name, others in words.items():
            for word in (name, *others):
                if not (key := _key(word)):
                    raise ValueError(f"names of {name!r} must have letters, got {word!r}")
                if self._objects.setdefault(key, name) != name:
                    raise ValueError(
                        f"{word!r} must name one object, got {self._objects[key]!r} and {name!r}"
                    )
        # of two names that begin at one place the longer one counts: "dog bowl" before "dog"
        longest = sorted(self._objects, key=lambda key: (-len(key), key))
        self._pattern = re.compile("|".join(map(_whole, longest)))

    def object_of(self, name: str) -> str | None:
        """The object that a name is of, or None."""
        return self._objects.get(_key(name))

    def mentions(self, caption: str) -> list[str]:
        """The objects that a caption names, in its order, each as often as it is named."""
        return [self._objects[_key(found)] for found in self._pattern.findall(_folded(caption))]


# scripts whose words have no spaces between them: Thai, Lao, Khmer, kana, Han
UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


def _whole(key: str) -> str:
    """A pattern of a name as a whole word, where words have spaces between them."""
    names = re.escape(key).replace(r"\ ", r"\s+")
    before = "" if re.match(f"[{UNSPACED}]", key) else rf"(?<![^\W{UNSPACED}])"
    after = "" if re.search(f"[{UNSPACED}]$", key) else rf"(?![^\W{UNSPACED}])"
    return f"{before}{names}{after}"


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _key(word: str) -> str:
    return " ".join(_folded(word).split())


def chair_counts(caption: str, objects: Iterable[str], vocabulary: Vocabulary) -> dict[str, int]:
    """What a caption says about the objects of its picture.

    Args:
        caption: the text.
        objects: the objects in the picture, as the vocabulary calls them.
        vocabulary: the names of objects.

    Returns:
        "mentions" of objects, how many of them are "absent", number of "objects" in the picture, and how many
        of them are "named".
    """
    present, mentions = set(objects), vocabulary.mentions(caption)
    return {
        "mentions": len(mentions),
        "absent": sum(name not in present for name in mentions),
        "objects": len(present),
        "named": len(present.intersection(mentions)),
    }


def chair_figures(counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """CHAIR_s, CHAIR_i and the recall of objects, in percent, of the counts of captions.

    Without any mention CHAIR_i is 0, without any object recall is 0, and without captions all are nan.
    """
    if not counts:
        return dict.fromkeys(("CHAIR_s", "CHAIR_i", "recall"), float("nan"))
    total = {name: sum(one[name] for one in counts) for name in ("mentions", "absent", "objects", "named")}
    return {
        "CHAIR_s": 100 * sum(one["absent"] > 0 for one in counts) / len(counts),
        "CHAIR_i": 100 * total["absent"] / total["mentions"] if total["mentions"] else 0.0,
        "recall": 100 * total["named"] / total["objects"] if total["objects"] else 0.0,
    }
