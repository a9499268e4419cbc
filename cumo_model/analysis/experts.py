"""Analysis of routing: expert load per layer and kind of record, and the first-choice expert of each patch.

python -m cumo_model experts --checkpoint DIR --data FILE --images DIR --by kind
"""

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from cumo_model.checkpoints.assemble import assemble
from cumo_model.checkpoints.folders import new_directory
from cumo_model.checkpoints.processors import template_for
from cumo_model.data.batches import collate
from cumo_model.data.streamed import StreamedConversations
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.moe import MoELayer
from cumo_model.model.pyramid import crop_counts, merge_chessboard
from cumo_model.model.recording import record_routing
from cumo_model.processing.tokenizer_files import no_tokenizer

Load = dict[str, dict[str, list[list[float]]]]  # place -> kind -> layer -> share of each expert


@torch.no_grad()
def expert_load(
    model: CumoForConditionalGeneration, batches: Iterable[tuple[str, dict[str, Tensor]]]
) -> Load:
    """Measure the share of routed slots (token, choice) of each expert; padding is not counted.

    Args:
        model: runs in evaluation mode; its mode is restored afterwards.
        batches: pairs (kind, batch). A batch has input_ids, attention_mask and, with pictures, pixel_values.

    Returns:
        Place -> kind -> layer -> share of each expert. Places without experts are absent.
    """
    slots: dict = defaultdict(lambda: defaultdict(dict))
    was_training = model.training
    model.eval()
    for kind, batch in batches:
        real = batch["attention_mask"].flatten().bool()
        inputs = {n: v.to(model.device) for n, v in batch.items() if isinstance(v, Tensor) and n != "labels"}
        with record_routing() as records:
            model.model(**inputs, use_cache=False)
        for record in records:
            indices = record.routing.topk_indices.cpu()
            if record.place == "llm":
                indices = indices[real]
            count = torch.bincount(indices.flatten(), minlength=record.routing.num_experts)
            layers = slots[record.place][kind]
            layers[record.layer] = layers.get(record.layer, 0) + count
    model.train(was_training)
    return {
        place: {
            kind: [(layers[i] / layers[i].sum()).tolist() for i in sorted(layers)]
            for kind, layers in kinds.items()
        }
        for place, kinds in slots.items()
    }


def load_entropy(load: Mapping[str, list[list[float]]]) -> float:
    """Normalised entropy of the expert load of all kinds, averaged over layers: 1 uniform, 0 collapsed."""
    shares = torch.tensor(list(load.values())).mean(0)  # (layers, E)
    entropy = torch.special.entr(shares).sum(1) / torch.log(torch.tensor(float(shares.shape[1])))
    return float(entropy.mean())


def specialisation(load: Mapping[str, list[list[float]]]) -> float:
    """How much the kinds of records differ in the experts they use.

    This is the total variation distance of the expert shares, averaged over layers and pairs of kinds: 0 if
    all kinds have the same shares, 1 if no two kinds share an expert.
    """
    shares = torch.tensor(list(load.values()))  # (kinds, layers, E)
    if len(shares) < 2:
        return 0.0
    distance = (shares[:, None] - shares[None]).abs().sum(-1) / 2
    return float(distance.sum() / (len(shares) * (len(shares) - 1) * shares.shape[1]))


@torch.no_grad()
def patch_experts(
    model: CumoForConditionalGeneration, pixel_values: Tensor
) -> dict[tuple[str, int, int], Tensor]:
    """First-choice expert of each patch of one picture.

    Args:
        model: switched to evaluation mode.
        pixel_values: (1, 3, s, s).

    Returns:
        (place, layer, scale) -> square map of expert ids. In the tower, the k x k tiles of scale k are
        joined to one map. The connector has one map, with scale 1.
    """
    with record_routing() as records:
        model.eval().get_image_features(pixel_values.to(model.device))
    scales, found = model.config.scales, {}
    for record in records:
        first = record.routing.topk_indices[:, 0].cpu()
        if record.place != "clip":
            side = round(len(first) ** 0.5)
            found[record.place, record.layer, 1] = first.view(side, side)
            continue
        counts = crop_counts(1, scales)
        per_crop = first.view(sum(counts), -1)[:, 1:]  # without the class token
        side = round(per_crop.shape[1] ** 0.5)
        for scale, tiles in zip(scales, per_crop.split(counts), strict=True):
            board = merge_chessboard(tiles.reshape(-1, 1, side, side), scale)
            found[record.place, record.layer, scale] = board[0, 0]
    return found


def kinds_of(dataset: StreamedConversations, by: str | None, limit: int | None) -> dict[str, list[int]]:
    """Record numbers grouped by the field `by`, or by file if it is None; at most `limit` per group."""
    found: dict[str, list[int]] = defaultdict(list)
    for number in range(len(dataset)):
        file = dataset.file_of(number)
        if by is None:
            kind = Path(file).stem
        else:
            record = dataset.record(number)
            if by not in record:
                raise ValueError(
                    f"by must be a field of every record, got {by!r}, which {record.get('id')!r} lacks"
                )
            kind = str(record[by])
        if limit is None or len(found[kind]) < limit:
            found[kind].append(number)
    return dict(found)


def _batches(dataset: StreamedConversations, kinds: dict[str, list[int]], size: int):
    total = sum(map(len, kinds.values()))
    with tqdm(total=total, desc="records", mininterval=1) as bar:
        for kind, numbers in kinds.items():
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                yield kind, collate([dataset[i] for i in part], dataset.pad_id)
                bar.update(len(part))


def _as_seen(pixels: Tensor, image_processor) -> np.ndarray:
    """A tile (3, s, s) as the tower sees it, padded or cropped: (s, s, 3) uint8."""
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std)
    )
    return ((pixels * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def plot_picture(model: CumoForConditionalGeneration, image_processor, picture: Image, path: Path) -> bool:
    """Write a plot of a picture's patches, coloured by their first-choice expert in each layer.

    Args:
        model: switched to evaluation mode.
        image_processor: the image processor of the model.
        picture: the picture; of one that is cut into tiles, the first is plotted, which shows the whole.
        path: of the plot, a PNG.

    Returns:
        Whether there is a plot: without experts for pictures there is none.
    """
    from cumo_model.analysis import plots

    pixels = image_processor(picture, return_tensors="pt")["pixel_values"][:1]
    found = patch_experts(model, pixels.to(model.dtype))
    if not found:
        return False
    chosen = {key: value.numpy() for key, value in found.items()}
    plots.plot_patches(_as_seen(pixels[0], image_processor), chosen, path)
    return True


def report_experts(
    checkpoint: str | os.PathLike,
    files: Sequence[str],
    images: Sequence[str],
    out: str | os.PathLike,
    by: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    pictures: Sequence[str] = (),
) -> dict:
    """Measure the routing of a checkpoint; write load.json, load.png and patches-NAME.png per picture.

    Args:
        checkpoint: folder of the checkpoint.
        files: names or patterns of conversation files.
        images: folders or .tar files of their pictures.
        out: new folder for the results.
        by: field of the records that gives their kind; None: each file is one kind.
        template: name of the conversation template; by default that of the checkpoint.
        limit: maximum number of records per kind.
        batch_size: records per forward pass.
        pictures: files of pictures whose patches are plotted by expert.

    Returns:
        The content of load.json: load, entropy and specialisation by place, and records by kind.

    Raises:
        ValueError: the checkpoint has no experts or no tokenizer, or a file cannot be read.
    """
    from cumo_model.analysis import plots
    from cumo_model.processing.pictures import load_image

    model, processor = assemble(checkpoint)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if not any(isinstance(module, MoELayer) for module in model.modules()):
        raise ValueError(f"checkpoint {os.fspath(checkpoint)!r} has no experts")
    if processor is None:
        raise ValueError(f"checkpoint {os.fspath(checkpoint)!r} {no_tokenizer(checkpoint)}")
    template = template_for(processor, template)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # records without labels are analysed too
        dataset = StreamedConversations(list(files), list(images) or None, processor, template)
    kinds = kinds_of(dataset, by, limit)
    load = expert_load(model, _batches(dataset, kinds, batch_size))
    found = {
        "checkpoint": os.fspath(checkpoint),
        "records": {kind: len(numbers) for kind, numbers in kinds.items()},
        "load": load,
        "entropy": {place: load_entropy(shares) for place, shares in load.items()},
        "specialisation": {place: specialisation(shares) for place, shares in load.items()},
    }
    with new_directory(out) as work:
        (work / "load.json").write_text(json.dumps(found, indent=1))
        plots.plot_expert_load(load, work / "load.png")
        for name in pictures:
            target = work / f"patches-{Path(name).stem}.png"
            plot_picture(model, processor.image_processor, load_image(name), target)
    return found
