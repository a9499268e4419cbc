"""A stage of a linear model, for tests of all stages; as a program: toy_stage.py FOLDER PAUSE."""

import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from cumo_model.training.monitor import Monitor
from cumo_model.training.recipe import Recipe, StageSection
from cumo_model.training.stage import StageTrainer, run_stage
from cumo_model.training.trainer import training_arguments


class Points(Dataset):
    """20 points; with batches of 8, an epoch has three steps."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


class Toy(nn.Module):
    """Predicts three of the four coordinates. With dropout the result depends on the random state."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 3), nn.Dropout(0.2)

    def forward(self, points: Tensor) -> dict[str, Tensor]:
        """points (N, 4) fp32 -> {"loss": scalar}."""
        return {"loss": (self.linear(self.dropout(points)) - points[:, :3]).square().mean()}


class PointMonitor(Monitor):
    def _count(self, batch: dict) -> None:
        self.tokens += len(batch["points"])


def toy_recipe(out: Path, **trainer) -> Recipe:
    options = {
        "per_device_train_batch_size": 8,
        "max_steps": 7,
        "save_steps": 100,
        "use_cpu": True,
        "seed": 3,
    }
    stage = StageSection(batch_size=8, learning_rate=0.05)
    return Recipe(str(out), stage=stage, trainer={**options, "disable_tqdm": True, **trainer})


def build_toy(recipe: Recipe, callbacks) -> StageTrainer:
    args = training_arguments(recipe)
    set_seed(args.seed)
    model, collate = Toy(), lambda items: {"points": torch.stack(items)}
    sizes = [1] * 20
    return StageTrainer(
        model, args, Points(), collate, sizes, sizes, monitor=PointMonitor(model, ()), callbacks=callbacks
    )


class Pause(TrainerCallback):
    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


if __name__ == "__main__":
    micro = 8 // int(os.environ.get("WORLD_SIZE", 1))
    recipe = toy_recipe(Path(sys.argv[1]), max_steps=40, save_steps=3, per_device_train_batch_size=micro)
    run_stage(recipe, build_toy, [Pause(float(sys.argv[2]))])
