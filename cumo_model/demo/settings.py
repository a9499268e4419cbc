"""Settings of the demo that are not part of its recipes: sizes of its models, and changes for a quick run.

Trained parts, numbers of steps and learning rates of the stages are in cumo_model/training/recipes/demo.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import MistralConfig

from cumo_model.model.config import CumoVisionConfig

TEMPLATE = "mistral_instruct"  # template of stages 2 and 3 and of the evaluation
QUICK = {  # stage -> number of steps, batch size
    "vision": (20, 64),
    "text": (40, 32),
    "pretrain": (15, 32),
    "pft": (30, 16),
    "sft": (30, 16),
    "sft_dense": (30, 16),
}
QUICK_QUESTIONS = 32  # number of questions of each kind


@dataclass(frozen=True)
class Settings:
    """Settings of a demo: a CuMo with a few million parameters."""

    image_size: int = 48
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 5  # of the last layer only the router statistics are used, as in CuMo
    text_width: int = 128
    text_layers: int = 2
    seed: int = 0  # seed of new weights and of the order of samples
    quick: bool = False  # the same path in a fraction of the time, with too few steps for good results
    sft_steps: int | None = None  # number of steps of stage 3, instead of that of its recipe

    @property
    def eval_limit(self) -> int | None:
        """Number of questions of each kind; None for all."""
        return QUICK_QUESTIONS if self.quick else None

    def changes(self, stage: str) -> dict:
        """Keys and values that differ from the shipped recipe of a stage."""
        changes: dict = {"trainer.seed": self.seed, "model.seed": self.seed}
        if self.quick:
            steps, batch = QUICK[stage]
            changes |= {"trainer.max_steps": steps, "stage.batch_size": batch}
            changes["trainer.per_device_train_batch_size"] = batch
        if stage.startswith("sft") and self.sft_steps is not None:
            changes["trainer.max_steps"] = self.sft_steps
        return changes

    def vision_config(self) -> CumoVisionConfig:
        """Configuration of the vision tower."""
        return CumoVisionConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.vision_width,
            intermediate_size=4 * self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_width // 32,
            num_experts=1,
        )

    def text_config(self, tokenizer) -> MistralConfig:
        """Configuration of the language model for a tokenizer."""
        return MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.text_width,
            intermediate_size=3 * self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_width // 32,
            num_key_value_heads=self.text_width // 64,
            head_dim=32,
            max_position_embeddings=512,
            sliding_window=None,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


def load_settings(path: Path) -> Settings:
    """Read settings from a JSON file."""
    return Settings(**json.loads(path.read_text()))


def plain(settings: Settings) -> dict:
    """Settings as a dict of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))
