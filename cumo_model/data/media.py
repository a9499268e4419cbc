"""Media that a record names but that are not read: other keys than `image`, other marks than `<image>`.

Such a record would be trained on as text, without its picture, video or sound, so it is reported.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any
from urllib.parse import unquote

from PIL import Image

from cumo_model.processing.templates import IMAGE_MARKER

# formats with an opener in Pillow that are not pictures, or that Pillow cannot decode by itself
_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_FOREIGN = (".avif", ".heic", ".heif", ".jxl")  # pictures, also where this Pillow has no decoder for them
OTHER_SUFFIXES = tuple(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .flv .wmv .3gp "
    ".wav .mp3 .flac .ogg .oga .opus .m4a .aac".split()
)

_KINDS = {
    "pictures": "image images img imgs picture pictures pic pics photo photos pixel pixels".split(),
    "a video": "video videos movie movies frame frames".split(),
    "sound": "audio audios sound sounds wav".split(),
    "media": "media medias visual visuals".split(),
}
_KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words}
# what follows the word in the name of a key whose value is the medium (_DATA), its place, or its name
_DATA = set("bytes base b data values tensor tensors array arrays".split())
_FILES = _DATA | set(
    "path paths file files filename filenames fname url urls uri uris src link links".split()
)
_PLACES = _FILES | set("name names list".split())
# which of several media a key names: `input_image`, `image_left`
_WHICH = set(
    "left right top bottom front back before after first second third a c d query input output original "
    "target reference context main raw new old edited".split()
)
_FLAGS = set("has is num n number no with without needs need use uses contains".split())
_PROVENANCE = set(
    "url urls uri uris link links source sources src origin origins web webpage website site homepage href "
    "ref reference references credit credits license licence attribution citation provenance".split()
)
_NO_VALUE = set("none no null nil nan n/a na false true yes unknown unavailable missing empty - / .".split())
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_JOINED = re.compile(f"({'|'.join(sorted(_KIND_OF, key=len, reverse=True))})({'|'.join(_PLACES)})")


@cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes of picture files, lower case: all that Pillow can open, and those of newer formats."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(
        {name for name, form in known if form in Image.OPEN and form not in _NO_PICTURES} | set(_FOREIGN)
    )


def unread_media(fields: dict[str, Any], pictures: Sequence[str] = ()) -> str | None:
    """The reason why `fields` name a medium that is not read, or None.

    Keys are judged by their words and their values. The name of a picture, video or sound file is a medium
    under every key, except those of provenance (`url`, `source`). A path, or a name with digits, is one under
    `images`, `video_path` or `input_image`; a plain word, a number or a flag is none.

    Args:
        fields: the keys of a record or a turn, without those that are read.
        pictures: the names of the record's pictures. Other keys may then name the same files.
    """
    for key, value in fields.items():
        if not isinstance(value, str | list | dict | tuple) or not value or not isinstance(key, str):
            continue
        found = [(words, leaf) for words, leaf in _leaves(_words(key), value) if _is_medium(words, leaf)]
        if pictures:
            found = _others(found, pictures)
        if found:
            kind = next((_KIND_OF[word] for word in found[0][0] if word in _KIND_OF), "media")
            shown = repr(value)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            return f"has {kind} under {key!r}, which is not read (pictures belong under 'image'), got {shown}"
    return None


@lru_cache(4096)
def _words(text: str) -> tuple[str, ...]:
    found: list[str] = []
    for word in (part.lower() for part in _WORDS.findall(text)):
        joined = _JOINED.fullmatch(word)
        found += joined.groups() if joined else [word]
    return tuple(found)


def _leaves(words: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The texts and numbers in a value, in order, each with the words of the keys that lead to it."""
    waiting = [(words, value)]
    while waiting:
        words, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [((*words, *_words(str(key))), inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list | tuple):
            waiting += [(words, inner) for inner in reversed(value)]
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield words, value


def _split(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The words for media, and the others without numbers."""
    kinds = [word for word in words if word in _KIND_OF]
    return kinds, [word for word in words if word not in _KIND_OF and not word.isdecimal()]


def _after(words: tuple[str, ...]) -> list[str] | None:
    """The words after the first one for a medium; None if there is none."""
    plain = [word for word in words if not word.isdecimal()]
    first = next((place for place, word in enumerate(plain) if word in _KIND_OF), None)
    return None if first is None else [word for word in plain[first:] if word not in _KIND_OF]


def _names_one(words: tuple[str, ...]) -> bool:
    """Whether a key has the name of one that holds a medium or its place, as `left_image_path`."""
    after = _after(words)
    if after is None or words[0] in _FLAGS:
        return False
    return _PLACES.issuperset(after) or (words[0] in _KIND_OF and _WHICH.issuperset(after))


def _is_medium(words: tuple[str, ...], leaf: Any) -> bool:
    kinds, others = _split(words)
    after = _after(words) or []
    if not isinstance(leaf, str):
        return _names_one(words) and not _DATA.isdisjoint(after)
    text = leaf.strip()
    if not text or text.lower() in _NO_VALUE:
        return False
    if text.startswith(("data:image/", "data:video/", "data:audio/")):
        return True
    is_one_word = len(text.split(None, 1)) == 1
    if _is_file_name(text):
        if kinds:
            return is_one_word or _names_one(words)
        return _PROVENANCE.isdisjoint(others) and (is_one_word or not _PLACES.isdisjoint(others))
    if not kinds or not _names_one(words):
        return False
    if _PLACES.issuperset(after) and not _FILES.isdisjoint(after):
        return True
    if all(_KIND_OF[kind] == "media" for kind in kinds):
        return False
    if not is_one_word:
        return False
    if "/" in text or "\\" in text:
        return True
    has_number = re.search(r"\d{5}", text) or (len(text) > 10 and re.search(r"\d", text))
    return _PLACES.issuperset(others) and bool(has_number)


def _suffix(text: str) -> str:
    found = re.search(r"\.\w+$", re.split(r"[?#]", text, maxsplit=1)[0])
    return found[0].lower() if found else ""


def _stem(name: str) -> str:
    base = re.split(r"[/\\]", unquote(re.split(r"[?#]", name, maxsplit=1)[0]).rstrip("/"))[-1]
    return base.removesuffix(re.search(r"(?:\.\w+)?$", base)[0])


def _others(found: list[tuple[tuple[str, ...], Any]], pictures: Sequence[str]) -> list:
    """Of the media under one key those that are not the record's pictures at another place."""
    used = [_stem(name) for name in pictures]
    if found and not _split(found[0][0])[1] and not any(word.isdecimal() for word in found[0][0]):
        if [isinstance(leaf, str) and _stem(leaf) for _, leaf in found] == used:
            return []
        return found
    more = []
    for words, leaf in found:
        kinds, others = _split(words)
        is_picture = not isinstance(leaf, str) or _suffix(leaf) not in OTHER_SUFFIXES
        is_picture = is_picture and not str(leaf).startswith(("data:video/", "data:audio/"))
        if not kinds:
            if not is_picture:
                more.append((words, leaf))
        elif not _names_one(words):
            continue
        elif kinds[0] in ("pixel", "pixels") or not is_picture or _KIND_OF[kinds[0]] in ("a video", "sound"):
            more.append((words, leaf))
        elif isinstance(leaf, str) and _DATA.isdisjoint(others) and not leaf.startswith("data:"):
            is_opaque = "://" in leaf and _suffix(leaf) not in picture_suffixes()
            if not is_opaque and _stem(leaf) not in used:
                more.append((words, leaf))
    return more


def names_a_file(fields: dict[str, Any]) -> bool:
    """Whether any key, also of provenance, names a picture, video or sound file."""
    return any(
        isinstance(leaf, str) and _is_file_name(leaf)
        for key, value in fields.items()
        for _, leaf in _leaves((), {str(key): value})
    )


# what may be a placeholder: <video>, <|image_pad|>, <image/>, </image>, [IMG]
_MARK = re.compile(
    r"<(?P<close>/?)(?P<left>\|?)(?P<tag>[\w \t.:#-]{2,40})(?P<right>\|?)/?>|"
    r"\[(?P<bracket>[A-Za-z][\w \t.:#-]{1,20})\]"
)
_MARK_WORDS = set(_KIND_OF) | set("vid vids clip clips speech voice vision".split())
# what surrounds the word in a placeholder of other models: <image_1>, <|video_pad|>, <ImageHere>
_AROUND = set(
    "token tokens placeholder pad patch start end begin of here soft context bos eos sep break fake around "
    "feature features embed embeds newline global".split()
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_ELEMENTS = (
    "html head body div span p a b i u ul ol li dl dt dd table thead tbody tr td th h[1-6] script style form "
    "input button source section nav header footer main article aside figure figcaption br hr link meta svg "
    "iframe label select option textarea canvas track embed object strong em title center font code pre"
)
_MARKUP = re.compile(
    r"</\s*[A-Za-z][\w.:-]*\s*>|<[A-Za-z][\w.:-]*\s[^<>]*=[^<>]*>|<[A-Z][a-z]\w*\s*/>|<!(?:--|(?i:doctype))|"
    rf"<(?i:{'|'.join(_ELEMENTS.split())})\s*/?>"
)
_CODE_SIGNS = re.compile(
    r"[)\]\"']\s*;\s*$|[{}]\s*[;,]?\s*$|=[^=\n]*;\s*$|=>|::|&&|\w\.\w+\(|\w\(\)|\breturn\s*[(<]|"
    r"^\s*(?:import\s+[\w.{*'\"]|from\s+\S+\s+import\b|(?:def|func|fn|function)\s+\w+\s*\(|"
    r"class\s+\w+\s*[:({]|#include|(?:const|let|var)\s+\w+\s*[=:;]|(?:public|private|static)\s+\w|"
    r"[\w.-]+\s*=\s*\S)",
    re.MULTILINE,
)
# before a mark at the end, or after one at the beginning, of a sentence that speaks about it
_BEFORE = re.compile(
    r"(?:,|\b(?:and|or|vs\.?|versus|between|the|an?|use|using|than|like|called|is|are|tag|element)|"
    r"(?:^|\s)--?[\w-]+)[ \t=]*$",
    re.IGNORECASE,
)
_AFTER = re.compile(r"[ \t]+(?:and|or|vs\.?|versus)\b", re.IGNORECASE)
_CALLED = re.compile(r"['\"]?\s+(?:html5?\s+)?(?:tag|element|component|attribute)s?\b", re.IGNORECASE)
_BESIDE_MARKER = re.compile(rf"{IMAGE_MARKER}\s*(?:,|and|or|vs\.?)\s*$", re.IGNORECASE)
# what a line of placeholders may hold besides: "Picture 1:", commas
_LABEL = re.compile(
    rf"\b(?:user|human|question|input|{'|'.join(sorted(_MARK_WORDS))})[ _-]?\d*\s*:|[\s,;.:&|+-]",
    re.IGNORECASE,
)


def unread_mark(question: str, pictures_fit: bool = False, anywhere: bool = False) -> str | None:
    """The first placeholder of a medium in a question that is not `<image>`, or None.

    It is one if it stands where placeholders stand: alone on its line, or at the beginning or end of the
    question, or around the name of a file. In a sentence, in code and among HTML elements it is text.

    Args:
        question: the text of a human turn.
        pictures_fit: whether the record has a picture for each `<image>`, and has pictures: a mark at the end
            of a sentence is then text, as in lists of words that were read from a picture.
        anywhere: whether a mark in a sentence is a placeholder too.
    """
    if "<" not in question and "[" not in question:
        return None
    text = _CODE.sub("`", question)
    ends = _ends(text)
    marks = _marks(text, ends)
    if not marks:
        return None
    spans = {mark.span() for mark in marks}
    rest = _MARK.sub(
        lambda mark: (
            " " * len(mark.group()) if mark.span() in spans or mark.group() == IMAGE_MARKER else mark.group()
        ),
        text,
    )
    first, last = len(rest) - len(rest.lstrip()), len(rest.rstrip())  # of what is not a placeholder
    inner = (text.find("\n", len(text) - len(text.lstrip())), text.rstrip().rfind("\n"))
    lines = rest.split("\n")
    begins = list(accumulate((len(line) + 1 for line in lines), initial=0))
    has_text = [bool(_LABEL.sub("", line).strip()) for line in lines]
    has_markup, is_code = bool(_MARKUP.search(rest)), bool(_CODE_SIGNS.search(rest))
    for mark in marks:
        start, end = mark.span()
        if _is_file_name(_inside(text, mark, ends)):
            return mark.group()
        is_in_code = is_code and (mark["bracket"] or inner[0] < start < inner[1])
        if has_markup or is_in_code or _CALLED.match(text, end):
            continue
        if anywhere or not has_text[bisect_right(begins, start) - 1]:
            return mark.group()
        is_word = not mark["left"] and len(_words(mark["tag"] or mark["bracket"])) == 1
        if start <= first and not (is_word and _AFTER.match(text, end)):
            return mark.group()
        before = text[max(start - 40, 0) : start]
        is_spoken_of = is_word and _BEFORE.search(before) and not _BESIDE_MARKER.search(before)
        if not pictures_fit and end >= last and not is_spoken_of:
            return mark.group()
    return None


def _ends(text: str) -> dict[str, list[tuple[int, int]]]:
    """The places of end tags by name."""
    found: dict[str, list[tuple[int, int]]] = {}
    for tag in re.finditer(r"</([\w \t.:#-]{2,40}?)\s*>", text):
        found.setdefault(tag[1].strip().lower(), []).append(tag.span())
    return found


def _marks(text: str, ends: dict[str, list[tuple[int, int]]]) -> list[re.Match]:
    """What reads like a placeholder of a medium, without type arguments (`List<Image>`) and elements."""
    found, of_elements = [], set()
    for mark in _MARK.finditer(text):
        before, after = text[max(mark.start() - 2, 0) : mark.start()], text[mark.end() : mark.end() + 1]
        if not _is_mark(mark) or mark.start() in of_elements:
            continue
        if re.search(r"[A-Za-z0-9_\"'=/\\$]$|::$", before) or after == "(":
            continue
        if mark["bracket"] and (before.endswith("!") or after in ("[", ":")):
            continue
        inside = _inside(text, mark, ends)
        if inside and re.search(r"<|\S\s+\S", inside):
            of_elements.add(mark.end() + len(inside))
        else:
            found.append(mark)
    return found


def _is_mark(mark: re.Match) -> bool:
    words = _words(mark["bracket"] or mark["tag"])
    others = [word for word in words if word not in _MARK_WORDS and not word.isdecimal()]
    has_kind = len(others) < len([word for word in words if not word.isdecimal()])
    if mark.group() == IMAGE_MARKER or not words:
        return False
    if mark["bracket"]:
        return words[0] in _MARK_WORDS and _AROUND.issuperset(others)
    if mark["left"] or mark["right"]:
        return bool(mark["left"] and mark["right"] and has_kind)
    if others[:1] == ["im"] and len(words) == 2:  # <im_start>
        return _AROUND.issuperset(others[1:])
    return has_kind and _AROUND.issuperset(others)


def _inside(text: str, mark: re.Match, ends: dict[str, list[tuple[int, int]]]) -> str:
    """The text between a mark and its end tag, "" without one."""
    if not mark["tag"] or mark["close"]:
        return ""
    places = ends.get(mark["tag"].strip().lower(), [])
    place = bisect_right(places, (mark.end(),))
    return text[mark.end() : places[place][0]] if place < len(places) else ""


def _is_file_name(text: str) -> bool:
    return _suffix(text.strip()) in picture_suffixes() or _suffix(text.strip()) in OTHER_SUFFIXES
