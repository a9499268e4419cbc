"""Checks of a command's arguments that need the standard library only: paths, numbers, names of templates.

They run before torch is imported, which takes seconds. What needs the content of a file is checked later, by
the functions that read it, and so is all of this for those who call the functions.
"""

import argparse
import base64
import binascii
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cumo_model.data.patterns import check_roots, record_files
from cumo_model.processing.templates import IMAGE_MARKER, get_template
from cumo_model.processing.tokenizer_files import has_tokenizer, no_tokenizer

MOST = 2**31 - 1  # of numbers that count something
IMAGES = "--images must be a folder or a .tar file"
GROUPS = (32, 64, 128, 256)  # of weights that share a scale
SMALLEST = 30  # bytes of a picture; shorter base64 text is a name


def check(args: argparse.Namespace) -> int | None:
    """Check the arguments of a command.

    Returns:
        An exit code if the command has nothing left to do, else None.

    Raises:
        ValueError: an argument is refused; the message names its option.
    """
    return CHECKS[args.command](args)


def _demo(args: argparse.Namespace) -> None:
    _number("--seed", args.seed, 0, 2**32 - 1)
    _check_run(args.out)


def _ablate(args: argparse.Namespace) -> None:
    _number("--seeds", args.seeds, 1)
    if args.steps is not None:
        _number("--steps", args.steps, 1)
    _check_run(args.out)


def _chat(args: argparse.Namespace) -> None:
    _sampling(args)
    if args.question is not None and not args.question.strip():
        raise ValueError("question must not be empty")
    if args.question is not None and IMAGE_MARKER in args.question:
        raise ValueError(f"question must not hold {IMAGE_MARKER}: --image gives the picture")
    if args.web and (args.question is not None or args.image):
        raise ValueError(
            f"--{'image' if args.image else 'question'} must not be given with --web: the page asks"
        )
    _number("--port", args.port, 0, 65535)
    _check_pictures(args.image or [])
    _engine(args)


def _engine(args: argparse.Namespace) -> None:
    """What answers: a folder, as an argument or an option, or an endpoint."""
    if args.folder is not None and args.checkpoint is not None:
        raise ValueError(f"the checkpoint must be given once, got {str(args.folder)!r} and --checkpoint")
    args.checkpoint = args.checkpoint or args.folder
    if args.endpoint is None:
        if args.checkpoint is None:
            raise ValueError("the folder of a checkpoint, or --endpoint, must be given, got neither")
        _check_template(args.template, must_instruct=True)
        _check_talking(args.checkpoint)
        return
    _check_url("--endpoint", args.endpoint)
    given = {"a checkpoint": args.checkpoint, "--template": args.template, "--device": args.device,
             "--dtype": args.dtype, "--load-4bit or --load-8bit": args.bits}  # fmt: skip
    if named := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{named[0]} must not be given with --endpoint, whose server has its own")


def _sampling(args: argparse.Namespace) -> None:
    _number("--max-new-tokens", args.max_new_tokens, 1)
    if not (args.temperature == 0 or 1e-6 <= args.temperature <= 1e6):
        raise ValueError(f"--temperature must be 0, or from 1e-06 to 1e+06, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    if args.seed is not None:
        _number("--seed", args.seed, 0, 2**63 - 1)
    if args.system is not None and (not args.system.strip() or IMAGE_MARKER in args.system):
        raise ValueError(f"--system must be text without {IMAGE_MARKER}, got {args.system!r}")


def _serve(args: argparse.Namespace) -> None:
    _number("--port", args.port, 1, 65535)
    _number("--tensor-parallel", args.tensor_parallel, 1)
    _number("--images-per-prompt", args.images_per_prompt, 0)
    if args.max_model_len is not None:
        _number("--max-model-len", args.max_model_len, 1)
    if not args.host.strip():
        raise ValueError("--host must not be empty")
    if args.name is not None and not args.name.strip():
        raise ValueError("--name must not be empty")
    _check_talking(args.checkpoint, "checkpoint")


def _experts(args: argparse.Namespace) -> None:
    _number("--batch-size", args.batch_size, 1)
    if args.limit is not None:
        _number("--limit", args.limit, 1)
    _check_template(args.template)
    with _named("--data"):
        record_files(args.data)
    check_roots(IMAGES, args.images or [])
    _check_pictures(args.picture or [])
    _check_talking(args.checkpoint)
    _check_new("--out", args.out)


def _data(args: argparse.Namespace) -> int | None:
    _check_template(args.template)
    check_roots(IMAGES, args.images or [])
    problems = []
    for pattern in args.files:
        try:
            record_files(pattern)
        except ValueError as error:
            problems.append(str(error))
    if len(problems) < len(args.files):
        return None  # the report of the others names these too
    print("\n".join(problems))
    return 1


def _train(args: argparse.Namespace) -> None:
    """Reading the recipe, which needs no torch either, checks the rest."""
    for option, value, least in (
        ("--processes", args.processes, 1),
        ("--max-restarts", args.max_restarts, 0),
    ):
        if value is not None:
            _number(option, value, least)


def _convert(args: argparse.Namespace) -> None:
    if not 0 < args.shard_gb < math.inf:
        raise ValueError(f"--shard-gb must be positive, got {args.shard_gb}")
    if args.remote_code and args.layout == "original":
        raise ValueError("--layout must be cumo with --remote-code, got original, the original code's own")
    _check_model("source", args.source)
    _check_new("target", args.target)


def _quantize(args: argparse.Namespace) -> None:
    if args.group is not None and args.group not in GROUPS:
        raise ValueError(f"--group must be one of {', '.join(map(str, GROUPS))}, got {args.group}")
    if args.asymmetric and args.bits != "int4":
        got = "none" if args.bits is None else args.bits
        raise ValueError(f"--asymmetric must be given with --bits int4 only, got {got}")
    _check_model("source", args.source)
    _check_new("--out", args.out)


def _upcycle(args: argparse.Namespace) -> None:
    places = ("vision", "projector", "text")
    _number("--seed", args.seed, 0, 2**63 - 1)
    if not 0 <= args.noise < math.inf:
        raise ValueError(f"--noise must be finite and not negative, got {args.noise}")
    if not 0 <= args.drop <= 1:
        raise ValueError(f"--drop must lie in [0, 1], got {args.drop}")
    _number("--top-k", args.top_k, 1)
    for place in places:
        experts, top_k = getattr(args, f"{place}_experts"), getattr(args, f"{place}_top_k")
        option = "--top-k" if top_k is None else f"--{place}-top-k"
        top_k = args.top_k if top_k is None else top_k
        _number(option, top_k, 1)
        if experts is not None:
            _number(f"--{place}-experts", experts, 0)
            if experts > 1:
                _number(option, top_k, 1, experts)
    starts = ("vision", "clip", "text", "projector", "tokenizer")
    given = [name for name in starts if getattr(args, name) is not None]
    if args.checkpoint is not None and given:
        raise ValueError(
            "give either a checkpoint, or vision and text; got a checkpoint and " + " and ".join(given)
        )
    if args.checkpoint is None and (args.vision is None or args.text is None):
        raise ValueError(
            f"give either a checkpoint, or vision and text; got {' and '.join(given) or 'neither'}"
        )
    for name in ("checkpoint", "vision", "text"):
        if getattr(args, name) is not None:
            _check_model(f"--{name}", getattr(args, name))
    for name in ("clip", "projector"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{name} must be a file, got {str(path)!r}, which {_what(path)}")
    if args.tokenizer is not None:
        _check_folder("--tokenizer", args.tokenizer)
        if not has_tokenizer(args.tokenizer):
            raise ValueError(f"--tokenizer must be a folder with a tokenizer, got {str(args.tokenizer)!r}")
    _check_new("--out", args.out)


def _asking(args: argparse.Namespace) -> None:
    """Numbers of a command that asks many questions."""
    for option in ("batch_size", "at_once", "limit", "processes"):
        if getattr(args, option) is not None:
            _number(f"--{option.replace('_', '-')}", getattr(args, option), 1)
    if args.endpoint is not None and (args.processes or 1) > 1:
        raise ValueError(
            f"--processes must not be given with --endpoint, got {args.processes}: --at-once is for it"
        )


def _eval(args: argparse.Namespace) -> None:
    _asking(args)
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out must be a folder, got {str(args.out)!r}, which is a file")
    if args.compare is not None:
        given = {"a checkpoint": args.checkpoint or args.folder, "--endpoint": args.endpoint,
                 "--task": args.task, "--data": args.data, "--answers": args.answers,
                 "--judge": args.judge, "--limit": args.limit, "--processes": args.processes}  # fmt: skip
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{named[0]} must not be given with --compare, which reads finished runs")
        if len(args.compare) < 2:
            raise ValueError(f"--compare must have at least two folders, got {len(args.compare)}")
        for run in args.compare:
            _check_folder("--compare", run)
        return
    for option in ("task", "data"):
        if getattr(args, option) is None:
            raise ValueError(f"--{option} must be given, or --compare")
    _check_folder("--data", args.data)
    if args.judge_url is not None:
        _check_url("--judge-url", args.judge_url)
        if args.judge is None:
            raise ValueError("--judge-url must not be given without --judge, the name of a model")
    if args.answers is None:
        _engine(args)
        return
    if not args.answers.is_file():
        raise ValueError(f"--answers must be a file, got {str(args.answers)!r}, which {_what(args.answers)}")
    given = {"a checkpoint": args.checkpoint or args.folder, "--endpoint": args.endpoint}
    if named := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{named[0]} must not be given with --answers, which are scored as they are")


def _answer(args: argparse.Namespace) -> None:
    _sampling(args)
    _asking(args)
    if not args.questions.is_file():
        got = f"{str(args.questions)!r}, which {_what(args.questions)}"
        raise ValueError(f"--questions must be a file, got {got}")
    check_roots(IMAGES, args.images or [])
    if args.out.is_dir():
        raise ValueError(f"--out must be a file, got {str(args.out)!r}, which is a folder")
    _engine(args)


CHECKS: dict[str, Callable[[argparse.Namespace], int | None]] = {
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


def _number(option: str, value: int, least: int, most: int = MOST) -> None:
    if not least <= value <= most:
        wanted = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"{option} must be {wanted}, got {value}")


def _what(path: Path) -> str:
    """Why a path is not the file or folder that it should be."""
    return "does not exist" if not path.exists() else "is a folder" if path.is_dir() else "is not a folder"


def _check_url(option: str, url: str) -> None:
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"{option} must be an address such as http://127.0.0.1:8000/v1, got {url!r}")


def _check_folder(option: str, path: Path) -> None:
    if not path.is_dir():
        why = "does not exist, so it is not a folder" if not path.exists() else "is not a folder"
        raise ValueError(f"{option} must be a folder, got {str(path)!r}, which {why}")


def _check_model(option: str, path: Path) -> None:
    """A folder with a config.json."""
    _check_folder(option, path)
    if not (path / "config.json").is_file():
        also = "" if has_tokenizer(path) else " and has no tokenizer"
        raise ValueError(
            f"{option} must be a folder of a model, got {str(path)!r}, which has no config.json{also}"
        )


def _check_talking(path: Path, option: str = "--checkpoint") -> None:
    """The folder of a model with a tokenizer."""
    _check_model(option, path)
    if not has_tokenizer(path):
        raise ValueError(f"checkpoint {str(path)!r} cannot be loaded: it {no_tokenizer(path)}")


def _check_new(option: str, path: Path) -> None:
    """A path at which a folder can be created."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise ValueError(f"{option} {path} exists already: choose another folder or delete it")
    above = next((parent for parent in path.absolute().parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{option} must lie in a folder, got {str(path)!r}: {above} is a file")


def _check_run(out: Path | None) -> None:
    """A folder of an earlier run, which is resumed, or a new one."""
    if out is None or (out / "settings.json").exists():
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got {str(out)!r}, which is a file")
    if out.is_dir() and any(found.name != ".settings.json.part" for found in out.iterdir()):
        raise ValueError(f"{out} contains something that is not a demo: choose another --out")


def _check_template(name: str | None, must_instruct: bool = False) -> None:
    if name is None:
        return
    with _named("--template"):
        if must_instruct and not get_template(name).instruct:
            raise ValueError(f"template must be an instruct template, got {name!r}")
        get_template(name)


def _check_pictures(names: Iterable[str]) -> None:
    """Files that exist; what may be a URL or base64 text is left to `read_picture`."""
    for name in names:
        if name[:8].lower().startswith(("http://", "https://", "file://", "data:")) or os.path.isfile(name):
            continue
        if os.path.isdir(name):
            raise ValueError(f"image {name!r} must be a file, got a folder")
        try:
            data = base64.b64decode("".join(name.split()), validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if len(data) < SMALLEST:
            raise ValueError(f"image {name!r} does not exist")


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Put an option before the message of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
