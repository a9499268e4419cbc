"""vLLM gives the greedy tokens of `generate`, in one process and split over two."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make serve-test", allow_module_level=True)

from tests.serve import engine
from tests.serve.checkpoints import write
from tests.serve.questions import TALKS, Right

ANYRES = {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]}
SCALED = {"logits_scaling": 4.0, "embedding_multiplier": 2.0}
KINDS = {  # seeds of weights with which no answer is decided by rounding, see `Right`
    # experts in all three places, two scales
    "mixtral": {"text": "mixtral", "scales": [1, 3], "seed": 2, "std": 0.2},
    # pictures with numbers of tokens of their own, cut into chunks: at most 12 tokens a step
    "anyres": {"text": "mistral", "scales": [1], **ANYRES, "seed": 31},
    # an image token beyond the vocabulary, and one weight for both embeddings
    "tied": {
        "text": "mistral",
        "marker_last": True,
        "text_config": {"tie_word_embeddings": True},
        "seed": 39,
    },
    # a decoder that scales embeddings, with a head that divides its logits
    "granite": {"text": "granite", "scales": [1], "text_config": SCALED, "seed": 2, "std": 0.2},
}
CHUNKED = {"max_num_batched_tokens": 12, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Factory: the folder of a kind and its right answers, made once."""
    made = {}

    def make(kind: str):
        if kind not in made:
            folder = write(tmp_path_factory.mktemp(kind), **KINDS[kind])
            right = Right(folder)
            made[kind] = folder, [right.answer(talk) for talk in TALKS]
        return made[kind]

    return make


def check(rounds: list[list[dict]], right: list[tuple[list[int], list[int]]]) -> None:
    assert len({tuple(answer) for _, answer in right}) == len(right), "all answers differ"
    for answers in rounds:
        for talk, found, (prompt, answer) in zip(TALKS, answers, right, strict=True):
            assert found["prompt"] == prompt, talk
            assert found["answer"] == answer, talk
    cached = [found["cached"] or 0 for found in rounds[1]]
    assert any(cached), "the second round reads no earlier prompt"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_generate(kind, checkpoint, tmp_path):
    folder, right = checkpoint(kind)
    options = CHUNKED if kind == "anyres" else {}
    rounds = engine.run(folder, tmp_path / "answers.json", **options)
    check(rounds, right)
    if kind == "granite":  # its division changes no order, but probabilities
        found, scores = rounds[0][0]["logprob"], Right(folder).first_scores(TALKS[0])
        token = right[0][1][0]
        divided, not_divided = (
            (factor * scores).log_softmax(-1)[token] for factor in (1, SCALED["logits_scaling"])
        )
        assert abs(found - divided) < abs(found - not_divided)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_greedy_tokens_are_the_same_on_two_ranks(checkpoint, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("vLLM wants a core for each rank")
    folder, right = checkpoint("mixtral")
    cores = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"}
    check(engine.run(folder, tmp_path / "answers.json", cores, tensor_parallel_size=2), right)
