"""vLLM's engine in a process of its own: python -m tests.serve.engine FOLDER OUT OPTIONS.

It answers all conversations of questions.py twice, and writes ids of prompts and answers, and how many tokens
came out of the cache of earlier prompts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}  # fmt: skip
OPTIONS = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "limit_mm_per_prompt": {"image": 4},
    "disable_log_stats": True, "block_size": 32,
}  # fmt: skip


def run(folder: Path, out: Path, environment=(), **options) -> list[list[dict]]:
    """The answers of both rounds, by an engine in a process of its own.

    Without `environment` the engine computes in the process that asks it.
    """
    one = {} if environment else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    words = [sys.executable, "-m", "tests.serve.engine", str(folder), str(out), json.dumps(OPTIONS | options)]
    log = out.with_suffix(".log")
    with log.open("w") as file:
        code = subprocess.run(
            words, cwd=ROOT, env=os.environ | ENVIRONMENT | one | dict(environment), stdout=file,
            stderr=subprocess.STDOUT, timeout=400,
        ).returncode  # fmt: skip
    assert code == 0, log.read_text()[-4000:]
    return json.loads(out.read_text())


def main(folder: str, out: str, options: str) -> None:
    from vllm import LLM, SamplingParams

    from tests.serve.questions import NEW_TOKENS, TALKS, messages

    engine = LLM(folder, **json.loads(options))
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0)
    rounds = []
    for _ in range(2):
        found = engine.chat([messages(talk, "image_pil") for talk in TALKS], greedy, use_tqdm=False)
        rounds.append(
            [
                {
                    "prompt": list(answer.prompt_token_ids),
                    "answer": list(answer.outputs[0].token_ids),
                    "cached": answer.num_cached_tokens,
                    "logprob": next(iter(answer.outputs[0].logprobs[0].values())).logprob,
                }
                for answer in found
            ]
        )
    Path(out).write_text(json.dumps(rounds))


if __name__ == "__main__":
    main(*sys.argv[1:])
