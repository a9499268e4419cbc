"""Loss curves of the demo."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cumo_model.analysis.plots import PLACES, save, styled

STEPS = 20  # of a moving average


def _smooth(values: list[float], window: int) -> np.ndarray:
    values = np.asarray(values)
    window = max(1, min(window, len(values) // 5))
    return np.convolve(values, np.ones(window) / window, "valid")


def plot_losses(histories: dict[str, dict], path: Path) -> None:
    """Plot language losses and auxiliary losses. `histories` is title -> result of `read_history`."""
    with styled(histories):
        save(_losses_figure(histories), path)


def _losses_figure(histories: dict[str, dict]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2)
    for title, history in histories.items():
        series = history["series"]
        values = _smooth(series.get("language", series["loss"]), STEPS)
        left.plot(np.linspace(0, 1, len(values)), values, label=title)
        for name, values in series.items():
            if name.endswith(("_balance", "_z")):
                place, kind = name.split("_")
                colour = f"C{list(PLACES).index(place)}"
                line = "-" if kind == "balance" else ":"
                right.plot(_smooth(values, STEPS), color=colour, ls=line, label=f"{PLACES[place]} {kind}")
    left.set(title="loss", xlabel="fraction of the stage's steps", ylabel="nats per token", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    right.set(title="auxiliary losses in stage 3 (before coefficients)", xlabel="step")
    for axis in (left, right):
        axis.grid(True)
        if axis.lines:  # below the axis, where it covers no curve
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.set_size_inches(10, 4 + 0.1 * max(len(axis.lines) for axis in (left, right)))
    return figure
