"""Loss curves of the demo."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from cumo_model.analysis.plots import PLACES, save


def _smooth(values: list[float], window: int) -> np.ndarray:
    values = np.asarray(values)
    window = max(1, min(window, len(values) // 5))
    return np.convolve(values, np.ones(window) / window, "valid")


def plot_losses(histories: dict[str, dict], path: Path) -> None:
    """Plot language losses and auxiliary losses. `histories` is title -> result of `read_history`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for title, history in histories.items():
        series = history["series"]
        values = _smooth(series.get("language", series["loss"]), 20)
        left.plot(np.linspace(0, 1, len(values)), values, label=title)
        for name, values in series.items():
            if name.endswith(("_balance", "_z")):
                place, kind = name.split("_")
                right.plot(
                    _smooth(values, 20), label=f"{PLACES[place]} {kind}", ls="-" if kind == "balance" else ":"
                )
    left.set(title="loss", xlabel="fraction of the stage's steps", ylabel="nats per token", yscale="log")
    right.set(title="auxiliary losses in stage 3 (before coefficients)", xlabel="step")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    save(figure, path)
