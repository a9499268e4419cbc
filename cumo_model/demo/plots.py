"""The demo's pictures: loss curves, expert load per layer and kind of question, patches by chosen expert."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

PLACES = {"clip": "CLIP-MoE", "mlp": "MLP-MoE", "llm": "LLM-MoE"}


def _smooth(values: list[float], window: int) -> np.ndarray:
    values = np.asarray(values)
    window = max(1, min(window, len(values) // 5))
    return np.convolve(values, np.ones(window) / window, "valid")


def _save(figure, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=130, format="png")
    plt.close(figure)
    part.replace(path)


def plot_losses(histories: dict[str, dict], path: Path) -> None:
    """`histories`: title -> what `fit` returned. Language losses, and the auxiliary ones beside them."""
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
    left.set(title="loss", xlabel="share of the stage's steps", ylabel="nats per token", yscale="log")
    right.set(title="auxiliary losses in stage 3 (before coefficients)", xlabel="step")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    _save(figure, path)


def plot_expert_load(load: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """`load`: place -> kind of question -> per layer the share of each expert; stacked bars."""
    kinds = list(next(iter(load.values())))
    figure, axes = plt.subplots(
        len(kinds),
        len(load),
        figsize=(4 * len(load), 1.5 * len(kinds)),
        layout="constrained",
        squeeze=False,
        sharey=True,
        width_ratios=[max(1.5, len(load[place][kinds[0]])) for place in load],
    )
    for column, (place, by_kind) in enumerate(load.items()):
        for row, kind in enumerate(kinds):
            axis, shares = axes[row][column], np.array(by_kind[kind])
            bottom = np.zeros(len(shares))
            for expert in range(shares.shape[1]):
                axis.bar(range(len(shares)), shares[:, expert], 0.8, bottom, label=f"expert {expert}")
                bottom += shares[:, expert]
            axis.set(xticks=range(len(shares)), ylim=(0, 1), yticks=(0, 0.5, 1))
            if row == 0:
                axis.set_title(PLACES[place])
            if row == len(kinds) - 1:
                axis.set_xlabel("layer")
            if column == 0:
                axis.set_ylabel(kind)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle("share of routed tokens per expert, by kind of question (unseen drawings)")
    _save(figure, path)


def plot_patches(
    picture: np.ndarray, experts: dict[tuple[str, int], np.ndarray], num_experts: int, path: Path
) -> None:
    """One picture (s, s, 3) and, per layer, the same with each patch tinted by its first-choice expert."""
    colours = plt.get_cmap("tab10")(range(num_experts))[:, :3]
    figure, axes = plt.subplots(
        1, 1 + len(experts), figsize=(2 * (1 + len(experts)), 2.5), layout="constrained"
    )
    axes[0].imshow(picture)
    axes[0].set_title("picture", fontsize=9)
    side = picture.shape[0]
    for axis, ((place, layer), chosen) in zip(axes[1:], experts.items(), strict=True):
        tint = Image.fromarray((colours[np.asarray(chosen)] * 255).astype(np.uint8)).resize((side, side), 0)
        axis.imshow((0.45 * picture + 0.55 * np.asarray(tint)).astype(np.uint8))
        axis.set_title(f"{PLACES[place]} {layer}" if place == "clip" else PLACES[place], fontsize=9)
    for axis in axes:
        axis.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    labels = [f"expert {e}" for e in range(num_experts)]
    figure.legend(handles, labels, loc="outside lower center", ncols=num_experts, fontsize=8)
    _save(figure, path)
