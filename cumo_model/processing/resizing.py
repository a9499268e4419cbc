"""Resizing of pictures, large ones strip by strip, with the result of resizing the whole and little memory.

Pillow resizes in two passes, horizontal and vertical, and rounds and clips to 8 bits after each. A pass is
independent for each row or column, so it can be done strip by strip. Of the canvas of a padded picture, only
a strip is in memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from PIL import Image

from cumo_model.processing.pictures import Picture

WHOLE = 1 << 23  # pixels up to which a canvas is resized by one call of Pillow
STRIP = 1 << 20  # pixels of a strip
BETWEEN = 1 << 22  # pixels between the two passes; columns of a taller picture are resized in groups
REACH = 4  # pixels of the result that a pixel influences on each side; the widest filter has 3
Size = tuple[int, int]  # width and height


@dataclass(frozen=True)
class Canvas:
    """An area of one colour, with the picture at (left, top)."""

    size: Size
    colour: tuple[int, int, int] = (0, 0, 0)
    left: int = 0
    top: int = 0

    @classmethod
    def square(cls, size: Size, colour: tuple[int, int, int]) -> "Canvas":
        """The smallest square for a picture of this size, which is centred; offsets are rounded down."""
        side = max(size)
        return cls((side, side), colour, (side - size[0]) // 2, (side - size[1]) // 2)


@dataclass(frozen=True)
class _Span:
    """Along one axis: the pixels begin to end of the canvas, of which a part of the result is computed.

    `box` is the part of these pixels that the result covers; None for the whole axis.
    """

    begin: int
    end: int
    box: tuple[float, float] | None

    @classmethod
    def of(cls, first: int, last: int, count: int, length: int) -> "_Span":
        """The span of `first` to `last` of a result of `count` pixels, on an axis of the canvas."""
        if (first, last) == (0, count):
            return cls(0, length, None)
        scale = length / count
        margin = REACH * max(scale, 1)
        begin = max(0, int(first * scale - margin))
        end = min(length, ceil(last * scale + margin))
        return cls(begin, end, (first * scale - begin, last * scale - begin))


def resize(
    picture: Picture,
    size: Size,
    resample: int,
    canvas: Canvas | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> Image.Image:
    """Resize a picture as Pillow's `Image.resize` does.

    Args:
        picture: the picture.
        size: width and height of the result.
        resample: filter, a value of Image.Resampling.
        canvas: the picture is first placed on it.
        window: (left, top, right, bottom), the part of the result that is computed; for pictures whose result
            is large.

    Returns:
        An RGB image of this size, or of the size of the window. Its values are those of Pillow. With a window
        or more than WHOLE pixels, the horizontal pass is the first, as in Pillow for squares and if rows are
        added. In other cases Pillow 13 chooses the order, and values may differ by rounding.
    """
    canvas = canvas or Canvas(picture.size)
    left, top, right, bottom = window or (0, 0, *size)
    if window is None and canvas.size[0] * canvas.size[1] <= WHOLE:
        whole = picture.image
        if canvas.size != picture.size:
            whole = _placed(whole, canvas.size, canvas.colour, (canvas.left, canvas.top))
        return whole.resize(size, resample)
    rows = _Span.of(top, bottom, size[1], canvas.size[1])
    # rows of the picture that the result depends on; there may be none
    start = max(0, rows.begin - canvas.top)
    stop = max(start, min(picture.size[1], rows.end - canvas.top))
    place = canvas.top + start - rows.begin
    out = Image.new("RGB", (right - left, bottom - top), canvas.colour)
    for first, last in _groups(picture, size, canvas, (left, right), stop - start):
        columns = _Span.of(first, last, size[0], canvas.size[0])
        between = Image.new("RGB", (last - first, stop - start))
        for begin, end in _strips(start, stop, columns.end - columns.begin):
            strip = _row_strip(picture, canvas, columns, begin, end)
            box = columns.box and (columns.box[0], 0, columns.box[1], end - begin)
            between.paste(strip.resize((last - first, end - begin), resample, box), (0, begin - start))
        tall = rows.end - rows.begin
        for begin, end in _strips(first, last, tall):
            strip = between.crop((begin - first, 0, end - first, stop - start))
            if strip.height != tall:
                strip = _placed(strip, (end - begin, tall), canvas.colour, (0, place))
            box = rows.box and (0, rows.box[0], end - begin, rows.box[1])
            out.paste(strip.resize((end - begin, bottom - top), resample, box), (begin - left, 0))
    return out


def _groups(
    picture: Picture, size: Size, canvas: Canvas, wanted: tuple[int, int], rows: int
) -> Iterator[tuple[int, int]]:
    """Groups of columns of the result; if there are several, without those that show only canvas."""
    first, last = wanted
    step = max(1, BETWEEN // max(1, rows))
    if last - first <= step:
        yield first, last
        return
    scale = canvas.size[0] / size[0]
    reach = REACH if scale > 1 else ceil(REACH / scale)
    first = max(first, int(canvas.left / scale) - reach)
    last = min(last, ceil((canvas.left + picture.size[0]) / scale) + reach)
    yield from ((start, min(start + step, last)) for start in range(first, last, step))


def _strips(begin: int, end: int, across: int) -> Iterator[tuple[int, int]]:
    step = max(1, STRIP // across)
    return ((start, min(start + step, end)) for start in range(begin, end, step))


def _row_strip(picture: Picture, canvas: Canvas, columns: _Span, start: int, stop: int) -> Image.Image:
    """The rows start to stop of the picture, on the canvas from columns.begin to columns.end."""
    begin = max(columns.begin, canvas.left)
    end = min(columns.end, canvas.left + picture.size[0])
    size = (columns.end - columns.begin, stop - start)
    if begin >= end:
        return Image.new("RGB", size, canvas.colour)
    part = picture.part(begin - canvas.left, start, end - canvas.left, stop)
    if part.size == size:
        return part
    return _placed(part, size, canvas.colour, (begin - columns.begin, 0))


def _placed(strip: Image.Image, size: Size, colour: tuple[int, int, int], place: Size) -> Image.Image:
    area = Image.new("RGB", size, colour)
    area.paste(strip, place)
    return area
