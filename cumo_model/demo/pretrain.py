"""Stage 0: small replacements for the pre-trained models that CuMo starts from, CLIP and Mistral.

The vision tower is trained to match pictures and texts (name and keywords) of a batch. The language model is
trained on facts about the training concepts, without pictures. Both use the trainer of the other stages
(`cumo_model.training.stage`) with their own models, data and losses.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import MistralForCausalLM, set_seed

from cumo_model.data import ConversationDataset
from cumo_model.data.batches import pad
from cumo_model.demo.settings import Settings
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.processing.conversation import IGNORE_INDEX
from cumo_model.training.claims import claim
from cumo_model.training.monitor import Monitor
from cumo_model.training.recipe import Recipe
from cumo_model.training.run_folder import DATA_FILE
from cumo_model.training.stage import StageTrainer
from cumo_model.training.trainer import training_arguments


class Contrast(nn.Module):
    """CLIP's objective (Radford et al. 2021) with a bag of words as text tower."""

    def __init__(self, tower: CumoVisionModel, vocab_size: int):
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.norm = nn.LayerNorm(width)
        self.words = nn.EmbeddingBag(vocab_size, width, padding_idx=0)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixel_values: Tensor, words: Tensor, names: Tensor) -> dict[str, Tensor]:
        """Compute the contrastive loss of a batch.

        Args:
            pixel_values: (N, 3, s, s) float.
            words: (N, W) int64 token ids, padded with 0.
            names: (N,) int64, the number of the concept.

        Returns:
            {"loss": scalar}.
        """
        seen = self.norm(self.tower(pixel_values).last_hidden_state.mean(1))
        seen, read = (nn.functional.normalize(t, dim=-1) for t in (seen, self.words(words)))
        logits = self.scale.exp().clamp(max=100) * seen @ read.T
        # another picture of the same concept is not a negative example
        same = (names[:, None] == names) & ~torch.eye(len(names), dtype=torch.bool, device=names.device)
        logits = logits.masked_fill(same, -math.inf)
        target = torch.arange(len(names), device=names.device)
        both = (nn.functional.cross_entropy(rows, target) for rows in (logits, logits.T))
        return {"loss": sum(both) / 2}


class Pairs(Dataset):
    """Pictures with texts: (pixels (1, 3, s, s) uint8, token ids, number of the concept)."""

    def __init__(self, pictures: ConversationDataset, about: Path, tokenizer):
        known = {record["image"]: record for record in json.loads(about.read_text())}
        records = [known[record["image"]] for record in pictures.records]
        texts = [f"{record['name']} {' '.join(record['keywords'])}" for record in records]
        self.pictures = pictures
        self.words = tokenizer(texts, add_special_tokens=False)["input_ids"]
        number = {name: i for i, name in enumerate(dict.fromkeys(record["name"] for record in records))}
        self.names = [number[record["name"]] for record in records]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, list[int], int]:
        return self.pictures.pixels(index), self.words[index], self.names[index]

    def collate(self, items: Sequence[tuple[Tensor, list[int], int]]) -> dict[str, Tensor]:
        pixels, words, names = zip(*items, strict=True)
        rows = [torch.tensor(row) for row in words]
        return {
            "pixel_values": self.pictures.normalise(torch.cat(pixels)),
            "words": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0),
            "names": torch.tensor(names),
        }


class Lines(Dataset):
    """Lines of text as (token ids, labels), both int64. The first token is not predicted."""

    def __init__(self, path: Path, tokenizer):
        self.pad_id = tokenizer.pad_token_id
        rows = tokenizer(path.read_text().splitlines())["input_ids"]
        self.ids = [torch.tensor([*row, tokenizer.eos_token_id]) for row in rows]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ids = self.ids[index]
        labels = ids.clone()
        labels[0] = IGNORE_INDEX
        return ids, labels

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return pad(items, self.pad_id)


class PatchMonitor(Monitor):
    """Counts the patches of pictures as tokens."""

    def __init__(self, model: nn.Module, patches: int):
        super().__init__(model, ())
        self.patches = patches

    def _count(self, batch: dict) -> None:
        images = len(batch["pixel_values"])
        self.images, self.tokens = self.images + images, self.tokens + images * self.patches


class VisionTrainer(StageTrainer):
    def write_result(self, work, folder, recipe):
        self.model.tower.save_pretrained(folder)


class TextTrainer(StageTrainer):
    forward_options = {"use_cache": False}


def _claim_data(recipe: Recipe, number: int) -> None:
    content = hashlib.sha256(Path(recipe.data.files[0]).read_bytes()).hexdigest()
    claim(Path(recipe.output_dir) / DATA_FILE, {"content of data": content, "number of records": number})


def build_vision(
    recipe: Recipe, callbacks: Sequence, settings: Settings, tokenizer, processor
) -> StageTrainer:
    """The trainer of the tower, with the data of the recipe's first file and contrastive.json next to it."""
    file, (images,) = Path(recipe.data.files[0]), recipe.data.images
    pictures = ConversationDataset(file, images, processor, recipe.data.template)
    data = Pairs(pictures, file.with_name("contrastive.json"), tokenizer)
    _claim_data(recipe, len(data))
    args = training_arguments(recipe)
    set_seed(args.seed)
    model = Contrast(CumoVisionModel(settings.vision_config()), len(tokenizer))
    monitor = PatchMonitor(model, (settings.image_size // settings.patch_size) ** 2)
    return _trainer(VisionTrainer, model, args, data, recipe, callbacks, monitor=monitor)


def build_text(recipe: Recipe, callbacks: Sequence, settings: Settings, tokenizer) -> StageTrainer:
    """The trainer of the language model, with the lines of the recipe's first file."""
    data = Lines(Path(recipe.data.files[0]), tokenizer)
    _claim_data(recipe, len(data))
    args = training_arguments(recipe)
    set_seed(args.seed)
    model = MistralForCausalLM(settings.text_config(tokenizer))
    return _trainer(TextTrainer, model, args, data, recipe, callbacks)


def _trainer(kind, model, args, data, recipe: Recipe, callbacks: Sequence, **options) -> StageTrainer:
    lengths, has_image = np.ones(len(data), np.int64), np.zeros(len(data), bool)
    return kind(
        model,
        args,
        data,
        data.collate,
        lengths,
        has_image,
        grouping=recipe.data.grouping,
        callbacks=callbacks,
        **options,
    )
