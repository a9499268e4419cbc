"""Plots of routing: expert load per layer and kind of record, and patches by first-choice expert."""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError:
    raise ValueError("pictures need the package matplotlib, which is not installed") from None

matplotlib.use("Agg")

import numpy as np
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image

PLACES = {"clip": "CLIP-MoE", "mlp": "MLP-MoE", "llm": "LLM-MoE"}
FONT = "DejaVu Sans"  # comes with matplotlib
STYLE = {
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.6",
    "axes.grid.axis": "y",
    "grid.color": "0.9",
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# sizes in inches
PANEL, LINE = 0.9, 0.16  # height of a panel, and of a line of text
LAYER, WIDEST = 0.3, 9.0  # width of a layer, and the largest width of a panel
ENTRY = 0.95  # width of an entry of the legend
NAME = 24  # columns of text in a line of a name


@contextmanager
def styled(names: Iterable[str] = ()) -> Iterator[None]:
    """Draw in the style of all pictures, with fonts that have the characters of `names`."""
    with matplotlib.rc_context({**STYLE, "font.family": [FONT, *_fonts(_missing(names))[0]]}):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG atomically and close it."""
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=STYLE["figure.dpi"], format="png")
    plt.close(figure)
    part.replace(path)


def _charmap(path: str) -> set[int]:
    return set(font_manager.get_font(path).get_charmap())


def _missing(names: Iterable[str]) -> set[int]:
    """Characters that the default font does not have."""
    wanted = {ord(char) for name in names for char in name if char.isprintable()}
    return wanted - _charmap(font_manager.findfont(FONT)) if wanted else set()


def _fonts(missing: set[int]) -> tuple[list[str], set[int]]:
    """Names of installed fonts that have these characters, and the characters that none has."""
    found: list[str] = []
    for entry in font_manager.fontManager.ttflist if missing else ():
        # the font of last resort has a box for every character
        if not entry.name.startswith("Last Resort") and missing & (has := _charmap(entry.fname)):
            found.append(entry.name)
            missing = missing - has
    return found, missing


def readable(name: str) -> str:
    """A name in lines of limited width. Characters that no installed font has are written as their code."""
    absent = _fonts(_missing([name]))[1]
    lines = [""]
    for word in name.split():
        if lines[-1] and _columns(f"{lines[-1]} {word}") <= NAME:
            lines[-1] += " "
        elif lines[-1]:
            lines.append("")
        for char in word:
            unit = f"<{ord(char):x}>" if ord(char) in absent or not char.isprintable() else char
            if _columns(lines[-1] + unit) > NAME:
                lines.append("")
            lines[-1] += unit
    return "\n".join(lines)


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def colours(number: int) -> np.ndarray:
    """One colour per expert, (number, 3)."""
    if number <= 10:
        return plt.get_cmap("tab10")(range(number))[:, :3]
    if number <= 20:
        return plt.get_cmap("tab20")(range(number))[:, :3]
    return plt.get_cmap("turbo")(np.linspace(0.03, 0.97, number))[:, :3]


def _legend_height(number: int, width: float) -> float:
    return 0.3 + 0.2 * -(-number // _legend_columns(number, width))


def _legend_columns(number: int, width: float) -> int:
    return max(1, min(number, int(width / ENTRY)))


def _legend(figure: Figure, number: int) -> None:
    """A legend of the experts below all panels."""
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours(number)]
    labels = [f"expert {expert}" for expert in range(number)]
    columns = _legend_columns(number, figure.get_figwidth())
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, columnspacing=1, handlelength=1.2
    )


def plot_expert_load(load: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Plot stacked bars of `load`, place -> kind of record -> layer -> share of each expert.

    A kind of record without tokens in a place has an empty panel there.
    """
    kinds = list(dict.fromkeys(kind for by_kind in load.values() for kind in by_kind))
    with styled(kinds):
        save(_load_figure(load, kinds), path)


def _load_figure(load: dict[str, dict[str, list[list[float]]]], kinds: list[str]) -> Figure:
    names = [readable(kind) for kind in kinds]
    layers = {place: max(map(len, by_kind.values())) for place, by_kind in load.items()}
    experts = max(len(shares[0]) for by_kind in load.values() for shares in by_kind.values())
    widths = [min(WIDEST, max(1.6, LAYER * number)) for number in layers.values()]
    heights = [max(PANEL, LINE * (name.count("\n") + 1)) for name in names]
    longest = max(_columns(line) for name in names for line in name.split("\n"))
    width = max(5.0, sum(widths) + 0.3 * len(widths) + 0.6 + 0.09 * longest)
    height = sum(heights) + 0.12 * len(heights) + 1.1 + _legend_height(experts, width)
    figure, axes = plt.subplots(
        len(kinds),
        len(load),
        figsize=(width, height),
        squeeze=False,
        sharex="col",
        width_ratios=widths,
        height_ratios=heights,
    )
    for column, (place, by_kind) in enumerate(load.items()):
        number = layers[place]
        for row, kind in enumerate(kinds):
            axis = axes[row][column]
            if kind in by_kind:
                _bars(axis, np.array(by_kind[kind]))
            else:
                axis.text(0.5, 0.5, "no tokens", ha="center", va="center", transform=axis.transAxes)
            step = -(-number // int(widths[column] / 0.22))
            axis.set(
                xticks=range(0, number, step), xlim=(-0.6, number - 0.4), ylim=(0, 1), yticks=(0, 0.5, 1)
            )
            axis.tick_params(labelbottom=row == len(kinds) - 1, labelleft=column == 0)
        axes[0][column].set_title(PLACES[place])
        axes[-1][column].set_xlabel("layer")
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center", parse_math=False)
    _legend(figure, experts)
    of_kinds = ",\nby kind of record" if len(kinds) > 1 else ""
    figure.suptitle(f"share of routed tokens per expert{of_kinds}", fontsize=11)
    return figure


def _bars(axis, shares: np.ndarray) -> None:
    """Draw all bars as one artist: a plot of many kinds and experts has 100 000 of them."""
    layers, experts = shares.shape
    top = shares.cumsum(1)
    low = top - shares
    left, right = (np.repeat(np.arange(layers)[:, None] + side, experts, 1) for side in (-0.4, 0.4))
    corners = np.stack([left, low, left, top, right, top, right, low], -1).reshape(-1, 4, 2)
    bars = PolyCollection(corners, facecolors=np.tile(colours(experts), (layers, 1)), linewidths=0)
    bars.set_in_layout(False)
    axis.add_collection(bars, autolim=False)


def plot_patches(picture: np.ndarray, experts: dict[tuple[str, int, int], np.ndarray], path: Path) -> None:
    """Plot a picture (s, s, 3) and, per layer and scale, its patches tinted by first-choice expert."""
    with styled():
        save(_patches_figure(picture, experts), path)


def _patches_figure(picture: np.ndarray, experts: dict[tuple[str, int, int], np.ndarray]) -> Figure:
    number = 1 + max(int(chosen.max()) for chosen in experts.values())
    palette = colours(number)
    columns = min(8, 1 + len(experts))
    rows = -(-(1 + len(experts)) // columns)
    width = max(4.0, 1.9 * columns)
    height = 2.2 * rows + _legend_height(number, width)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    axes = axes.flatten()
    axes[0].imshow(picture)
    axes[0].set_title("picture")
    side = picture.shape[0]
    # without its own colours, which would mix with those of the experts
    grey = picture.astype(float) @ (0.299, 0.587, 0.114)
    several = len({scale for _, _, scale in experts}) > 1
    for axis, ((place, layer, scale), chosen) in zip(axes[1:], experts.items(), strict=False):
        tint = Image.fromarray((palette[np.asarray(chosen)] * 255).astype(np.uint8)).resize((side, side), 0)
        axis.imshow((0.45 * grey[..., None] + 0.55 * np.asarray(tint)).astype(np.uint8))
        title = PLACES[place] if place == "mlp" else f"{PLACES[place]} {layer}"
        axis.set_title(f"{title}, x{scale}" if several and place == "clip" else title)
    for axis in axes:
        axis.axis("off")
    _legend(figure, number)
    return figure
