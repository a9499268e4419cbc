"""What the demo trains and for how long: one record, two sizes."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import MistralConfig

from cumo_model.model.config import CumoConfig, CumoVisionConfig
from cumo_model.training.train import PARTS, Schedule, Stage

TEMPLATE = "mistral_instruct"  # without the system text: 45 tokens that would say the same in every sample


@dataclass(frozen=True)
class Settings:
    """A CuMo of some million parameters and a schedule for two CPU cores."""

    image_size: int = 48
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 5  # the last one serves only its router, as in CuMo
    text_width: int = 128
    text_layers: int = 2
    num_experts: int = 4
    top_k: int = 2
    vision: Schedule = Schedule(180, 64, 1e-3, warmup_ratio=0.1)  # stand-in for CLIP's pre-training
    text: Schedule = Schedule(200, 64, 2e-3, warmup_ratio=0.1)  # stand-in for Mistral's
    pretrain: Schedule = Schedule(70, 64, 2e-3)
    pft: Schedule = Schedule(300, 32, 1.5e-3)
    sft: Schedule = Schedule(520, 32, 1.5e-3)  # the dense twin gets as many FLOPs
    seed: int = 0
    quick: bool = False
    eval_limit: int | None = None  # questions of each kind

    def vision_config(self) -> CumoVisionConfig:
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

    def config(self, tokenizer, text_config=None) -> CumoConfig:
        return CumoConfig(
            vision_config=self.vision_config(),
            text_config=text_config or self.text_config(tokenizer),
            projector_num_experts=1,
            scales=(1,),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )

    def stage(self, name: str, flops_ratio: float = 1.0) -> Stage:
        """The stages "pretrain", "pft", "sft"; "sft_plain" is the dense twin's.

        `flops_ratio`: FLOPs of a step with experts over one without; the twin makes that many more steps.
        """
        if name == "pretrain":
            return Stage(name, ("projector",), "plain", self.pretrain)
        if name == "sft_plain":
            schedule = dataclasses.replace(self.sft, steps=round(self.sft.steps * flops_ratio))
            return Stage(name, tuple(PARTS), TEMPLATE, schedule)
        coefs = (0.1, 0.01) if name == "sft" else (0.0, 0.0)
        return Stage(name, tuple(PARTS), TEMPLATE, getattr(self, name), *coefs)


def quick(settings: Settings) -> Settings:
    """The same path in a fraction of the time; what it learns is only a start."""
    return dataclasses.replace(
        settings,
        quick=True,
        vision=Schedule(20, 64, 1e-3, warmup_ratio=0.1),
        text=Schedule(40, 32, 2e-3, warmup_ratio=0.1),
        pretrain=Schedule(15, 32, 2e-3),
        pft=Schedule(30, 16, 1.5e-3),
        sft=Schedule(30, 16, 1.5e-3),
        eval_limit=32,
    )


def load_settings(path: Path) -> Settings:
    values = json.loads(path.read_text())
    schedules = {key: Schedule(**value) for key, value in values.items() if isinstance(value, dict)}
    return Settings(**values | schedules)
