"""One piece of the demo in a process of its own: python -m cumo_model.demo.task NAME RUN_DIR.

On two CPU cores two processes of one thread each do nearly twice the work of one process with two.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, MistralForCausalLM
from transformers.utils import logging

from cumo_model.analysis.experts import load_entropy
from cumo_model.checkpoints.upcycle import step0_difference, upcycle
from cumo_model.data import ConversationDataset
from cumo_model.demo.evaluate import Examiner
from cumo_model.demo.pretrain import pretrain_text, pretrain_vision
from cumo_model.demo.settings import TEMPLATE, Settings, load_settings
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.processing.processor import build_processor
from cumo_model.training.train import Interrupted, sample_indices, train

AGAIN = "delete it, and the same command makes it again"
STAGE_DATA = {
    "pretrain": "stage1_caption.json",
    "pft": "stage2_detail.json",
    "sft": "stage3_vqa.json",
    "sft_plain": "stage3_vqa.json",
}


class Run:
    """Paths, settings and pieces that the tasks of one demo share."""

    def __init__(self, folder: Path, position: int):
        self.folder, self.data = folder, folder / "data"
        self.settings: Settings = load_settings(folder / "settings.json")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(self.data / "tokenizer")
        self.processor = build_processor(
            self.tokenizer, self.settings.image_size, self.settings.patch_size, template=TEMPLATE
        )
        self.options = {"position": position}

    def stage(
        self, name: str, model: CumoForConditionalGeneration, label: str
    ) -> CumoForConditionalGeneration:
        ratio = 1.0
        if name == "sft_plain":
            ratio = read_json(self.folder / "compute.json", "flops_ratio")["flops_ratio"]
        stage = self.settings.stage(name, ratio)
        options = {"label": label, **self.options}
        folder = self.folder / name
        return train(model, stage, self.dataset(name), folder, self.processor, self.settings.seed, **options)

    def dataset(self, name: str) -> ConversationDataset:
        stage = self.settings.stage(name)
        return ConversationDataset(self.data / STAGE_DATA[name], self.data, self.processor, stage.template)

    def batch(self, name: str) -> dict[str, torch.Tensor]:
        """The first batch of a stage."""
        dataset, size = self.dataset(name), self.settings.stage(name).schedule.batch_size
        batch = dataset.batch(sample_indices(0, size, len(dataset), self.settings.seed))
        return {key: value.to(self.device) for key, value in batch.items()}

    def load(self, name: str) -> CumoForConditionalGeneration:
        return load_model(CumoForConditionalGeneration, self.folder / name).to(self.device)


def vision(run: Run) -> None:
    pretrain_vision(
        run.settings,
        run.data,
        run.folder / "vision",
        run.tokenizer,
        run.processor,
        run.device,
        label="stage 0: vision tower",
        **run.options,
    )


def text(run: Run) -> None:
    pretrain_text(
        run.settings,
        run.data,
        run.folder / "text",
        run.tokenizer,
        run.device,
        label="stage 0: language model",
        **run.options,
    )


def dense(run: Run) -> None:
    """Stages 1 and 2: the connector, then everything, without experts."""
    tower = load_model(CumoVisionModel, run.folder / "vision")
    language = load_model(MistralForCausalLM, run.folder / "text")
    torch.manual_seed(run.settings.seed)
    model = CumoForConditionalGeneration(run.settings.config(run.tokenizer, language.config))
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model = run.stage("pretrain", model.to(run.device), "stage 1: connector")
    model = run.stage("pft", model, "stage 2: everything")
    compute = measure_flops(run, model)
    write_json(run.folder / "compute.json", compute)
    before, after = (f"{compute['parameters'][name]:,}" for name in ("dense", "moe"))
    difference = f"{compute['step0_difference']:.1e}"
    print(
        f"upcycled: {before} -> {after} parameters, logits differ by {difference} at step 0", file=sys.stderr
    )


def upcycled(run: Run, model: CumoForConditionalGeneration) -> CumoForConditionalGeneration:
    experts, settings = run.settings.num_experts, run.settings
    return upcycle(model, experts, experts, experts, settings.top_k, settings.seed)


def measure_flops(run: Run, model: CumoForConditionalGeneration) -> dict:
    """FLOPs of one step of stage 3, dense and upcycled, and the difference of the two at step 0."""
    batch, found = run.batch("sft"), {}
    moe = upcycled(run, model)
    for name, candidate in (("dense", model), ("moe", moe)):
        candidate.train()
        with FlopCounterMode(display=False) as counter:
            candidate(**batch, use_cache=False, skip_logits=True).loss.backward()
        candidate.zero_grad(set_to_none=True)
        found[name] = counter.get_total_flops()
    return {
        "flops_per_step": found,
        "flops_ratio": found["moe"] / found["dense"],
        "step0_difference": step0_difference(model, moe, batch),
        "parameters": {"dense": model.num_parameters(), "moe": moe.num_parameters()},
    }


def moe(run: Run) -> None:
    """Stage 3 with experts everywhere: tower, connector, language model."""
    model = run.stage("sft", upcycled(run, run.load("pft")), "stage 3: MoE")
    examine(run, model, "sft", reload_difference=step0_difference(model, run.load("sft"), run.batch("sft")))


def twin(run: Run) -> None:
    """Stage 3 without experts, for as many FLOPs."""
    model = run.stage("sft_plain", run.load("pft"), "stage 3: dense twin")
    examine(run, model, "sft_plain")


def examine(run: Run, model: CumoForConditionalGeneration, name: str, **facts) -> None:
    """Score a model on both tests; the scores, and `facts`, go to scores-NAME.json."""
    path, result = run.folder / f"scores-{name}.json", dict(facts)
    majority = {kind: row.get("answer") for kind, row in read_json(run.data / "baselines.json").items()}
    for part in ("test_a", "test_b"):
        examiner = Examiner(
            model, run.processor, run.data / f"{part}.json", TEMPLATE, run.settings.eval_limit
        )
        result[part] = examiner.scores(majority)
        if part == "test_a" and name == "sft":
            result["expert_load"] = examiner.expert_load()
            result["load_entropy"] = {
                place: load_entropy(load) for place, load in result["expert_load"].items()
            }
    write_json(path, result)


def load_model(kind, folder: Path):
    """A `kind` from the folder of an earlier task; whatever is wrong with its files is one line."""
    try:
        return kind.from_pretrained(folder, use_safetensors=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [repr(error)]
        raise ValueError(f"{folder} is damaged ({reason[0]}): {AGAIN}") from error


def read_json(path: Path, *needed: str):
    """The object in `path`, which must have the keys `needed`."""
    try:
        content = json.loads(path.read_text())
        missing = [key for key in needed if key not in content]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from None
    if missing:
        raise ValueError(f"{path} is damaged (no {missing[0]!r}): {AGAIN}")
    return content


def write_json(path: Path, content) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


TASKS = {"vision": vision, "text": text, "dense": dense, "moe": moe, "twin": twin}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(TASKS)}, or ablate:ROW:SEED")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--position", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()  # the bars of loading and saving would break ours
    try:
        run = Run(args.folder, args.position)
        if args.name.startswith("ablate:"):
            from cumo_model.demo.ablation import run_row

            _, row, seed = args.name.split(":")
            run_row(run, row, int(seed))
        else:
            TASKS[args.name](run)
    except Interrupted:
        return 130
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        print(f"cumo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
