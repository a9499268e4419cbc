"""CumoGenerationMixin: transformers' generation for a model whose prompts contain pictures.

The id of the image token may be outside the vocabulary: in the released checkpoints it is 32000 of 32000
words. Logits processors, stopping criteria and drafts therefore work on ids without it (`text_ids`).
"""

import inspect
import warnings
from contextvars import ContextVar
from functools import wraps

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import (
    CandidateGenerator,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from cumo_model.model.compat import given_cache, this_cache_name
from cumo_model.model.image_tokens import as_tiles, picture_sizes, pictures_per_row
from cumo_model.model.positions import check_length, longest_prompt, position_limit, positions_of

_longest: ContextVar[int | None] = ContextVar("_longest", default=None)  # prompt of the current `generate`
PICTURES = ("pixel_values", "image_sizes", "image_lengths")

# they compare ids or use them as indices of the scores, so the image token can be a word of its own for them
BY_ID = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)


def text_ids(input_ids: Tensor, image_token: int) -> Tensor:
    """(B, S) ids with each image token replaced by the first text token of its row (0 if it has none)."""
    if not input_ids.shape[1]:
        return input_ids
    is_image = input_ids == image_token
    first = input_ids.gather(1, (~is_image).int().argmax(1, keepdim=True))
    return torch.where(is_image, first.masked_fill(first == image_token, 0), input_ids)


class TextProcessors(LogitsProcessorList):
    """Logits processors that never see the image token.

    Those of transformers that look up ids get one more column of scores, -inf, for the image token; so a
    picture is one unknown word for repetition penalties and n-grams. All others get `text_ids`.
    """

    def __init__(self, processors: LogitsProcessorList, image_token: int):
        super().__init__(processors)
        self.image_token = image_token

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        words = scores.shape[-1]
        word = image_word(self.image_token, words)
        extended = input_ids.masked_fill(input_ids == self.image_token, word)
        text = text_ids(input_ids, self.image_token)
        for processor in self:
            if isinstance(processor, BY_ID):
                wide = pad(scores, (0, word + 1 - words), value=-torch.inf)
                scores = processor(extended, wide)[..., :words]
            else:
                more = {key: kwargs[key] for key in kwargs if key in inspect.signature(processor).parameters}
                scores = processor(text, scores, **more)
        return scores


def image_word(image_token: int, words: int) -> int:
    """The id of the image token among scores that are extended beyond a vocabulary of `words`."""
    return max(image_token, words)


class TextCriteria(StoppingCriteriaList):
    """Stopping criteria that get `text_ids`."""

    def __init__(self, criteria: StoppingCriteriaList, image_token: int):
        super().__init__(criteria)
        self.image_token = image_token

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return super().__call__(text_ids(input_ids, self.image_token), scores, **kwargs)


class TextCandidates(CandidateGenerator):
    """Drafts of another generator, without image tokens.

    Args:
        inner: the generator.
        image_token: id of the image token.
        takes_pictures: whether `inner` knows image tokens; otherwise it gets `text_ids`.
    """

    def __init__(self, inner: CandidateGenerator, image_token: int, takes_pictures: bool):
        self.inner, self.image_token, self.takes_pictures = inner, image_token, takes_pictures

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    @property
    def requires_model_outputs(self) -> bool:  # the base class has a value, so __getattr__ is not asked
        return self.inner.requires_model_outputs

    def _ids_for_inner(self, input_ids: Tensor) -> Tensor:
        return input_ids if self.takes_pictures else text_ids(input_ids, self.image_token)

    def get_candidates(self, input_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        ids, logits = self.inner.get_candidates(self._ids_for_inner(input_ids), *args, **kwargs)
        drafts = ids[:, input_ids.shape[1] :].to(input_ids.device)
        length = int((drafts[0] != self.image_token).int().cumprod(0).sum()) if drafts.shape[1] else 0
        if length < drafts.shape[1]:
            logits = logits[:, :length] if logits is not None and length else None
        return torch.cat([input_ids, drafts[:, :length]], 1), logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        self.inner.update_candidate_strategy(self._ids_for_inner(input_ids), scores, num_matches)


class CumoGenerationMixin(GenerationMixin):
    """GenerationMixin with pictures. The image token is never generated."""

    @this_cache_name
    @wraps(GenerationMixin.generate)
    def generate(self, inputs=None, *args, **kwargs):
        named = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        given = [prompt for prompt in named if isinstance(prompt, Tensor) and prompt.ndim > 1]
        text = self.config.text_config
        if not given or position_limit(text) is None:
            return super().generate(inputs, *args, **kwargs)
        if isinstance(kwargs.get("position_ids"), Tensor):
            longest = positions_of(kwargs["position_ids"])
        else:
            longest = max(longest_prompt(prompt, kwargs.get("attention_mask")) for prompt in given)
        check_length(text, longest, "a prompt")
        token = _longest.set(longest)
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            _longest.reset(token)

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        prepared = super()._prepare_generated_length(generation_config, *args, **kwargs)
        limit, prompt = position_limit(self.config.text_config), _longest.get()
        answer = prepared.max_length - kwargs["input_ids_length"]
        if None not in (limit, prompt) and prompt + answer > limit:
            warnings.warn(
                f"prompt and answer may have {prompt + answer} tokens ({prompt} + {answer}), more than "
                f"text_config.max_position_embeddings {limit}: beyond them the answer is noise",
                stacklevel=2,
            )
        return prepared

    def _has_image_word(self) -> bool:
        return 0 <= self.config.image_token_index < self.config.text_config.vocab_size

    def _get_logits_processor(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
        token = self.config.image_token_index
        ids = kwargs.get("encoder_input_ids")
        if ids is not None and ids.ndim == 2 and not self._has_image_word():
            word = image_word(token, self.config.text_config.vocab_size)
            kwargs["encoder_input_ids"] = ids.masked_fill(ids == token, word)
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if not self._has_image_word():
            return TextProcessors(processors, token)
        device = kwargs.get("device") or self.device  # self.device is meta while the model is offloaded
        return LogitsProcessorList([SuppressTokensLogitsProcessor([token], device), *processors])

    def _get_stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        return criteria if self._has_image_word() else TextCriteria(criteria, self.config.image_token_index)

    def _get_candidate_generator(
        self,
        generation_config,
        input_ids,
        inputs_tensor,
        logits_processor,
        model_kwargs,
        assistant_model=None,
        **more,
    ) -> CandidateGenerator:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit must be None, because transformers cuts layers only of models that "
                f"consist of a decoder, got {generation_config.assistant_early_exit}"
            )
        token = self.config.image_token_index
        takes_pictures = assistant_model is None or (
            isinstance(assistant_model, CumoGenerationMixin)
            and assistant_model.config.image_token_index == token
            and assistant_model.config.picture_layout == self.config.picture_layout
            and None in (more.get("target_tokenizer"), more.get("assistant_tokenizer"))
        )
        if not takes_pictures:
            model_kwargs = {key: value for key, value in model_kwargs.items() if key not in PICTURES}
        if not (takes_pictures and (assistant_model is not None or self._has_image_word())):
            input_ids, takes_pictures = text_ids(input_ids, token), False
        found = super()._get_candidate_generator(
            generation_config=generation_config,
            input_ids=input_ids,
            inputs_tensor=inputs_tensor,
            logits_processor=logits_processor,
            model_kwargs=model_kwargs,
            assistant_model=assistant_model,
            **more,
        )
        return TextCandidates(found, token, takes_pictures)

    def heal_tokens(self, input_ids: Tensor, tokenizer=None) -> Tensor:
        if (input_ids == self.config.image_token_index).any():
            raise ValueError(
                "token_healing must be False for prompts with pictures, whose tokens it removes, got True"
            )
        return super().heal_tokens(input_ids, tokenizer)

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # generate looks for arguments in the signature
    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, is_first_iteration=False, **kwargs
    ) -> dict:
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        embeds = inputs.get("inputs_embeds")
        if embeds is None or self._has_image_word() or as_tiles(inputs.get("pixel_values")) is None:
            return inputs
        if input_ids is not None and input_ids.shape[1] >= embeds.shape[1]:  # they mark the pictures
            inputs["input_ids"] = input_ids[:, -embeds.shape[1] :]
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """As in transformers, with pictures also for an assistant and in chunks.

        transformers says that no call of an assistant is the first, so its pictures would be dropped.
        """
        cache, size = given_cache(model_kwargs), generation_config.prefill_chunk_size
        first = is_first_iteration or cache is None or cache.get_seq_length() == 0
        if size is not None:
            pictures = {key: model_kwargs.get(key) for key in PICTURES} if first else {}
            has_pictures = as_tiles(pictures.get("pixel_values")) is not None
            if cache is None and has_pictures:
                raise ValueError("prefill_chunk_size must be None without a cache")
            # transformers' chunks begin at the first token, whatever the cache holds
            begin = 0 if cache is None else int(cache.get_seq_length())
            if has_pictures or begin:
                return self._prefill_chunks(input_ids, size, begin, pictures, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=first)

    def _prefill_chunks(self, input_ids: Tensor, size: int, begin: int, pictures: dict, model_kwargs: dict):
        """Embed the prompt with its pictures, then run the decoder on chunks of `size` tokens.

        The first `begin` tokens are in the cache.
        """
        rest = {key: value for key, value in model_kwargs.items() if key not in (*PICTURES, "inputs_embeds")}
        mask, positions = rest.pop("attention_mask", None), rest.pop("position_ids", None)
        embeds = model_kwargs.get("inputs_embeds")
        if begin and (mask is None or input_ids.shape[1] == mask.shape[1]):
            input_ids = input_ids[:, begin:]
        embeds = self.model.embed(input_ids, embeds if embeds is None else embeds[:, begin:], **pictures)
        length, outputs = embeds.shape[1], None
        for start in range(0, length, size):
            stop = min(start + size, length)
            chunk = dict(rest)
            if mask is not None:
                chunk["attention_mask"] = mask[:, : begin + stop]
            if positions is not None:
                offset = positions.shape[-1] - length
                chunk["position_ids"] = positions[..., offset + start : offset + stop]
            inputs = self.prepare_inputs_for_generation(
                input_ids, inputs_embeds=embeds[:, start:stop], is_first_iteration=True, **chunk
            )
            outputs = self(**inputs, return_dict=True)
        return outputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs,
    ):
        """Repeat each row for beams or samples, together with all pictures of the row, in order."""
        images = {key: value for key in PICTURES if (value := kwargs.pop(key, None)) is not None}
        pixels = as_tiles(images.get("pixel_values"))
        if expand_size > 1 and pixels is not None:
            layout = self.config.picture_layout
            sizes = picture_sizes(len(pixels), images.get("image_sizes"))
            is_image = self.model.is_image(input_ids, kwargs.get("inputs_embeds"))
            cache = given_cache(kwargs)
            cached = 0 if cache is None else int(cache.get_seq_length())
            if cached < is_image.shape[1]:  # pictures in the cache are not given again
                is_image = is_image[:, cached:]
            tokens = is_image.sum(1)
            lengths = images.get("image_lengths", tokens.new_tensor([layout.tokens(size) for size in sizes]))
            counts = pictures_per_row(tokens, lengths.to(tokens.device))
            tiles = torch.tensor([layout.tiles(size) for size in sizes]).split(counts)
            images["pixel_values"] = pixels
            for key, value in images.items():
                parts = [int(part.sum()) for part in tiles] if key == "pixel_values" else counts
                rows = value.split(parts)
                images[key] = torch.cat([row for row in rows for _ in range(expand_size)])
        expanded, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return expanded, kwargs | images
