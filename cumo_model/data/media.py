"""Media that a record names but that are not read: other keys than `image`, other marks than `<image>`.

Such a record would be trained on as text, without its picture, video or sound, so it is reported.
"""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

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
# what follows the word in the name of a key whose value is the medium or its place
_PLACES = set(
    "path paths file files filename filenames fname name names url urls uri uris src link links bytes base "
    "b data list values tensor tensors array arrays".split()
)
# what surrounds the word in a placeholder of other models: <image_1>, <|video_pad|>, <ImageHere>
_AROUND = set(
    "token tokens placeholder pad patch start end begin of here soft context bos eos sep break".split()
)
_BARE = set("image images img imgs picture video videos audio audios".split())
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

    A key is judged by its words and its value: `images`, `video_path` and `imageUrl` are places of media,
    `image_id`, `video_length` and `image_source` are not, and a number or a flag names nothing.

    Args:
        fields: the keys of a record or a turn, without those that are read.
        pictures: the names of the record's pictures. Keys such as `image_url` and `images` may then repeat
            where these pictures are from.
    """
    for key, value in fields.items():
        if not isinstance(value, str | list | dict | tuple) or not value or not isinstance(key, str):
            continue
        words = _words(key)
        kinds = [_KIND_OF[word] for word in words if word in _KIND_OF]
        others = [word for word in words if word not in _KIND_OF and not word.isdecimal()]
        kind = kinds[0] if kinds else "media"
        is_place = bool(kinds) and _PLACES.issuperset(others)
        if pictures:
            same = kind == "pictures" and (others or _names(value) == list(pictures))
            found = is_place and (not same or words[0] in ("pixel", "pixels"))
        else:
            found = is_place or ((kinds or _PLACES.intersection(others)) and _is_media_file(value))
        if found:
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


def _names(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_media_file(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_media_file, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_media_file, value))
    if not isinstance(value, str):
        return False
    if value.startswith(("data:image/", "data:video/", "data:audio/")):
        return True
    suffix = re.search(r"\.\w+$", value.split("?")[0])
    return bool(suffix) and suffix[0].lower() in picture_suffixes() | set(OTHER_SUFFIXES)


_TAG = re.compile(r"<(\|?)([\w \t-]{2,40})(\|?)>")
_BRACKETS = re.compile(r"\[(?:IMG|IMAGE|VIDEO|AUDIO)(?:[ _]?(?:\d+|BREAK|END))?\]")
_CALLED = re.compile(r"['\"]?\s+(?:html5?\s+)?(?:tag|element|component|attribute)s?\b", re.IGNORECASE)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


def unread_mark(text: str, is_question: bool) -> str | None:
    """The first placeholder of a medium in a turn that is not `<image>`, or None.

    Marks in code are text. So are the names of HTML elements (`<video>`, `<picture>`) in an answer, or around
    other elements.
    """
    if "<" not in text and "[" not in text:
        return None
    if "`" in text:
        text = _CODE.sub("", text)
    for tag in _TAG.finditer(text):
        mark, words = tag.group(), _words(tag[2])
        others = [word for word in words if word not in _KIND_OF and not word.isdecimal()]
        has_kind = any(word in _KIND_OF for word in words)
        if tag[1] and tag[3]:
            if has_kind:
                return mark
        elif mark == IMAGE_MARKER or tag[1] or tag[3]:
            continue
        elif others[:1] == ["im"] and len(words) == 2 and _AROUND.issuperset(others[1:]):  # <im_start>
            return mark
        elif len(words) > 1:
            if has_kind and _AROUND.issuperset(others):
                return mark
        elif is_question and words and words[0] in _BARE and not _is_element(text, tag):
            return mark
    found = _BRACKETS.search(text) if is_question else None
    return found.group() if found else None


def _is_element(text: str, tag: re.Match) -> bool:
    """Whether a bare tag is of HTML: it has an end and other elements in it, or is called a tag."""
    if _CALLED.match(text, tag.end()):
        return True
    end = re.compile(rf"</{re.escape(tag[2].strip())}\s*>", re.IGNORECASE).search(text, tag.end())
    return end is not None and "<" in text[tag.end() : end.start()]
