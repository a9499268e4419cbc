"""python -m cumo_model {demo,chat,convert,upcycle}: the front door.

The work is in the library; errors come as one line.
"""

import argparse
import os
import sys
from pathlib import Path


def _demo(args: argparse.Namespace) -> int:
    from cumo_model.demo.run import run_demo

    out = args.out or Path("runs", "demo-quick" if args.quick else "demo")
    return run_demo(out, args.quick, args.seed)


def _chat(args: argparse.Namespace) -> int:
    from cumo_model.chat import chat

    chat(args.checkpoint, args.image, args.question, args.template, args.max_new_tokens)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from cumo_model.checkpoint import convert

    convert(args.source, args.target, args.layout, int(args.shard_gb * 1000**3))
    return 0


def _upcycle(args: argparse.Namespace) -> int:
    from cumo_model.tool import upcycle_checkpoint

    numbers = ("vision_experts", "projector_experts", "text_experts", "top_k", "vision_top_k",
               "projector_top_k", "text_top_k", "noise", "drop", "seed")  # fmt: skip
    options = {name: getattr(args, name) for name in numbers}
    upcycle_checkpoint(
        args.out, args.checkpoint, args.vision, args.text, args.projector, args.dtype, **options
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cumo", description="CuMo: a mixture-of-experts vision-language model"
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train a small CuMo through all three stages and question it")
    demo.add_argument(
        "--quick", action="store_true", help="the same path in under two minutes; learns little"
    )
    demo.add_argument("--out", type=Path, help="folder of the run, resumed if it is there (runs/demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    chat = commands.add_parser("chat", help="ask a checkpoint about a picture")
    chat.add_argument(
        "--checkpoint", type=Path, required=True, help="folder with config, safetensors, processor"
    )
    chat.add_argument("--image", type=Path, help="the picture; without one only text is talked about")
    chat.add_argument("--question", help="ask this and end; without it questions are read from the terminal")
    chat.add_argument(
        "--template", default="mistral_instruct", help="how turns are written (mistral_instruct)"
    )
    chat.add_argument("--max-new-tokens", type=int, default=64)
    chat.set_defaults(run=_chat)

    convert = commands.add_parser(
        "convert", help="a checkpoint from the layout of SHI-Labs/CuMo into ours, or back, bit for bit"
    )
    convert.add_argument("source", type=Path, help="folder with config.json and safetensors")
    convert.add_argument("target", type=Path, help="new folder")
    convert.add_argument("--layout", choices=("cumo", "original"), help="of the target (the other one)")
    convert.add_argument("--shard-gb", type=float, default=2.0, help="largest file, and memory needed (2)")
    convert.set_defaults(run=_convert)

    upcycle = commands.add_parser("upcycle", help="make experts of the MLPs of a dense model, and say step 0")
    upcycle.add_argument(
        "--checkpoint", type=Path, help="a CuMo, in our layout or the original's; or its parts:"
    )
    upcycle.add_argument("--vision", type=Path, help="folder of a CLIP")
    upcycle.add_argument("--text", type=Path, help="folder of a language model")
    upcycle.add_argument("--projector", type=Path, help="mm_projector.bin (a new connector)")
    upcycle.add_argument("--out", type=Path, required=True, help="new folder")
    for place, experts in (("vision", 4), ("projector", 4), ("text", 0)):
        text = f"experts of the {place} part ({experts}); 0 leaves it as it is"
        upcycle.add_argument(f"--{place}-experts", type=int, default=experts, help=text)
        upcycle.add_argument(f"--{place}-top-k", type=int, help="of this part alone")
    upcycle.add_argument("--top-k", type=int, default=2, help="experts per token (2)")
    upcycle.add_argument("--noise", type=float, default=0.0, help="in deviations of each weight (0)")
    upcycle.add_argument("--drop", type=float, default=0.0, help="share of inner units drawn anew (0)")
    upcycle.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(that of the files)")
    upcycle.add_argument("--seed", type=int, default=0)
    upcycle.set_defaults(run=_upcycle)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # nothing here needs a hub: a name that is no folder is an error at once, not after a time-out
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("cumo: stopped", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        print(f"cumo: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        from cumo_model.train import Interrupted

        if not isinstance(error, Interrupted):
            raise
        print(f"cumo: {error}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
