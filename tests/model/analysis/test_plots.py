"""Pictures are readable for every number of kinds, layers and experts: sizes and places are measured."""

import itertools
import warnings

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from cumo_model.analysis import plots
from cumo_model.analysis.plots import plot_expert_load, plot_patches, readable
from cumo_model.demo.plots import plot_losses

SMALLEST = 100  # pixels of a panel
NAMES = ["name", "a long name of a sub-task, of many words, as a file may have " * 2, "x" * 90, "a$b$ _c^{",
         "数学の問題と図表", "émoji 😀", "line\nbreak", "Ж" * 30]  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, still open and drawn. A warning, as for a missing glyph, is an error."""
    kept, save = [], plots.save

    def keep(figure, path):
        monkeypatch.setattr(plots.plt, "close", lambda figure: None)
        save(figure, path)
        kept.append(figure)

    for module in ("cumo_model.analysis.plots", "cumo_model.demo.plots"):
        monkeypatch.setattr(f"{module}.save", keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield kept
    monkeypatch.undo()
    plt.close("all")


def boxes(figure) -> dict[str, list]:
    """Boxes in pixels of panels, visible texts and legends."""
    drawn = figure.canvas.get_renderer()
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    texts = [*figure.texts, *(text for legend in legends for text in legend.get_texts())]
    for axis in figure.axes:
        texts += (
            [*axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label] if axis.axison else [axis.title]
        )
        for side in (axis.xaxis, axis.yaxis) if axis.axison else ():
            low, high = sorted(side.get_view_interval())
            texts += [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
    texts = [text for text in texts if text.get_visible() and text.get_text()]
    return {
        "panels": [axis.get_window_extent(drawn) for axis in figure.axes],
        "texts": [(text.get_text(), text.get_window_extent(drawn)) for text in texts],
        "legends": [legend.get_window_extent(drawn) for legend in legends],
    }


def crosses(one, other) -> bool:
    """Whether two boxes overlap by more than a pixel, as texts of neighbouring ticks may touch."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width > 1 and height > 1


def check(figure) -> None:
    found = boxes(figure)
    page = figure.bbox
    assert min(min(box.width, box.height) for box in found["panels"]) >= SMALLEST
    for name, box in [*found["texts"], *(("legend", box) for box in found["legends"])]:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1, name
    for legend, panel in itertools.product(found["legends"], found["panels"]):
        assert not crosses(legend, panel)
    for (name, one), (other, two) in itertools.combinations(found["texts"], 2):
        assert not crosses(one, two), (name, other)


def shares(kinds: list[str], layers: int, experts: int) -> dict[str, list]:
    dice = np.random.default_rng(0)
    return {kind: dice.dirichlet(np.ones(experts), layers).tolist() for kind in kinds}


@pytest.mark.parametrize(
    "kinds, layers, experts, places",
    [
        (["one"], 1, 2, ["mlp"]),
        (["one"], 4, 4, ["clip", "mlp"]),
        (["one"], 24, 64, ["clip", "mlp", "llm"]),
        (["a", "b"], 24, 8, ["clip", "mlp"]),
        (NAMES, 4, 16, ["clip", "mlp"]),
        (NAMES, 12, 4, ["clip", "mlp", "llm"]),
        ([f"task {number}" for number in range(40)], 4, 64, ["clip", "mlp"]),
    ],
)
def test_the_load_is_readable(tmp_path, figures, kinds, layers, experts, places):
    load = {place: shares(kinds, 1 if place == "mlp" else layers, experts) for place in places}
    plot_expert_load(load, tmp_path / "load.png")
    check(figures[0])
    with Image.open(tmp_path / "load.png") as image:
        assert np.abs(np.array(image.size) - figures[0].bbox.size).max() <= 1


def test_bars_are_the_shares(tmp_path, figures):
    load = {"clip": {"a": [[0.25, 0.75], [0.5, 0.5]]}}
    plot_expert_load(load, tmp_path / "load.png")
    (bars,) = figures[0].axes[0].collections
    found = [tuple(map(tuple, path.vertices[[0, 2]])) for path in bars.get_paths()]
    wanted = [(0, 0, 0.25), (0, 0.25, 1), (1, 0, 0.5), (1, 0.5, 1)]
    assert found == [((layer - 0.4, low), (layer + 0.4, top)) for layer, low, top in wanted]
    assert len(np.unique(bars.get_facecolor(), axis=0)) == 2


def test_places_may_have_other_kinds_and_numbers_of_experts(tmp_path, figures):
    """A kind without pictures has tokens in the language model only; the legend has all experts."""
    load = {"clip": shares(["seen"], 3, 4), "llm": shares(["seen", "text only"], 5, 8)}
    plot_expert_load(load, tmp_path / "load.png")
    check(figures[0])
    assert len(figures[0].legends[0].get_texts()) == 8
    assert [axis.get_ylabel() for axis in figures[0].axes if axis.get_ylabel()] == ["seen", "text only"]
    assert [text.get_text() for axis in figures[0].axes for text in axis.texts] == ["no tokens"]


@pytest.mark.parametrize("number", [2, 10, 11, 20, 21, 64])
def test_every_expert_has_its_own_colour(number):
    assert len(np.unique((plots.colours(number) * 255).round(), axis=0)) == number


def test_names_stay_whole_in_short_lines():
    for name in NAMES:
        lines = readable(name).split("\n")
        assert max(map(plots._columns, lines)) <= plots.NAME
        if name.isascii():
            assert "".join("".join(lines).split()) == "".join(name.split())
    # characters of private use, which no font has
    assert readable("a\ue123\x01") == "a<e123><1>"


@pytest.mark.parametrize(
    "layers, scales, experts", [(1, (1,), 2), (4, (1,), 4), (23, (1, 3), 8), (2, (1,), 64)]
)
def test_patches_are_readable(tmp_path, figures, layers, scales, experts):
    dice = np.random.default_rng(0)
    found = {
        ("clip", layer, scale): dice.integers(0, experts, (3 * scale, 3 * scale))
        for layer in range(layers)
        for scale in scales
    }
    found["mlp", 0, 1] = np.arange(9).reshape(3, 3) % experts
    found["mlp", 0, 1][0, 0] = experts - 1
    plot_patches(np.zeros((12, 12, 3), np.uint8), found, tmp_path / "patches.png")
    check(figures[0])
    assert len(figures[0].legends[0].get_texts()) == experts


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("steps", [1, 400])
def test_no_legend_covers_a_curve(tmp_path, figures, experts, steps):
    curve = np.linspace(5, 0.1, steps).tolist()
    plain = {"loss": curve, "language": curve}
    routers = {"clip_balance": curve, "clip_z": curve, "mlp_balance": curve, "mlp_z": curve, "llm_z": curve}
    titles = [f"stage {number}: {'a long title' * 2}" for number in range(6)]
    histories = {title: {"series": plain} for title in titles}
    histories["with experts"] = {"series": plain | (routers if experts else {})}
    plot_losses(histories, tmp_path / "losses.png")
    check(figures[0])
