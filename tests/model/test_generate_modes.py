"""Every mode of generate with pictures; ids outside the vocabulary reach no processor, criterion or draft."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.generation.candidate_generator import CandidateGenerator

from cumo_model.model.generation import TextCandidates, text_ids

OPTIONS = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
OUTSIDE, INSIDE, NEGATIVE = 60, 2, -200  # ids of the image token; the vocabulary has 50 words


@pytest.fixture
def prompt(tiny_model, tiny_batch):
    """Factory: a model and the inputs of one row with a picture, for an id of the image token."""

    def make(token=OUTSIDE, text="mistral", rows=1):
        batch = tiny_batch()
        model = tiny_model(text=text, image_token_index=token).eval()
        model.generation_config.pad_token_id = 0
        ids = batch["input_ids"].masked_fill(batch["input_ids"] == OUTSIDE, token)
        return model, {"input_ids": ids[:rows], "pixel_values": batch["pixel_values"][:rows]}

    return make


TOKENS = pytest.mark.parametrize("token", [OUTSIDE, INSIDE, NEGATIVE])


def greedy(model, inputs, processor=None, steps=7):
    """Greedy decoding without generate; processor(ids, scores) changes the scores."""
    ids = inputs["input_ids"]
    for _ in range(steps):
        with torch.no_grad():
            scores = model(**{**inputs, "input_ids": ids}).logits[:, -1]
        if 0 <= (token := model.config.image_token_index) < scores.shape[-1]:
            scores[:, token] = -torch.inf
        if processor is not None:
            scores = processor(ids, scores)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


def penalised(ids, scores, penalty=1.4, window=slice(None)):
    for row, score in zip(ids, scores, strict=True):
        for word in set(row[window].tolist()) - {OUTSIDE, NEGATIVE}:
            score[word] = score[word] / penalty if score[word] > 0 else score[word] * penalty
    return scores


def without_repeated_pairs(ids, scores):
    for row, score in zip(ids.tolist(), scores, strict=True):
        for first, second in pairwise(row):
            if first == row[-1] and second not in (OUTSIDE, NEGATIVE):
                score[second] = -torch.inf
    return scores


@TOKENS
def test_repetition_penalties_count_the_words_of_the_text(prompt, token):
    model, inputs = prompt(token, rows=2)
    length = inputs["input_ids"].shape[1]
    of_prompt = lambda ids, scores: penalised(ids, scores, 1 / 1.4, slice(length))
    for options, processor in (
        ({"repetition_penalty": 1.4}, penalised),
        ({"encoder_repetition_penalty": 1.4}, of_prompt),
    ):
        wanted = greedy(model, inputs, processor)
        assert torch.equal(model.generate(**inputs, **OPTIONS, **options), wanted)


@TOKENS
def test_n_grams_of_the_text_are_not_repeated(prompt, token):
    model, inputs = prompt(token, rows=2)
    wanted = greedy(model, inputs, without_repeated_pairs)
    assert torch.equal(model.generate(**inputs, **OPTIONS, no_repeat_ngram_size=2), wanted)
    generated = model.generate(**inputs, **OPTIONS, encoder_no_repeat_ngram_size=1)[:, 20:]
    known = [set(row.tolist()) for row in inputs["input_ids"]]
    assert all(not known[i] & set(row.tolist()) for i, row in enumerate(generated))


@pytest.mark.parametrize("token", [OUTSIDE, INSIDE])
def test_the_image_token_may_be_a_bad_or_biased_word(prompt, token):
    model, inputs = prompt(token)
    wanted = greedy(model, inputs)
    for options in (
        {"bad_words_ids": [[token], [token, 3]]},
        {"sequence_bias": [[[token], 30.0]]} if token == OUTSIDE else {},
        {"suppress_tokens": [token]},
        {"num_beams": 1, "bad_words_ids": [[token]], "repetition_penalty": 1.0000001},
    ):
        assert torch.equal(model.generate(**inputs, **OPTIONS, **options), wanted)


class Seen(LogitsProcessor, StoppingCriteria):
    """Records all ids; as a processor and as a criterion it changes nothing."""

    def __init__(self):
        self.ids = set()

    def __call__(self, input_ids, scores, **kwargs):
        self.ids |= set(input_ids.flatten().tolist())
        return scores


class Never(Seen):
    def __call__(self, input_ids, scores, **kwargs):
        super().__call__(input_ids, scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("token", [OUTSIDE, NEGATIVE])
def test_processors_and_criteria_of_users_never_see_an_id_outside_the_vocabulary(prompt, token, beams):
    model, inputs = prompt(token, rows=2)
    processor, criterion, allowed = Seen(), Never(), set()

    def everything(row, ids):
        allowed.update(ids.tolist())
        return list(range(50))

    out = model.generate(
        **inputs,
        **OPTIONS,
        num_beams=beams,
        logits_processor=[processor],
        stopping_criteria=[criterion],
        prefix_allowed_tokens_fn=everything,
    )
    text = set(inputs["input_ids"].flatten().tolist()) - {token}
    for seen in (processor.ids, criterion.ids, allowed):
        assert text <= seen <= set(range(50))
    assert torch.equal(out[:, :20], inputs["input_ids"])


def test_text_ids_repeat_a_word_of_the_row():
    ids = torch.tensor([[60, 60, 7, 8], [5, 60, 6, 60], [60, 60, 60, 60]])
    assert text_ids(ids, 60).tolist() == [[7, 7, 7, 8], [5, 5, 6, 5], [0, 0, 0, 0]]
    assert text_ids(ids[:, :0], 60).shape == (3, 0)


@pytest.mark.parametrize("token", [OUTSIDE, INSIDE])
def test_the_image_token_is_never_generated(prompt, token):
    """A head that prefers it: it is no word, and nothing would stand at its place."""
    model, inputs = prompt(token)
    if token == INSIDE:
        with torch.no_grad():
            model.lm_head.weight[token] *= 100
    for options in ({}, {"num_beams": 3}, {"do_sample": True}, {"assistant_model": model}):
        out = model.generate(**inputs, **{**OPTIONS, **options})
        assert token not in out[:, 20:]


def text_model(seed, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=50, num_key_value_heads=1, pad_token_id=0, **sizes, **options)
    return MistralForCausalLM(config).eval()


@TOKENS
@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_assistants_change_no_token(prompt, text, token):
    """The same model (all drafts are right), another CuMo, one with other pictures, a text model, lookup."""
    model, inputs = prompt(token, text)
    other, _ = prompt(token, text)
    larger, _ = prompt(token, text)
    larger.config.scales, larger.config.vision_feature_select_strategy = (1,), "full"  # ten tokens a picture
    wanted = greedy(model, inputs)
    calls = []
    model.register_forward_pre_hook(lambda *_, **kwargs: calls.append(1), with_kwargs=True)
    for options in (
        {"assistant_model": other},
        {"assistant_model": larger},
        {"assistant_model": prompt(INSIDE if token != INSIDE else OUTSIDE)[0]},
        {"assistant_model": text_model(3)},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 2, "repetition_penalty": 1.0000001, "bad_words_ids": [[49, 49, 49]]},
    ):
        assert torch.equal(model.generate(**inputs, **OPTIONS, **options), wanted)
    calls.clear()
    model.generate(**inputs, **OPTIONS)
    alone = len(calls)
    calls.clear()
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config.num_assistant_tokens_schedule = "constant"
    twin.generation_config.num_assistant_tokens = 3
    twin.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(model.generate(**inputs, **OPTIONS, assistant_model=twin), wanted)
    assert len(calls) < alone  # the assistant has seen the picture


def test_drafts_end_before_an_image_token(prompt):
    """A text assistant with the same words drafts the image token, which is in the vocabulary."""
    model, inputs = prompt(INSIDE)
    assistant = text_model(3)
    with torch.no_grad():
        assistant.lm_head.weight.zero_()
        assistant.lm_head.weight[INSIDE] = 5
        assistant.model.norm.weight.fill_(1)
    model.config.image_token_index = INSIDE
    assert torch.equal(model.generate(**inputs, **OPTIONS, assistant_model=assistant), greedy(model, inputs))
    sampled = model.generate(**inputs, **{**OPTIONS, "do_sample": True}, assistant_model=assistant)
    assert sampled.shape == (1, 27) and INSIDE not in sampled[:, 20:]


@pytest.mark.parametrize("drafted, kept", [([5, 6, INSIDE, 7], 2), ([INSIDE, 5], 0), ([5, 6, 7], 3), ([], 0)])
def test_a_cut_draft_has_the_logits_of_its_tokens(drafted, kept):
    prompt, scores = torch.tensor([[3, 4]]), torch.randn(1, len(drafted), 50)

    class Drafts(CandidateGenerator):
        def get_candidates(self, input_ids, *args, **kwargs):
            return torch.cat([input_ids, torch.tensor([drafted], dtype=torch.long)], 1), scores

    ids, logits = TextCandidates(Drafts(), INSIDE, takes_pictures=True).get_candidates(prompt)
    assert ids.tolist() == [[3, 4, *drafted[:kept]]]
    if kept or not drafted:
        assert torch.equal(logits, scores[:, :kept])
    else:
        assert logits is None


@TOKENS
@pytest.mark.parametrize("size", [1, 7, 9, 100])
def test_prefill_in_chunks_through_a_picture(prompt, size, token):
    model, inputs = prompt(token, rows=2)
    mask = torch.ones_like(inputs["input_ids"])
    wanted = model.generate(**inputs, **OPTIONS, attention_mask=mask)
    assert torch.equal(
        model.generate(**inputs, **OPTIONS, attention_mask=mask, prefill_chunk_size=size), wanted
    )
    lengths = torch.tensor([9, 9])
    found = model.generate(**inputs, **OPTIONS, prefill_chunk_size=size, image_lengths=lengths)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [2, 5])
def test_chunks_of_a_later_turn_begin_behind_the_cache(prompt, size):
    """A text-only turn after one with a picture, a turn with a new picture, and an assistant."""
    model, inputs = prompt()
    first = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True)
    more = torch.randint(3, 50, (1, 5))
    for pictures in ({}, {"pixel_values": inputs["pixel_values"] + 1}):
        ids = torch.cat([first.sequences, inputs["input_ids"] if pictures else more], 1)
        options = {**OPTIONS, "past_key_values": first.past_key_values, **pictures}
        wanted = model.generate(ids, **copy.deepcopy(options))
        found = model.generate(ids, **copy.deepcopy(options), prefill_chunk_size=size)
        assert torch.equal(found, wanted)
    wanted = model.generate(**inputs, **OPTIONS)
    found = model.generate(**inputs, **OPTIONS, assistant_model=copy.deepcopy(model), prefill_chunk_size=size)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "options", [{"num_return_sequences": 2, "do_sample": True, "top_k": 1}, {"num_beams": 3}]
)
def test_new_pictures_of_a_later_turn_stay_with_their_rows(prompt, options):
    model, inputs = prompt(rows=2)
    copies = options.get("num_beams", options.get("num_return_sequences"))
    cache = DynamicCache(config=model.config.text_config)
    spread = {key: value.repeat_interleave(copies, 0) for key, value in inputs.items()}
    model(**spread, past_key_values=cache, use_cache=True)
    new = torch.stack([torch.full((3, 12, 12), 1.0), torch.full((3, 12, 12), 2.0)])
    ids, seen = torch.cat([inputs["input_ids"], inputs["input_ids"]], 1), []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0][:, 0, 0, 0].tolist()), with_kwargs=True
    )
    model.generate(ids, pixel_values=new, past_key_values=cache, **{**OPTIONS, **options})
    assert seen[0][: 2 * copies] == [1.0] * copies + [2.0] * copies


def test_prefill_in_chunks_with_padding_and_without_a_picture(prompt):
    model, inputs = prompt(rows=2)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), inputs["input_ids"]], 1)
    mask = (torch.arange(23) >= 3).long().expand(2, 23)
    options = {"attention_mask": mask, **OPTIONS}
    for pictures in ({"pixel_values": inputs["pixel_values"]}, {}):
        given = ids if pictures else ids.masked_fill(ids == OUTSIDE, 4)
        wanted = model.generate(given, **pictures, **options)
        assert torch.equal(model.generate(given, **pictures, **options, prefill_chunk_size=5), wanted)


def test_inputs_embeds_with_pictures(prompt):
    """Positions come from the image token's embedding, or from input_ids where the id has none."""
    model, inputs = prompt(INSIDE, rows=2)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    embeds = model.get_input_embeddings()(ids)
    soft = torch.randn(2, 3, 24)
    wanted = model(**inputs).logits
    assert torch.equal(model(inputs_embeds=embeds, pixel_values=pixels).logits, wanted)
    longer = model(inputs_embeds=torch.cat([soft, embeds], 1), pixel_values=pixels)
    assert longer.logits.shape[1] == 23 and not torch.equal(longer.logits[:, 3:], wanted)
    out = model.generate(inputs_embeds=embeds, pixel_values=pixels, **OPTIONS)
    assert torch.equal(out, model.generate(**inputs, **OPTIONS)[:, 20:])
    beams = {**OPTIONS, "num_beams": 3}
    assert torch.equal(
        model.generate(inputs_embeds=embeds, pixel_values=pixels, **beams),
        model.generate(**inputs, **beams)[:, 20:],
    )
    outside, inputs = prompt(OUTSIDE, rows=2)
    ids = inputs["input_ids"]
    embeds = outside.get_input_embeddings()(ids.masked_fill(ids == OUTSIDE, 0))
    given = {"input_ids": ids, "inputs_embeds": embeds, "pixel_values": pixels}
    assert torch.equal(outside(**given).logits, outside(**inputs).logits)
    for options in (OPTIONS, beams, {**OPTIONS, "prefill_chunk_size": 6}):
        assert torch.equal(outside.generate(**given, **options), outside.generate(**inputs, **options))
    with pytest.raises(ValueError, match=r"input_ids must be \(2, 20\) like inputs_embeds, got \(2, 19\)"):
        outside(**{**given, "input_ids": ids[:, 1:]})
    with pytest.raises(ValueError, match=r"input_ids must be given with .* id 60 .* vocabulary of 50"):
        outside(inputs_embeds=embeds, pixel_values=pixels)
    training = {"attention_mask": torch.ones_like(ids), "labels": ids}
    assert torch.equal(outside.train()(**given, **training).loss, outside(**inputs, **training).loss)


def test_a_decoding_loop_of_ones_own(prompt):
    model, inputs = prompt()

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    wanted = model.generate(**inputs, **OPTIONS)
    assert torch.equal(model.generate(**inputs, **OPTIONS, custom_generate=loop), wanted)


@TOKENS
def test_other_options_of_generate_run(prompt, token):
    """Lengths only: their values are transformers' matter."""
    model, inputs = prompt(token, rows=2)
    for options in (
        {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        {"guidance_scale": 1.5},
        {"watermarking_config": WatermarkingConfig()},
        {"min_new_tokens": 5, "renormalize_logits": True, "typical_p": 0.5, "epsilon_cutoff": 0.01},
        {"exponential_decay_length_penalty": (3, 1.2), "eos_token_id": 49},
        {"use_cache": False},
        {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
    ):
        given = {**OPTIONS, **options}
        out = model.generate(**inputs, **given)
        out = getattr(out, "sequences", out)
        assert len(out) == 2 * given.get("num_return_sequences", 1) and 20 < out.shape[1] <= 27
        assert token not in out[:, 20:]


def test_what_cannot_work_with_pictures_is_named(prompt):
    model, inputs = prompt()
    with pytest.raises(ValueError, match="assistant_early_exit must be None"):
        model.generate(**inputs, **OPTIONS, assistant_early_exit=1)
    with pytest.raises(ValueError, match="token_healing must be False for prompts with pictures"):
        model.generate(**inputs, **OPTIONS, token_healing=True, tokenizer=object())


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_continuous_batching_of_text(prompt, text):
    """generate_batch with its paged cache; by default it would take most of the memory."""
    model, _ = prompt(text=text)
    wanted = [model.generate(torch.tensor([ids]), **OPTIONS)[0, len(ids) :].tolist() for ids in ([5, 6], [3])]
    config = GenerationConfig(**{**OPTIONS, "eos_token_id": -1})
    paged = ContinuousBatchingConfig(block_size=32, num_blocks=8, max_batch_tokens=32)
    found = model.generate_batch(
        [[5, 6], [3]], generation_config=config, continuous_batching_config=paged, warmup=False
    )
    assert [found[name].generated_tokens for name in sorted(found)] == wanted


def test_no_tiles_are_no_pictures(prompt):
    model, inputs = prompt()
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == OUTSIDE, 4)
    wanted = model(input_ids=ids).logits
    empties = [torch.zeros(0, 3, 12, 12), torch.zeros(0), [], torch.zeros(1, 0, 3, 12, 12), [None, None]]
    embeds = model.get_input_embeddings()(ids)
    for empty in (*empties, [[], []]):
        assert model.get_image_features(empty).pooler_output == []
        both = {"input_ids": ids, "inputs_embeds": embeds, "pixel_values": empty}
        assert torch.equal(model(**both).logits, wanted)
        assert torch.equal(model.generate(**both, **OPTIONS), model.generate(ids, **OPTIONS))
        assert torch.equal(model(input_ids=ids, pixel_values=empty).logits, wanted)
        out = model.generate(ids, pixel_values=empty, **OPTIONS)
        assert torch.equal(out, model.generate(ids, **OPTIONS))
    with pytest.raises(ValueError, match=r"pixel_values must come with .* got none for 9"):
        model(input_ids=inputs["input_ids"], pixel_values=[])


def test_tuples_on_request(prompt):
    model, inputs = prompt()
    wanted = model(**inputs)
    assert torch.equal(model(**inputs, return_dict=False)[0], wanted.logits)
    picture = {"pixel_values": inputs["pixel_values"]}
    features = model.get_image_features(**picture)
    assert torch.equal(
        model.get_image_features(picture["pixel_values"], None).pooler_output[0], features[1][0]
    )
    with pytest.raises(
        ValueError, match="vision_feature_select_strategy must be 'default' or 'full', got 'x'"
    ):
        model.get_image_features(**picture, vision_feature_select_strategy="x")
    found = model.get_image_features(**picture, return_dict=False)
    assert isinstance(found, tuple) and torch.equal(found[1][0], features.pooler_output[0])
    model.config.return_dict = model.config.text_config.return_dict = False
    assert torch.equal(model(**inputs)[0], wanted.logits)
    assert isinstance(model.model(**inputs), tuple)
    assert isinstance(model.get_image_features(**picture), tuple)
    out = model.train()(**inputs, labels=inputs["input_ids"])
    assert out[0].requires_grad
    found = [model.eval().generate(**inputs, **OPTIONS, prefill_chunk_size=n) for n in (None, 5)]
    wanted = greedy_of_dict(model, inputs)
    assert all(torch.equal(ids, wanted) for ids in found)


def greedy_of_dict(model, inputs):
    model.config.return_dict = model.config.text_config.return_dict = True
    return greedy(model, inputs)


def test_repetition_penalty_is_transformers_own_where_the_id_is_a_word(prompt):
    model, inputs = prompt(INSIDE)
    own = RepetitionPenaltyLogitsProcessor(1.4)
    wanted = greedy(model, inputs, own)
    assert torch.equal(model.generate(**inputs, **OPTIONS, repetition_penalty=1.4), wanted)
