"""Command line: python -m cumo_model COMMAND; the commands are those of COMMANDS.

The commands call the library. Arguments are checked before it is imported, which takes seconds. Expected
errors are printed in one line, without a traceback.
"""

import argparse
import logging
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cumo_model import signals
from cumo_model.checks import check
from cumo_model.command_line import parsed
from cumo_model.model.full_disk import is_no_room

# Each function imports what its command needs and returns the call, because a signal ends an import at once,
# but a call only after it has cleaned up.


def _demo(args: argparse.Namespace) -> Callable[[], int]:
    from cumo_model.demo.resume import resumable
    from cumo_model.demo.run import run_demo

    out = args.out or Path("runs", "demo-quick" if args.quick else "demo")
    options = ["--quick"] * args.quick + (["--seed", args.seed] if args.seed else [])
    return lambda: resumable(lambda: run_demo(out, args.quick, args.seed), "demo", "--out", out, *options)


def _chat(args: argparse.Namespace) -> Callable[[], int | None]:
    engine = _engine(args)
    if args.web:
        from cumo_model.serving.web.server import serve_page

        page = {"host": args.host, "port": args.port, "share": args.share}
        return lambda: serve_page(**engine, sampling=_sampling(args), system=args.system, **page)
    from cumo_model.serving.chat import chat

    asked = {"images": args.image or (), "question": args.question, "system": args.system}
    return lambda: chat(**engine, **asked, sampling=_sampling(args))


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `open_engine`."""
    names = ("checkpoint", "endpoint", "template", "device", "dtype", "bits")
    return {name: getattr(args, name) for name in names}


def _sampling(args: argparse.Namespace):
    from cumo_model.serving.sampling import Sampling

    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)


def _in_processes(args: argparse.Namespace) -> Callable[[], int] | None:
    """The same command in several processes, if it is asked for."""
    from cumo_model.training.launch import supervise

    if args.processes is None or args.processes == 1:
        return None
    if "RANK" in os.environ:
        raise ValueError(f"--processes must be left out under torchrun, got {args.processes}")
    words = _words({**vars(args), "processes": None})
    return lambda: supervise([sys.executable, "-m", "cumo_model", *words], args.processes, 0)


def _eval(args: argparse.Namespace) -> Callable[[], int]:
    from cumo_model.training.launch import reported_once

    if args.compare is not None:
        from cumo_model.evaluation.command import run_compare

        return lambda: run_compare(args.compare, args.out)
    args.out = args.out or Path("runs", "eval")
    if found := _in_processes(args):
        return found
    from cumo_model.evaluation.command import run_eval

    names = ("task", "data", "out", "limit", "batch_size", "judge", "judge_url", "answers", "at_once")
    given = _engine(args) | {name: getattr(args, name) for name in names}
    return reported_once()(lambda: run_eval(**given))


def _answer(args: argparse.Namespace) -> Callable[[], int]:
    from cumo_model.training.launch import reported_once

    if found := _in_processes(args):
        return found
    from cumo_model.serving.answer import answer

    engine = _engine(args) | {"at_once": args.at_once}
    asked = {"questions": args.questions, "images": args.images, "out": args.out, "limit": args.limit}
    asked |= {"batch_size": args.batch_size, "system": args.system}
    return reported_once()(lambda: answer(**engine, **asked, sampling=_sampling(args)))


def _words(args: dict) -> list[str]:
    """The words of a command, from its checked arguments."""
    words = [args["command"], *([f"--load-{args['bits']}bit"] if args["bits"] else [])]
    for name, value in args.items():
        if name not in ("command", "folder", "bits") and value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}={one}" for one in values]
    return words


def _serve(args: argparse.Namespace) -> Callable[[], int]:
    from cumo_model.serving.serve import serve

    names = ("host", "port", "name", "max_model_len", "tensor_parallel", "dtype", "images_per_prompt",
             "extra")  # fmt: skip
    return lambda: serve(args.checkpoint, **{name: getattr(args, name) for name in names})


def _train(args: argparse.Namespace) -> Callable[[], int]:
    from cumo_model.training.launch import launch, reported_once
    from cumo_model.training.recipe import load_recipe

    given = {"processes": args.processes, "max_restarts": args.max_restarts}
    given = {name: value for name, value in given.items() if value is not None}
    if given and (given != {"processes": 1} or "RANK" in os.environ):
        return lambda: launch(args.config, args.overrides, **given)
    with reported_once():
        recipe = load_recipe(args.config, args.overrides, files=True)

    import torch

    from cumo_model.training.run_folder import finished_step, is_first_process
    from cumo_model.training.trainer import run_recipe

    def train() -> int:
        before = finished_step(recipe.output_dir)
        path = run_recipe(recipe)
        if is_first_process():
            done = finished_step(recipe.output_dir)
            print(f"already finished at step {done}: {path}" if done == before else f"trained: {path}")
        if torch.distributed.is_initialized():
            # process group threads that still run at exit would abort the process
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return 0

    return reported_once()(train)


def _experts(args: argparse.Namespace) -> Callable[[], int]:
    from cumo_model.analysis import plots  # noqa: F401  it imports matplotlib
    from cumo_model.analysis.experts import report_experts

    def experts() -> int:
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

    return experts


def _ablate(args: argparse.Namespace) -> Callable[[], int]:
    from cumo_model.demo.ablation import run_ablation
    from cumo_model.demo.resume import resumable

    out = args.out or Path("runs", "ablation-quick" if args.quick else "ablation")
    options = ["--quick"] * args.quick + ["--seeds", args.seeds]
    options += ["--steps", args.steps] if args.steps is not None else []
    options += ["--rows", *args.rows] if args.rows else []
    run = lambda: run_ablation(out, args.seeds, args.rows, args.quick, args.steps)
    return lambda: resumable(run, "ablate", "--out", out, *options)


def _data(args: argparse.Namespace) -> Callable[[], int]:
    from cumo_model.data.report import check_files

    return lambda: min(1, check_files(args.files, args.images, args.decode, args.template))


def _convert(args: argparse.Namespace) -> Callable[[], int | None]:
    from cumo_model.checkpoints.convert import convert_checkpoint

    shard_bytes = max(1, int(args.shard_gb * 1000**3))
    return lambda: convert_checkpoint(args.source, args.target, args.layout, shard_bytes, args.remote_code)


def _quantize(args: argparse.Namespace) -> Callable[[], int | None]:
    from cumo_model.checkpoints.quantize_checkpoint import run_quantize

    return lambda: run_quantize(args.source, args.out, args.bits, args.group, not args.asymmetric)


def _upcycle(args: argparse.Namespace) -> Callable[[], int | None]:
    from cumo_model.checkpoints.upcycle_checkpoint import upcycle_checkpoint

    numbers = ("vision_experts", "projector_experts", "text_experts", "top_k", "vision_top_k",
               "projector_top_k", "text_top_k", "noise", "drop", "router", "seed")  # fmt: skip
    options = {name: getattr(args, name) for name in numbers}

    def upcycle() -> None:
        upcycle_checkpoint(
            args.out,
            args.checkpoint,
            args.vision,
            args.text,
            args.projector,
            args.dtype,
            args.clip,
            args.tokenizer,
            **options,
        )

    return upcycle


COMMANDS = {
    "demo": _demo,
    "ablate": _ablate,
    "chat": _chat,
    "answer": _answer,
    "eval": _eval,
    "serve": _serve,
    "data": _data,
    "train": _train,
    "experts": _experts,
    "convert": _convert,
    "quantize": _quantize,
    "upcycle": _upcycle,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words; None: those of this process, which then ends with the command.

    Returns:
        The exit code: 0, 1 after an expected error, 130 if it was stopped.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if argv is None and is_main:
        signals.end_at_once()
    try:
        code = _run(parsed(argv), signals.raising if is_main else nullcontext)
    except BaseException as error:  # also of what a module made of a signal while it was imported
        code = _told(error)
        if code is None:
            raise
    if argv is None and is_main:
        signals.end_with(code)
    return code


def _run(args: argparse.Namespace, stoppable: Callable) -> int:
    if (code := check(args)) is not None:
        return code
    # no command needs the hub; offline, a wrong folder name is an error at once and not after a timeout
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers too
    # transformers imports it if it is installed; it then warns of a kernel for CPUs that is not used
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    command = COMMANDS[args.command](args)
    with stoppable(), _short_warnings():
        return command() or 0


@contextmanager
def _short_warnings() -> Iterator[None]:
    before, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _one_line(message, category, filename, lineno, line=None) -> str:
    """A warning as one line, above progress bars."""
    bars = sys.modules.get("tqdm")
    for bar in list(getattr(bars and bars.tqdm, "_instances", ())):
        bar.clear(nolock=True)
    return f"cumo: warning: {' '.join(str(message).split())}\n"


def _told(error: BaseException) -> int | None:
    """Print an expected error and return the exit code; None for any other error."""
    recover = sys.modules.get("cumo_model.training.recover")
    if recover is not None and isinstance(error, recover.Interrupted):
        print(f"cumo: {error}", file=sys.stderr)
        return signals.STOPPED
    if signals.is_stop(error):
        print("cumo: stopped", file=sys.stderr)
        return signals.STOPPED
    if is_no_room(error) and "disk is full" not in str(error):
        print(f"cumo: the disk is full: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if isinstance(error, ValueError | RuntimeError | OSError | FloatingPointError):
        print(f"cumo: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    if not isinstance(error, Exception):
        return None
    from safetensors import SafetensorError

    from cumo_model.checkpoints.shards import is_refused_pickle

    if not isinstance(error, SafetensorError | EOFError | pickle.UnpicklingError):
        return None
    what = f"a file of tensors is damaged: {' '.join(str(error).split())}"
    if is_refused_pickle(error):  # torch advises to run its code
        what = (
            "a pickled file is refused, because it holds more than tensors, and reading it could run code: "
            "delete the checkpoint or file that it is in, or restore it"
        )
    print(f"cumo: {what}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
