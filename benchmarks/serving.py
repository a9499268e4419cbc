"""Requests per second and time to the first token of vLLM's endpoint and of `generate`, on a CPU.

python -m benchmarks.serving --out build/serving

It runs in the environment of `make serve-test`, with random weights in fp32. At 1, 4 and 16 simultaneous
requests both sides get the same questions, each about a picture of its own, so that no cache helps. All
greedy tokens must be equal, or nothing is written. `generate` answers one after the other, and as a batch.
"""

import argparse
import csv
import io
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, MixtralConfig

from cumo_model import (
    CumoConfig,
    CumoForConditionalGeneration,
    CumoProcessor,
    CumoVisionConfig,
    build_processor,
)
from cumo_model.checkpoints.folders import write_whole
from cumo_model.demo.tokenizer import train_tokenizer

LEVELS = (1, 4, 16)  # simultaneous requests
QUESTION = "what is in the picture and how many of them are there"
COLUMNS = ("engine", "requests", "requests per second", "median time to first token (ms)")
WAIT = 300  # seconds for the server to start


def main(argv: list[str] | None = None) -> int:
    """Measure, and write serving.csv and serving.md."""
    program = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__.splitlines()[0])
    program.add_argument("--out", type=Path, required=True, help="folder for serving.csv and serving.md")
    program.add_argument("--width", type=int, default=512, help="of the language model (default: 512)")
    program.add_argument("--layers", type=int, default=8, help="of the language model (default: 8)")
    program.add_argument("--new-tokens", type=int, default=32, help="of each answer (default: 32)")
    program.add_argument(
        "--rounds", type=int, default=2, help="groups of requests at each level (default: 2)"
    )
    args = program.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "model")
        parameters = write_checkpoint(checkpoint, args.width, args.layers)
        mine, right = measure_generate(checkpoint, args.rounds, args.new_tokens)
        with server(checkpoint, Path(folder, "server.log")) as url:
            rows = mine + measure_endpoint(url, args.rounds, args.new_tokens, right)
    order = ("vLLM", "generate, one by one", "generate, one batch")
    rows.sort(key=lambda row: (row[1], order.index(row[0])))
    what = (
        f"{cpu()}, {len(os.sched_getaffinity(0))} cores, fp32, {parameters / 1e6:.0f} million parameters, "
        f"{args.new_tokens} new tokens, torch {torch.__version__}"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *rows])
    write_whole(args.out / "serving.csv", table.getvalue())
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {level} | {rate:.2f} | {first:.0f} |" for name, level, rate, first in rows]
    page = f"{what}; all greedy tokens are equal.\n\n" + "\n".join(lines) + "\n"
    write_whole(args.out / "serving.md", page)
    print(page, end="")
    return 0


def cpu() -> str:
    """Name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_checkpoint(folder: Path, width: int, layers: int) -> int:
    """A Mixtral with a tower and a connector of experts, of random weights -> number of parameters."""
    words = train_tokenizer([QUESTION], 400)
    text = MixtralConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), head_dim=64,
        num_local_experts=4, max_position_embeddings=512, sliding_window=None, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    vision = CumoVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=48,
        patch_size=8, num_experts=4,
    )  # fmt: skip
    token = words.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = CumoForConditionalGeneration(
        CumoConfig(vision_config=vision, text_config=text, image_token_index=token)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
                parameter.normal_(std=1.5 * fan_in**-0.5)
    model.save_pretrained(folder)
    build_processor(words, 48, 8, template="mistral_instruct").save_pretrained(folder)
    return model.num_parameters()


def talks(level: int, rounds: int) -> Iterator[list[list[dict]]]:
    """Groups of `level` conversations, each about a picture that no other has."""
    for number in range(rounds):
        group = []
        for request in range(level):
            generator = torch.Generator().manual_seed(level * 1000 + number * 100 + request)
            blocks = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
            image = Image.fromarray(blocks.numpy()).resize((48, 48), Image.Resampling.NEAREST)
            parts = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
            group.append([{"role": "user", "content": parts}])
        yield group


class FirstToken(LogitsProcessor):
    """Notes when the first token can be chosen."""

    def __init__(self):
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at = time.perf_counter() if self.at is None else self.at
        return scores


def measure_generate(checkpoint: Path, rounds: int, new_tokens: int) -> tuple[list[tuple], dict]:
    """Rows of COLUMNS, and the greedy tokens of each (level, round)."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = CumoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all answers have the same length
    processor = CumoProcessor.from_pretrained(checkpoint)
    processor.tokenizer.padding_side = "left"

    def answer(group: list[list[dict]]) -> tuple[list[list[int]], float]:
        note, begin = FirstToken(), time.perf_counter()
        inputs = processor.apply_chat_template(
            group, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        out = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False,
            logits_processor=LogitsProcessorList([note]),
        )  # fmt: skip
        return out[:, inputs["input_ids"].shape[1] :].tolist(), note.at - begin

    answer(next(talks(2, 1)))
    rows, right = [], {}
    for level in LEVELS:
        alone, batched, waited, first = 0.0, 0.0, [], []
        for number, group in enumerate(talks(level, rounds)):
            right[level, number], begin = [], time.perf_counter()
            for talk in group:
                before = time.perf_counter() - begin  # a request waits for those before it
                tokens, until = answer([talk])
                right[level, number] += tokens
                waited.append(before + until)
            alone += time.perf_counter() - begin
            if level > 1:
                begin = time.perf_counter()
                tokens, until = answer(group)
                batched += time.perf_counter() - begin
                first += [until] * level
                if tokens != right[level, number]:
                    raise RuntimeError(f"generate gives other tokens for a batch of {level} requests")
        for name, seconds, times in (("one by one", alone, waited), ("one batch", batched, first)):
            if times:
                milliseconds = 1000 * statistics.median(times)
                rows.append((f"generate, {name}", level, level * rounds / seconds, milliseconds))
    return rows, right


@contextmanager
def server(checkpoint: Path, log: Path) -> Iterator[str]:
    """The URL of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "cumo_model", "serve", str(checkpoint), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + WAIT
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server does not start: {log.read_text()[-2000:]}") from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def measure_endpoint(url: str, rounds: int, new_tokens: int, right: dict) -> list[tuple]:
    """Rows of COLUMNS, after a comparison of all tokens with those of `generate`."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(talk: list[dict]) -> tuple[list[int], float]:
        file = io.BytesIO()
        talk[0]["content"][0]["image"].save(file, "PNG")
        where = "data:image/png;base64," + b64encode(file.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": where}}, talk[0]["content"][1]]
        tokens, first, begin = [], None, time.perf_counter()
        for chunk in client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": parts}], temperature=0, stream=True,
            max_tokens=new_tokens, extra_body={"ignore_eos": True, "return_token_ids": True},
        ):  # fmt: skip
            found = getattr(chunk.choices[0], "token_ids", None) or []
            first = time.perf_counter() - begin if found and first is None else first
            tokens += found
        return tokens, first

    ask(next(talks(2, 1))[0])
    rows = []
    for level in LEVELS:
        seconds, first = 0.0, []
        with ThreadPoolExecutor(level) as threads:
            for number, group in enumerate(talks(level, rounds)):
                begin = time.perf_counter()
                found = list(threads.map(ask, group))
                seconds += time.perf_counter() - begin
                first += [until for _, until in found]
                if [tokens for tokens, _ in found] != right[level, number]:
                    raise RuntimeError(f"vLLM gives other tokens than generate at {level} requests")
        rows.append(("vLLM", level, level * rounds / seconds, 1000 * statistics.median(first)))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
