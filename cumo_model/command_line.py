"""Parser of the command line. It imports the standard library only, so `--help` is there at once."""

import argparse
import json
import sys
from pathlib import Path


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line; overrides of a recipe may stand anywhere among its options.

    What stands behind `--` in a `serve` command is for vLLM.
    """
    program = parser()
    words = sys.argv[1:] if words is None else list(words)
    behind = words[:1] == ["serve"] and "--" in words
    at = words.index("--") if behind else len(words)
    args, rest = program.parse_known_args(words[:at])
    is_override = [getattr(args, "overrides", None) is not None and "=" in word for word in rest]
    if not all(is_override) or any(word.startswith("-") for word in rest):
        program.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if args.command == "serve":
        args.extra = words[at + 1 :]
    return args


def _options(text: str) -> dict:
    """A JSON object on the command line."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be an object in JSON, got {text!r}")
    return found


def parser() -> argparse.ArgumentParser:
    program = argparse.ArgumentParser(
        prog="cumo", description="CuMo: a mixture-of-experts vision-language model"
    )
    commands = program.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train a small CuMo in all three stages and evaluate it")
    demo.add_argument(
        "--quick", action="store_true", help="run all steps in under two minutes, with little training"
    )
    demo.add_argument(
        "--out", type=Path, help="folder of the run; an existing run is resumed (default: runs/demo)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: 0)")

    chat = commands.add_parser("chat", help="ask a checkpoint questions about pictures")
    _add_engine(chat)
    chat.add_argument(
        "--image",
        action="append",
        help="file or URL of a picture; may be repeated; without it the first question is about text only",
    )
    chat.add_argument(
        "--question", help="answer this question and exit; without it questions are read from standard input"
    )
    _add_sampling(chat)
    chat.add_argument("--web", action="store_true", help="open a page for the browser instead")
    chat.add_argument("--host", default="127.0.0.1", help="address of the page (default: this machine only)")
    chat.add_argument("--port", type=int, default=7860, help="port of the page (default: 7860)")
    chat.add_argument(
        "--share", action="store_true", help="also give the page a public address, through Gradio's servers"
    )

    _add_answer(commands)
    _add_eval(commands)

    serve = commands.add_parser(
        "serve", help="serve a checkpoint through vLLM, with the API of OpenAI; needs vLLM"
    )
    serve.add_argument("checkpoint", type=Path, help="folder with config, safetensors and processor")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    serve.add_argument("--name", help="name of the model in requests (default: that of the folder)")
    serve.add_argument(
        "--max-model-len",
        type=int,
        help="most tokens of a prompt and its answer (default: the positions of the model)",
    )
    serve.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        help="number of GPUs over which the language model is split (default: 1)",
    )
    serve.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: that of the files)",
    )
    serve.add_argument(
        "--images-per-prompt", type=int, default=8, help="most pictures in a prompt (default: 8)"
    )
    serve.epilog = "Arguments behind -- are for vllm serve, such as: serve DIR -- --max-num-seqs 16"

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
        "--picture",
        action="append",
        help="plot the patches of this picture, a file or URL, by expert; may be repeated",
    )
    experts.add_argument("--out", type=Path, required=True, help="new folder for the results")

    ablate = commands.add_parser(
        "ablate", help="run the ablations of the paper, and other routers, on the data of the demo"
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
    convert.add_argument(
        "--remote-code",
        action="store_true",
        help="in this project's layout, also for programs that open it with trust_remote_code=True only",
    )

    quantize = commands.add_parser(
        "quantize", help="write a copy of a checkpoint whose experts are in four bits, and print the errors"
    )
    quantize.add_argument("source", type=Path, help="folder with config.json and safetensors")
    quantize.add_argument(
        "--bits",
        choices=("nf4", "fp4", "mxfp4", "int4"),
        help="format of the weights (default: nf4, or that of experts that are published in four bits)",
    )
    quantize.add_argument("--out", type=Path, required=True, help="new folder")
    quantize.add_argument(
        "--group",
        type=int,
        help="weights that share a scale: 32, 64, 128 or 256 (default: 64, mxfp4 32, int4 128)",
    )
    quantize.add_argument(
        "--asymmetric", action="store_true", help="give each group a zero point, in int4 only"
    )

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
    upcycle.add_argument(
        "--tokenizer", type=Path, help="folder of the tokenizer, if that of --text or --checkpoint has none"
    )
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
    upcycle.add_argument(
        "--router",
        type=_options,
        metavar="JSON",
        help='options of the routers, such as {"score": "sigmoid", "selection_bias": true}',
    )
    upcycle.add_argument("--seed", type=int, default=0, help="seed of gates, noise and drop (default: 0)")
    return program


def _add_answer(commands) -> None:
    answer = commands.add_parser(
        "answer", help="answer a file of questions about pictures; an interrupted run is resumed"
    )
    _add_engine(answer)
    answer.add_argument(
        "--questions",
        type=Path,
        required=True,
        help="JSON lines with question_id, text, and image, the name of a picture or a list of names",
    )
    answer.add_argument(
        "--images", action="append", help="folder or .tar file of the pictures; may be repeated"
    )
    answer.add_argument("--out", type=Path, required=True, help="file of the answers, JSON lines")
    _add_sampling(answer)
    answer.add_argument("--batch-size", type=int, default=8, help="questions per batch (default: 8)")
    answer.add_argument("--limit", type=int, help="answer only so many questions, the first ones")
    answer.add_argument(
        "--processes", type=int, help="processes on this machine, one for each GPU (default: 1)"
    )
    answer.add_argument(
        "--at-once", type=int, default=16, help="requests to the endpoint at the same time (default: 16)"
    )


def _add_eval(commands) -> None:
    evaluation = commands.add_parser(
        "eval", help="run benchmarks, or compare runs of them; an interrupted run is resumed"
    )
    _add_engine(evaluation)
    evaluation.add_argument(
        "--task", help="names of benchmarks with commas between them, such as gqa,pope; or all"
    )
    evaluation.add_argument("--data", type=Path, help="folder with a folder for each benchmark")
    evaluation.add_argument("--out", type=Path, help="folder of the results (default: runs/eval)")
    evaluation.add_argument("--limit", type=int, help="ask only so many questions of each, spread evenly")
    evaluation.add_argument("--batch-size", type=int, default=8, help="questions per batch (default: 8)")
    evaluation.add_argument(
        "--judge",
        metavar="MODEL",
        help="the model that judges, where a benchmark needs one, such as gpt-4-0613; its key is in the "
        "environment variable CUMO_JUDGE_KEY",
    )
    evaluation.add_argument(
        "--judge-url", help="OpenAI-compatible interface of the judge (default: that of OpenAI)"
    )
    evaluation.add_argument(
        "--answers", type=Path, help="score this file of answers, in LLaVA's format, and ask no model"
    )
    evaluation.add_argument(
        "--processes", type=int, help="processes on this machine, one for each GPU (default: 1)"
    )
    evaluation.add_argument(
        "--at-once",
        type=int,
        default=16,
        help="requests at the same time to the endpoint and to the judge (default: 16)",
    )
    evaluation.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="compare these folders of results, with intervals for each difference to the first one",
    )


def _add_engine(command: argparse.ArgumentParser) -> None:
    """Options of what answers: a checkpoint or an endpoint."""
    command.add_argument("folder", nargs="?", type=Path, help="folder with config, safetensors and processor")
    command.add_argument("--checkpoint", type=Path, help="the same, as an option")
    command.add_argument(
        "--endpoint",
        metavar="URL",
        help="a running server instead of a folder, such as http://127.0.0.1:8000/v1 of `cumo serve`",
    )
    command.add_argument(
        "--template",
        help="conversation template, such as mistral_instruct (default: that of the processor)",
    )
    command.add_argument("--device", help="such as cuda:1 or cpu (default: the GPU if there is one)")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: that of the files)",
    )
    bits = command.add_mutually_exclusive_group()
    for option, number in (("--load-4bit", 4), ("--load-8bit", 8)):
        text = f"quantise the weights to {number} bits with bitsandbytes"
        bits.add_argument(option, dest="bits", action="store_const", const=number, help=text)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    """Options of generation."""
    command.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    command.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 for the likeliest words, above to vary them (default: 0)",
    )
    command.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="with a temperature: sample from the likeliest words with this probability (default: 1)",
    )
    command.add_argument("--seed", type=int, help="seed of the samples (default: another answer each time)")
    command.add_argument("--system", help="text in place of the template's system text")
