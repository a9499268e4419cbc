"""The folder of a demo: its settings, data and recipes, and the results that its tasks pass on."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

from cumo_model.checkpoints.folders import first_line
from cumo_model.data import StepSampler, StreamedConversations, collate
from cumo_model.demo.settings import TEMPLATE, Settings, load_settings
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.processing.processor import build_processor
from cumo_model.training.monitor import ShortProgress
from cumo_model.training.recipe import SHIPPED, Recipe, load_recipe
from cumo_model.training.run_folder import RESULT, checkpoints
from cumo_model.training.trainer import run_recipe

AGAIN = "delete it, then the same command makes it again"
SHIPPED_FOLDER = "runs/demo"  # folder of the demo in the shipped recipes
RECIPES = {
    "vision": "demo/_vision",
    "text": "demo/_text",
    "pretrain": "demo/pretrain",
    "pft": "demo/pft",
    "sft": "demo/sft",
    "sft_dense": "demo/sft_dense",
}


class KeepModel(TrainerCallback):
    """Keeps a reference to the trained model."""

    model = None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.model = model


def stage_recipe(folder: Path, settings: Settings, stage: str, **changes: Any) -> Recipe:
    """The shipped recipe of a stage, with the folder and the settings of a demo.

    Args:
        folder: folder of the demo.
        settings: settings of the demo.
        stage: a key of RECIPES.
        **changes: values of further keys of the recipe, named `section__field`.
    """

    def moved(place: str | list[str]):
        if isinstance(place, list):
            return [moved(path) for path in place]
        return str(folder / Path(place).relative_to(SHIPPED_FOLDER))

    config = SHIPPED / f"{RECIPES[stage]}.yaml"  # not by name: a file of the working directory may have it
    shipped = load_recipe(config)
    places = {"output_dir": shipped.output_dir, "data.files": list(shipped.data.files)}
    places["data.images"] = list(shipped.data.images)
    for name in ("start", "vision", "language", "tokenizer"):
        if (path := getattr(shipped.model, name)) is not None:
            places[f"model.{name}"] = path
    values = settings.changes(stage) | {key: moved(place) for key, place in places.items()}
    if torch.cuda.is_available():
        values["trainer.bf16"] = True
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    # JSON is valid YAML, for all characters of a path
    return load_recipe(config, [f"{key}={json.dumps(value)}" for key, value in values.items()])


class Run:
    """Paths, settings and objects that are common to all tasks of a demo.

    Args:
        folder: folder of the demo.
        position: line of the terminal for the progress bar of this task.
    """

    def __init__(self, folder: Path, position: int = 0):
        self.folder, self.data, self.position = folder, folder / "data", position
        self.settings: Settings = load_settings(folder / "settings.json")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(self.data / "tokenizer")
        self.processor = build_processor(
            self.tokenizer, self.settings.image_size, self.settings.patch_size, template=TEMPLATE
        )

    def recipe(self, stage: str, **changes) -> Recipe:
        """The recipe of a stage of this demo, as `stage_recipe`."""
        return stage_recipe(self.folder, self.settings, stage, **changes)

    def train(
        self, recipe: Recipe, label: str, run: Callable[[Recipe, Sequence], Path] = run_recipe
    ) -> CumoForConditionalGeneration | None:
        """Run a recipe, unless it is finished.

        Args:
            recipe: a result of `recipe`.
            label: text before the progress bar.
            run: function of (recipe, callbacks) that returns the folder of the result.

        Returns:
            The model, or None if the recipe was already finished.
        """
        kept = KeepModel()
        run(recipe, [ShortProgress(label, self.position), kept])
        for path in checkpoints(recipe.output_dir):  # not needed any more; an ablation has many
            shutil.rmtree(path, ignore_errors=True)
        return kept.model

    def batch(self, stage: str) -> dict[str, torch.Tensor]:
        """The first batch of a stage."""
        recipe, index = self.recipe(stage), self.folder / "index"  # the folder that training uses
        data = StreamedConversations(
            list(recipe.data.files),
            list(recipe.data.images),
            self.processor,
            recipe.data.template,
            cache_dir=index,
        )
        sampler = StepSampler(
            data.lengths,
            data.has_image,
            recipe.stage.batch_size,
            seed=self.settings.seed,
            grouping=recipe.data.grouping,
        )
        batch = collate([data[i] for i in next(iter(sampler))], data.pad_id)
        return {key: value.to(self.device) for key, value in batch.items()}

    def load(self, stage: str) -> CumoForConditionalGeneration:
        """The trained model of a stage."""
        return load_model(CumoForConditionalGeneration, self.result(stage)).to(self.device)

    def result(self, stage: str) -> Path:
        """Folder of the trained model of a stage."""
        return self.folder / stage / RESULT

    def majority(self) -> dict[str, str | None]:
        """The most frequent training answer for each kind of question."""
        return {k: row.get("answer") for k, row in read_json(self.data / "baselines.json").items()}


def load_model(kind, folder: Path):
    """Load a model of class `kind` from the folder of an earlier task. Errors are reported in one line."""
    try:
        return kind.from_pretrained(folder, use_safetensors=True)
    except Exception as error:
        raise ValueError(f"{folder} is damaged ({first_line(error)}): {AGAIN}") from error


def read_json(path: Path, *needed: str):
    """Read the JSON object in `path`, which must have the keys `needed`."""
    try:
        content = json.loads(path.read_text())
        missing = [key for key in needed if key not in content]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from None
    if missing:
        raise ValueError(f"{path} is damaged (no {missing[0]!r}): {AGAIN}")
    return content
