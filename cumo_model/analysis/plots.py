"""Pictures of experts: load per layer and kind of record, patches by chosen expert."""

from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError:
    raise ValueError("pictures need the package matplotlib, which is not installed") from None

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

PLACES = {"clip": "CLIP-MoE", "mlp": "MLP-MoE", "llm": "LLM-MoE"}


def save(figure, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=130, format="png")
    plt.close(figure)
    part.replace(path)


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
    figure.suptitle("share of routed tokens per expert, by kind of record")
    save(figure, path)


def plot_patches(picture: np.ndarray, experts: dict[tuple[str, int, int], np.ndarray], path: Path) -> None:
    """One picture (s, s, 3) and, per layer and scale, the same with each patch tinted by its first-choice
    expert."""
    num_experts = 1 + max(int(chosen.max()) for chosen in experts.values())
    colours = plt.get_cmap("tab10")(range(num_experts))[:, :3]
    columns = min(9, 1 + len(experts))
    rows = -(-(1 + len(experts)) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2 * columns, 2.3 * rows + 0.3), layout="constrained", squeeze=False
    )
    axes = axes.flatten()
    axes[0].imshow(picture)
    axes[0].set_title("picture", fontsize=9)
    side = picture.shape[0]
    several = len({scale for _, _, scale in experts}) > 1
    for axis, ((place, layer, scale), chosen) in zip(axes[1:], experts.items(), strict=False):
        tint = Image.fromarray((colours[np.asarray(chosen)] * 255).astype(np.uint8)).resize((side, side), 0)
        axis.imshow((0.45 * picture + 0.55 * np.asarray(tint)).astype(np.uint8))
        title = f"{PLACES[place]} {layer}" if place == "clip" else PLACES[place]
        axis.set_title(f"{title}, x{scale}" if several and place == "clip" else title, fontsize=9)
    for axis in axes:
        axis.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    labels = [f"expert {e}" for e in range(num_experts)]
    figure.legend(handles, labels, loc="outside lower center", ncols=num_experts, fontsize=8)
    save(figure, path)
