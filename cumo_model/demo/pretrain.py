"""Stage 0: small stand-ins for the pre-trained towers that CuMo starts from, CLIP and Mistral.

The vision tower learns to tell which of a batch's texts (name and keywords) belongs to which picture; the
language model learns the facts about the training concepts, without pictures.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MistralForCausalLM

from cumo_model.checkpoints.folders import new_directory
from cumo_model.data import ConversationDataset
from cumo_model.demo.settings import Settings
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.cumo import language_loss
from cumo_model.training.train import Losses, fit, sample_indices, write_history


class Contrast(nn.Module):
    """CLIP's objective (Radford et al. 2021) with a bag of words for a text tower."""

    def __init__(self, tower: CumoVisionModel, vocab_size: int):
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.norm = nn.LayerNorm(width)
        self.words = nn.EmbeddingBag(vocab_size, width, padding_idx=0)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixel_values: Tensor, words: Tensor, names: Tensor) -> Tensor:
        """pixel_values (N, 3, s, s), words (N, W) token ids, names (N,) the concept's number -> loss."""
        seen = self.norm(self.tower(pixel_values).last_hidden_state.mean(1))
        seen, read = (nn.functional.normalize(t, dim=-1) for t in (seen, self.words(words)))
        logits = self.scale.exp().clamp(max=100) * seen @ read.T
        # another picture of the same concept is no negative
        same = (names[:, None] == names) & ~torch.eye(len(names), dtype=torch.bool, device=names.device)
        logits = logits.masked_fill(same, -math.inf)
        target = torch.arange(len(names), device=names.device)
        return (
            nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
        ) / 2


def _pad(rows: list[list[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)


def pretrain_vision(
    settings: Settings, data: Path, out: Path, tokenizer, processor, device, **options
) -> None:
    """Train the tower on pictures and texts; `out` becomes a CumoVisionModel checkpoint."""
    if out.exists():
        return
    pictures = ConversationDataset(data / "stage1_caption.json", data, processor, "plain")
    about = {record["image"]: record for record in json.loads((data / "contrastive.json").read_text())}
    records = [about[record["image"]] for record in pictures.records]
    texts = [f"{record['name']} {' '.join(record['keywords'])}" for record in records]
    words = tokenizer(texts, add_special_tokens=False)["input_ids"]
    number = {name: i for i, name in enumerate(dict.fromkeys(record["name"] for record in records))}
    names = torch.tensor([number[record["name"]] for record in records])
    torch.manual_seed(settings.seed)
    model = Contrast(CumoVisionModel(settings.vision_config()), len(tokenizer)).to(device)
    schedule = settings.vision

    def loss_at(step: int) -> Losses:
        indices = sample_indices(step, schedule.batch_size, len(records), settings.seed)
        pixels = pictures.normalise(torch.cat([pictures.pixels(i) for i in indices])).to(device)
        loss = model(pixels, _pad([words[i] for i in indices], 0).to(device), names[indices].to(device))
        return loss, {}, schedule.batch_size * (settings.image_size // settings.patch_size) ** 2

    identity = {"what": "vision", "model": model.tower.config.to_dict(), "seed": settings.seed}
    progress = out.with_name(f"{out.name}.progress.safetensors")
    history = fit(model, loss_at, schedule, progress, identity, **options)
    with new_directory(out) as work:
        model.tower.save_pretrained(work)
        write_history(work, history, identity)
    progress.unlink(missing_ok=True)


def pretrain_text(settings: Settings, data: Path, out: Path, tokenizer, device, **options) -> None:
    """Train the language model on lines of text; `out` becomes a MistralForCausalLM checkpoint."""
    if out.exists():
        return
    lines = (data / "text.txt").read_text().splitlines()
    eos = tokenizer.eos_token_id
    ids = [[*row, eos] for row in tokenizer(lines)["input_ids"]]
    torch.manual_seed(settings.seed)
    model = MistralForCausalLM(settings.text_config(tokenizer)).to(device)
    schedule = settings.text

    def loss_at(step: int) -> Losses:
        rows = [ids[i] for i in sample_indices(step, schedule.batch_size, len(ids), settings.seed)]
        batch = _pad(rows, tokenizer.pad_token_id).to(device)
        labels = _pad(rows, -100).to(device)
        logits = model(batch, attention_mask=(labels != -100).long(), use_cache=False).logits
        return language_loss(logits, labels), {}, sum(map(len, rows))

    identity = {"what": "text", "model": model.config.to_dict(), "seed": settings.seed}
    progress = out.with_name(f"{out.name}.progress.safetensors")
    history = fit(model, loss_at, schedule, progress, identity, **options)
    with new_directory(out) as work:
        model.save_pretrained(work)
        write_history(work, history, identity)
    progress.unlink(missing_ok=True)
