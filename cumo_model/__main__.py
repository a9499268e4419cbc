"""Command line: python -m cumo_model {demo,ablate,chat,data,train,experts,convert,upcycle}.

The commands call the library. Expected errors are printed in one line, without a traceback.
"""

import argparse
import os
import pickle
import signal
import sys
import threading
from pathlib import Path


def _demo(args: argparse.Namespace) -> int:
    from cumo_model.demo.resume import resumable

    out = args.out or Path("runs", "demo-quick" if args.quick else "demo")
    options = ["--quick"] * args.quick + (["--seed", args.seed] if args.seed else [])

    def run() -> int:
        from cumo_model.demo.run import run_demo

        return run_demo(out, args.quick, args.seed)

    return resumable(run, "demo", "--out", out, *options)


def _chat(args: argparse.Namespace) -> int:
    from cumo_model.serving.chat import chat

    chat(args.checkpoint, args.image, args.question, args.template, args.max_new_tokens)
    return 0


def _train(args: argparse.Namespace) -> int:
    from cumo_model.training.launch import launch, reported_once

    given = {"processes": args.processes, "max_restarts": args.max_restarts}
    given = {name: value for name, value in given.items() if value is not None}
    if given and (given != {"processes": 1} or "RANK" in os.environ):
        return launch(args.config, args.overrides, **given)
    with reported_once():
        return _train_here(args)


def _train_here(args: argparse.Namespace) -> int:
    import torch

    from cumo_model.training.recipe import load_recipe
    from cumo_model.training.run_folder import finished_step
    from cumo_model.training.trainer import run_recipe

    recipe = load_recipe(args.config, args.overrides, files=True)
    before = finished_step(recipe.output_dir)
    path = run_recipe(recipe)
    if int(os.environ.get("RANK", 0)) == 0:
        done = finished_step(recipe.output_dir)
        print(f"already finished at step {done}: {path}" if done == before else f"trained: {path}")
    if torch.distributed.is_initialized():
        # process group threads that still run at exit would abort the process
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0


def _experts(args: argparse.Namespace) -> int:
    from cumo_model.analysis.experts import report_experts

    found = report_experts(
        args.checkpoint,
        args.data,
        args.images or [],
        args.out,
        args.by,
        args.template,
        args.limit,
        args.batch_size,
        args.picture or [],
    )
    print(f"{'place':6} {'entropy of load (1 even)':>26} {'difference of kinds (0 none)':>30}")
    for place, entropy in found["entropy"].items():
        print(f"{place:6} {entropy:26.3f} {found['specialisation'][place]:30.3f}")
    print(f"wrote {args.out}")
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from cumo_model.demo.resume import resumable

    out = args.out or Path("runs", "ablation-quick" if args.quick else "ablation")
    options = ["--quick"] * args.quick + ["--seeds", args.seeds]
    options += ["--steps", args.steps] if args.steps is not None else []
    options += ["--rows", *args.rows] if args.rows else []

    def run() -> int:
        from cumo_model.demo.ablation import run_ablation

        return run_ablation(out, args.seeds, args.rows, args.quick, args.steps)

    return resumable(run, "ablate", "--out", out, *options)


def _check_data(args: argparse.Namespace) -> int:
    from cumo_model.data.report import check_files

    return 1 if check_files(args.files, args.images, args.decode, args.template) else 0


def _convert(args: argparse.Namespace) -> int:
    from cumo_model.checkpoints.convert import convert

    if not 0 < args.shard_gb < float("inf"):
        raise ValueError(f"--shard-gb must be positive, got {args.shard_gb}")
    convert(args.source, args.target, args.layout, max(1, int(args.shard_gb * 1000**3)))
    return 0


def _upcycle(args: argparse.Namespace) -> int:
    from cumo_model.checkpoints.upcycle_checkpoint import upcycle_checkpoint

    numbers = ("vision_experts", "projector_experts", "text_experts", "top_k", "vision_top_k",
               "projector_top_k", "text_top_k", "noise", "drop", "seed")  # fmt: skip
    options = {name: getattr(args, name) for name in numbers}
    upcycle_checkpoint(
        args.out, args.checkpoint, args.vision, args.text, args.projector, args.dtype, args.clip, **options
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cumo", description="CuMo: a mixture-of-experts vision-language model"
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train a small CuMo in all three stages and evaluate it")
    demo.add_argument(
        "--quick", action="store_true", help="run all steps in under two minutes, with little training"
    )
    demo.add_argument(
        "--out", type=Path, help="folder of the run; an existing run is resumed (default: runs/demo)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: 0)")
    demo.set_defaults(run=_demo)

    chat = commands.add_parser("chat", help="ask a checkpoint questions about a picture")
    chat.add_argument(
        "--checkpoint", type=Path, required=True, help="folder with config, safetensors and processor"
    )
    chat.add_argument(
        "--image", type=Path, help="file of the picture; without it the chat is about text only"
    )
    chat.add_argument(
        "--question", help="answer this question and exit; without it questions are read from standard input"
    )
    chat.add_argument(
        "--template",
        help="conversation template, such as mistral_instruct (default: that of the processor)",
    )
    chat.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: 64)")
    chat.set_defaults(run=_chat)

    train = commands.add_parser(
        "train", help="run a recipe, which is one stage of training; an interrupted run is resumed"
    )
    train.add_argument(
        "--config", required=True, help="a YAML file, or an included recipe such as mistral-7b/sft"
    )
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as stage.learning_rate=1e-5",
    )
    train.add_argument(
        "--processes", type=int, help="processes on this machine, usually one for each GPU (default: 1)"
    )
    train.add_argument(
        "--max-restarts",
        type=int,
        help="how often the processes are started again if one is killed or fails (default: 3)",
    )
    train.set_defaults(run=_train)

    experts = commands.add_parser(
        "experts", help="measure and plot which experts the tokens and patches of a checkpoint use"
    )
    experts.add_argument("--checkpoint", type=Path, required=True, help="folder of a CuMo with experts")
    experts.add_argument("--data", nargs="+", required=True, help="conversation files or file patterns")
    experts.add_argument(
        "--images", action="append", help="folder or .tar file of the pictures; may be repeated"
    )
    experts.add_argument(
        "--by", help="field of the records that names their sub-task; by default each file is one sub-task"
    )
    experts.add_argument("--template", help="conversation template (default: that of the checkpoint)")
    experts.add_argument("--limit", type=int, help="maximum number of records per sub-task")
    experts.add_argument("--batch-size", type=int, default=8, help="records per forward pass (default: 8)")
    experts.add_argument(
        "--picture", action="append", help="plot the patches of this picture by expert; may be repeated"
    )
    experts.add_argument("--out", type=Path, required=True, help="new folder for the results")
    experts.set_defaults(run=_experts)

    ablate = commands.add_parser(
        "ablate", help="run the ablations of the paper on the data of the demo and print a table"
    )
    ablate.add_argument(
        "--out", type=Path, help="folder of the runs; existing runs are resumed (default: runs/ablation)"
    )
    ablate.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    ablate.add_argument("--rows", nargs="+", help="run these rows only; the table contains all finished rows")
    ablate.add_argument("--steps", type=int, help="steps of stage 3 (default: 300)")
    ablate.add_argument(
        "--quick", action="store_true", help="run all steps in a short time, with little training"
    )
    ablate.set_defaults(run=_ablate)

    data = commands.add_parser("data", help="tools for training data").add_subparsers(
        dest="action", required=True
    )
    check = data.add_parser(
        "check", help="check conversation files completely and report each problem on one line"
    )
    check.add_argument("files", nargs="+", help=".json, .jsonl or .tar files, or file patterns")
    check.add_argument(
        "--images", action="append", help="folder or .tar file of the pictures; may be repeated"
    )
    check.add_argument("--decode", action="store_true", help="also decode every picture")
    check.add_argument(
        "--template", default="mistral_instruct_system", help="template that the records must fit"
    )
    check.set_defaults(run=_check_data)

    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint between this project's layout and that of SHI-Labs/CuMo, bit for bit",
    )
    convert.add_argument("source", type=Path, help="folder with config.json and safetensors")
    convert.add_argument("target", type=Path, help="new folder")
    convert.add_argument(
        "--layout",
        choices=("cumo", "original"),
        help="layout of the target (default: not that of the source)",
    )
    convert.add_argument(
        "--shard-gb",
        type=float,
        default=2.0,
        help="largest output file and memory needed, in GB (default: 2)",
    )
    convert.set_defaults(run=_convert)

    upcycle = commands.add_parser(
        "upcycle", help="make experts of the MLPs of a dense model and print the step-0 difference"
    )
    upcycle.add_argument(
        "--checkpoint", type=Path, help="folder of a CuMo in either layout; or give --vision and --text"
    )
    upcycle.add_argument("--vision", type=Path, help="folder of a CLIP")
    upcycle.add_argument(
        "--clip", type=Path, help="clip.bin with the weights of the CLIP, dense or with experts"
    )
    upcycle.add_argument("--text", type=Path, help="folder of a language model")
    upcycle.add_argument("--projector", type=Path, help="mm_projector.bin (default: a new connector)")
    upcycle.add_argument("--out", type=Path, required=True, help="new folder")
    for place, experts in (("vision", None), ("projector", None), ("text", 0)):
        usual = 0 if experts == 0 else "4 if it is dense"
        text = f"experts of the {place} part (default: {usual}); 0 does not change it"
        upcycle.add_argument(f"--{place}-experts", type=int, default=experts, help=text)
        upcycle.add_argument(f"--{place}-top-k", type=int, help="--top-k of this part")
    upcycle.add_argument("--top-k", type=int, default=2, help="experts per token (default: 2)")
    upcycle.add_argument(
        "--noise", type=float, default=0.0, help="noise in standard deviations of each weight (default: 0)"
    )
    upcycle.add_argument(
        "--drop", type=float, default=0.0, help="share of inner units to resample (default: 0)"
    )
    upcycle.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: that of the files)",
    )
    upcycle.add_argument("--seed", type=int, default=0, help="seed of gates, noise and drop (default: 0)")
    upcycle.set_defaults(run=_upcycle)
    return parser


def _stop(number, frame):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # no command needs the hub; offline, a wrong folder name is an error at once and not after a timeout
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = None
    if threading.current_thread() is threading.main_thread():
        # SIGTERM then removes unfinished files, as Ctrl-C does; training handles both signals itself
        before = signal.signal(signal.SIGTERM, _stop)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("cumo: stopped", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        print(f"cumo: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        from safetensors import SafetensorError

        from cumo_model.training.recover import Interrupted

        if not isinstance(error, Interrupted | SafetensorError | EOFError | pickle.UnpicklingError):
            raise
        what = "" if isinstance(error, Interrupted) else "a file of tensors is damaged: "
        print(f"cumo: {what}{error}", file=sys.stderr)
        return 1 if what else 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    raise SystemExit(main())
