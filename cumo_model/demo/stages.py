"""Tasks of the demo: stage 0 of both models, stages 1 and 2, and stage 3 with and without experts."""

import functools
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from cumo_model.analysis.experts import load_entropy
from cumo_model.checkpoints.folders import write_json
from cumo_model.checkpoints.upcycle import step0_difference
from cumo_model.demo.evaluate import Examiner, examine
from cumo_model.demo.folder import Run
from cumo_model.demo.pretrain import build_text, build_vision
from cumo_model.demo.settings import TEMPLATE
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.training.stage import run_stage
from cumo_model.training.start import start_model


def vision(run: Run) -> None:
    """Stage 0 of the vision tower."""
    build = functools.partial(
        build_vision, settings=run.settings, tokenizer=run.tokenizer, processor=run.processor
    )
    stage = lambda recipe, callbacks: run_stage(recipe, build, callbacks)
    run.train(run.recipe("vision"), "stage 0: vision tower", stage)


def text(run: Run) -> None:
    """Stage 0 of the language model."""
    build = functools.partial(build_text, settings=run.settings, tokenizer=run.tokenizer)
    stage = lambda recipe, callbacks: run_stage(recipe, build, callbacks)
    run.train(run.recipe("text"), "stage 0: language model", stage)


def dense(run: Run) -> None:
    """Stages 1 and 2: train the connector, then all parts, without experts."""
    run.train(run.recipe("pretrain"), "stage 1: connector")
    run.train(run.recipe("pft"), "stage 2: all parts")
    compute = measure_flops(run)
    write_json(run.folder / "compute.json", compute)
    before, after = (f"{compute['parameters'][name]:,}" for name in ("dense", "moe"))
    difference = f"{compute['step0_difference']:.1e}"
    print(
        f"upcycled: {before} -> {after} parameters, logits differ by {difference} at step 0", file=sys.stderr
    )


def flops_of_step(model: CumoForConditionalGeneration, batch: dict[str, torch.Tensor]) -> int:
    """FLOPs of one training step on a batch, forward and backward, measured with torch's FLOP counter."""
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False, skip_logits=True).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def measure_flops(run: Run) -> dict:
    """Measure FLOPs of one step of stage 3, dense and with experts, and the difference of both at step 0."""
    batch, models = run.batch("sft"), {}
    for name, stage in (("dense", "sft_dense"), ("moe", "sft")):
        recipe = run.recipe(stage)
        models[name] = start_model(recipe.model, recipe.data)[0].to(run.device)
    found = {name: flops_of_step(model, batch) for name, model in models.items()}
    return {
        "flops_per_step": found,
        "flops_ratio": found["moe"] / found["dense"],
        "step0_difference": step0_difference(models["dense"], models["moe"], batch),
        "parameters": {name: model.num_parameters() for name, model in models.items()},
    }


def sft(run: Run) -> None:
    """Stage 3 with experts in tower and connector."""
    _stage3(run, "sft", "stage 3: MoE")


def sft_dense(run: Run) -> None:
    """Stage 3 without experts, for the same number of steps."""
    _stage3(run, "sft_dense", "stage 3: dense")


def _stage3(run: Run, name: str, label: str) -> None:
    trained, loaded, difference = run.train(run.recipe(name), label), run.load(name), None
    if trained is not None:  # None if an earlier call was killed after training
        difference = step0_difference(trained, loaded, run.batch(name))
    _examine(run, loaded, name, {"reload_difference": difference})


def _examine(run: Run, model: CumoForConditionalGeneration, name: str, facts: dict) -> None:
    """Evaluate a model on both test sets; scores and `facts` are saved to scores-NAME.json."""
    result, limit = dict(facts), run.settings.eval_limit
    for part in ("test_a", "test_b"):
        result[part] = examine(run.folder, name, model, run.processor, part, run.majority(), limit)
    if name == "sft":
        examiner = Examiner(model, run.processor, run.data / "test_a.json", TEMPLATE, limit)
        result["expert_load"] = examiner.expert_load()
        result["load_entropy"] = {place: load_entropy(load) for place, load in result["expert_load"].items()}
    write_json(run.folder / f"scores-{name}.json", result)


TASKS = {"vision": vision, "text": text, "dense": dense, "sft": sft, "sft_dense": sft_dense}
