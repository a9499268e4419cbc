"""The processor: tokenizer and image processor, with the chat templates and settings of CuMo."""

import os
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.utils.chat_template_utils import render_jinja_template

from cumo_model.model.config import CumoConfig, check_pinpoints
from cumo_model.model.image_tokens import MERGES, PictureLayout
from cumo_model.model.layouts import layout_of, read_config
from cumo_model.model.remote import RemoteCodeMixin, is_remote, opening_anywhere
from cumo_model.processing.conversation import (
    IMAGE_MARKER,
    answer_mask,
    chat_template,
    check_pieces,
    template_of,
)
from cumo_model.processing.image_processor import ASPECT_RATIOS, CumoImageProcessor
from cumo_model.processing.messages import check_messages, in_brief
from cumo_model.processing.pictures import load_image  # noqa: F401 - its place until 0.2
from cumo_model.processing.sentencepieces import like_sentencepiece, pieces_alike
from cumo_model.processing.templates import TEMPLATES, get_template

DEFAULT_TEMPLATE = "mistral_instruct_system"
OWN_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")  # that load_tokenizer sets by name


class CumoProcessor(RemoteCodeMixin, LlavaProcessor):
    """Tokenizer and CumoImageProcessor; each `<image>` becomes the placeholders of all tiles of its picture.

    `patch_merge_type` must be that of the model, see `CumoConfig` and cumo_model/model/image_tokens.py.
    """

    remote_classes = {"AutoProcessor": "CumoProcessor"}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token=IMAGE_MARKER,
        num_additional_image_tokens=0,
        patch_merge_type="flat",
        **kwargs,
    ):
        self.patch_merge_type = patch_merge_type
        super().__init__(
            image_processor,
            tokenizer,
            patch_size,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            num_additional_image_tokens,
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers. For a checkpoint that has only a tokenizer, `processor_from` is used."""
        path = pretrained_model_name_or_path
        values = read_config(path)
        is_cumo = values.get("model_type") == CumoConfig.model_type or layout_of(values) is not None
        if is_cumo and not Path(path, "processor_config.json").is_file():
            return processor_from(path, CumoConfig.from_pretrained(path))
        return super().from_pretrained(path, *args, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """As in transformers; an `auto_map` is kept, so that it is saved again."""
        found = super().from_args_and_dict(args, processor_dict, **kwargs)
        if auto_map := processor_dict.get("auto_map"):
            (found[0] if isinstance(found, tuple) else found).auto_map = auto_map
        return found

    def save_pretrained(self, save_directory, *args, remote_code: bool | None = None, **kwargs):
        """Save as transformers does; `remote_code` as in `MoEHostMixin.save_pretrained`."""
        wanted = is_remote(self) if remote_code is None else remote_code
        with opening_anywhere(self.image_processor, wanted):
            return super().save_pretrained(save_directory, *args, remote_code=wanted, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """The names of all tensors that a call returns with the settings of this processor."""
        names = super().model_input_names
        return names if self._has_sizes() else [name for name in names if name != "image_sizes"]

    def _has_sizes(self, **kwargs) -> bool:
        """Whether the model needs image_sizes; else it takes tile after tile."""
        return self.patch_merge_type != "flat" and self.is_tiled(**kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """Convert pictures and text to tensors, as in transformers.

        A text that starts with the BOS tokens of the chat template, as `apply_chat_template` writes it, gets
        no further BOS, unless `add_special_tokens` is given.

        Args:
            images: pictures as `pictures.read_picture` reads them: one, a list in the order of markers, or
                a list of lists, one for each row of `text`.
            text: one text or several, with `<image>` for each picture.
            **kwargs: as in transformers.

        Raises:
            ValueError: a picture cannot be read, pictures and markers do not match, or videos or audio are
                given.
        """
        for name in ("videos", "audio"):
            if (value := kwargs.pop(name, None)) is not None:
                raise ValueError(f"{name} must be None, the model takes pictures only, got {in_brief(value)}")
        if isinstance(text, list | tuple) and not text:
            raise ValueError("text must be a text or a list with at least one, got an empty list")
        asked = "add_special_tokens" in {**kwargs, **(kwargs.get("text_kwargs") or {})}
        if text is not None and not asked and self.tokenizer.bos_token:
            rows = [text] if isinstance(text, str) else list(text)
            has_bos = [isinstance(row, str) and self._has_bos(row) for row in rows]
            if any(has_bos) and all(isinstance(row, str) for row in rows):
                # the others get as text what the tokenizer would add to them
                ids = self.tokenizer("")["input_ids"]
                start = int(ids[:1] == [self.tokenizer.bos_token_id])
                before, after = (
                    "".join(self.tokenizer.convert_ids_to_tokens(part)) for part in (ids[:start], ids[start:])
                )
                text = [row if has else before + row + after for row, has in zip(rows, has_bos, strict=True)]
                kwargs["add_special_tokens"] = False
        return super().__call__(images=images, text=text, **kwargs)

    def _has_bos(self, text: str) -> bool:
        """Whether a text starts with the tokenizer's BOS, and not only with one that the template writes."""
        bos, name = self.tokenizer.bos_token, template_of(self.chat_template_for(), tuple(TEMPLATES))
        opening = "" if name is None else get_template(name).opening.replace("<s>", bos)
        return text.startswith(bos) and not (opening.startswith(bos) and text.startswith(opening))

    def chat_template_for(self, asked: str | None = None) -> str | None:
        """The chat template for `asked`, a template or the name of one; None: the default."""
        chat = self.chat_template
        return chat.get(asked or "default", asked) if isinstance(chat, dict) else asked or chat

    def prepare_inputs_layout(self, images=None, text=None, *args, **kwargs):
        """As in transformers; an empty list of pictures, nested or not, is no picture."""
        nested = [isinstance(row, list | tuple) for row in images] if isinstance(images, list | tuple) else []
        if any(nested) and not all(nested):
            raise ValueError("images must be pictures, or a list of pictures for each row of text, got both")
        return super().prepare_inputs_layout(images if _any_picture(images) else None, text, *args, **kwargs)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in transformers; `return_assistant_tokens_mask=True` gives exact masks.

        A message with parts that the model does not take, such as a video, is a ValueError.

        With `tokenize` and `return_dict` it adds assistant_masks: 1 for each token of the answers, end marks
        included, and 0 elsewhere. These are the tokens that have labels in training. (In transformers, the
        positions of the answers are those before the placeholders of the pictures are inserted.)
        """
        given = (
            signature(LlavaProcessor.apply_chat_template).bind(self, conversation, *args, **kwargs).arguments
        )
        more = given.pop("kwargs", {})
        del given["self"]
        chat = self.chat_template_for(given.get("chat_template")) or ""
        check_messages(given["conversation"], needs_pictures=bool(given.get("tokenize")), chat_template=chat)
        for name in ("tools", "documents"):
            if given.get(name) and name not in chat:
                raise ValueError(
                    f"{name} must be None, the chat template does not use them, got {len(given[name])}"
                )
        with_mask = all(
            given.get(name) for name in ("return_assistant_tokens_mask", "tokenize", "return_dict")
        )
        if not with_mask or given.get("continue_final_message"):  # transformers refuses both together
            return super().apply_chat_template(**given, **more)
        del given["return_assistant_tokens_mask"]
        wanted = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        given["processor_kwargs"] = {**(given.get("processor_kwargs") or {}), **wanted}
        if more:  # they may be options of the processor too, and then transformers ignores processor_kwargs
            more |= given["processor_kwargs"]
        out = super().apply_chat_template(**given, **more)
        offsets, moved = out.pop("offset_mapping"), out.pop("text_replacement_offsets")
        masks = [
            answer_mask([tuple(map(int, pair)) for pair in row], _spans_after(spans, pictures))
            for row, spans, pictures in zip(offsets, self._answers(given, more), moved, strict=True)
        ]
        if "attention_mask" in out:  # padding has no place in the text
            masks = [
                [int(m and a) for m, a in zip(mask, row, strict=True)]
                for mask, row in zip(masks, out["attention_mask"], strict=True)
            ]
        out["assistant_masks"] = masks
        return out.convert_to_tensors(tensor_type=given.get("return_tensors"))

    def _answers(self, given: dict, more: dict) -> list[list[tuple[int, int]]]:
        """The spans of the answers in the text of each conversation."""
        talks = given["conversation"]
        is_batch = isinstance(talks[0], list | tuple) or hasattr(talks[0], "content")
        options = {
            name: given[name] for name in ("tools", "documents", "add_generation_prompt") if name in given
        }
        return render_jinja_template(
            conversations=talks if is_batch else [talks],
            chat_template=self.chat_template_for(given.get("chat_template")),
            return_assistant_tokens_mask=True,
            **options,
            **{**self.tokenizer.special_tokens_map, **more},
        )[1]

    def validate_inputs(self, images=None, text=None, *args, **kwargs):
        """As in transformers; the number of pictures must also be the number of image markers in `text`.

        If the pictures are given in rows, this must be so in each row.
        """
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            markers = [part.count(self.image_token) for part in texts]
            pictures = 0 if images is None else len(make_flat_list_of_images(images))
            if sum(markers) != pictures:
                raise ValueError(
                    f"images must have one picture for each of the {sum(markers)} {self.image_token} "
                    f"in text, got {pictures}"
                )
            if isinstance(images, list | tuple) and any(isinstance(row, list | tuple) for row in images):
                rows = [len(make_flat_list_of_images(row)) if row else 0 for row in images]
                if rows != markers:
                    raise ValueError(
                        f"images must have {markers} pictures in the rows, as text has {self.image_token}, "
                        f"got {rows}"
                    )
        super().validate_inputs(images, text, *args, **kwargs)

    def picture_layout(self, image_grid_pinpoints: list | None = None) -> PictureLayout:
        """The number and order of tiles and tokens of a picture, as in the model."""
        side = self.image_processor.crop_size["height"]
        pinpoints = image_grid_pinpoints or self.image_processor.image_grid_pinpoints
        tokens = _tile_tokens(self)
        return PictureLayout(side, side // self.patch_size, tokens, self.patch_merge_type, pinpoints)

    def is_tiled(self, image_aspect_ratio: str | None = None, **kwargs) -> bool:
        """Whether pictures are cut into tiles. The default is the aspect ratio of the image processor."""
        return (image_aspect_ratio or self.image_processor.image_aspect_ratio) == "anyres"

    def replace_image_token(
        self, image_inputs: dict, image_idx: int, image_grid_pinpoints=None, **kwargs
    ) -> str:
        """The placeholders of one picture."""
        size = tuple(map(int, image_inputs["image_sizes"][image_idx])) if self.is_tiled(**kwargs) else None
        return self.image_token * self.picture_layout(image_grid_pinpoints).tokens(size)

    def _process_images(self, images, **kwargs) -> tuple[BatchFeature, list[str]]:
        processed, replacements = super()._process_images(images, **kwargs)
        if not self._has_sizes(**kwargs):
            processed.pop("image_sizes")
        return processed, replacements

    def _get_num_multimodal_tokens(self, image_sizes=None, image_grid_pinpoints=None, **kwargs):
        """Number of tokens and tiles of pictures with these (height, width); called by transformers."""
        found = super()._get_num_multimodal_tokens(image_sizes)
        if image_sizes is not None:
            layout, is_tiled = self.picture_layout(image_grid_pinpoints), self.is_tiled(**kwargs)
            sizes = [tuple(size) if is_tiled else None for size in image_sizes]
            found.num_image_tokens = [layout.tokens(size) for size in sizes]
            found.num_image_patches = [layout.tiles(size) for size in sizes]
        return found


def _any_picture(images) -> bool:
    if isinstance(images, list | tuple):
        return any(map(_any_picture, images))
    return images is not None


def _spans_after(spans: list[tuple[int, int]], replaced: list[dict]) -> list[tuple[int, int]]:
    """Move spans of a text by the lengths of the replacements before them."""

    def after(place: int) -> int:
        return place + sum(
            len(part["replacement"]) - len(part["text"]) for part in replaced if part["span"][1] <= place
        )

    return [(after(start), after(end)) for start, end in spans]


AutoProcessor.register(CumoConfig, CumoProcessor)


def build_processor(
    tokenizer: PreTrainedTokenizerFast,
    image_size: int,
    patch_size: int,
    vision_feature_select_strategy: str = "default",
    template: str = "mistral_instruct",
    image_aspect_ratio: str = "pad",
    patch_merge_type: str = "flat",
    **options: Any,
) -> CumoProcessor:
    """Build the processor for a vision tower of the given sizes.

    Args:
        tokenizer: a fast tokenizer with `<image>` as one token.
        image_size: side of the tower's input in pixels.
        patch_size: side of a patch in pixels.
        vision_feature_select_strategy: "default" drops the tower's class token, "full" keeps it.
        template: a name of templates.TEMPLATES, for `apply_chat_template`.
        image_aspect_ratio: "pad", "square" or "anyres", see CumoImageProcessor.
        patch_merge_type: that of the model, see CumoConfig.
        **options: `image_grid_pinpoints` for "anyres": [[height, width], ...], multiples of image_size.

    Returns:
        A processor that supports `save_pretrained` and `AutoProcessor.from_pretrained`.

    Raises:
        ValueError: an argument has an unknown value, the sizes do not fit each other, or `tokenizer` gives a
            text after `<image>` other ids than the text alone.
    """
    if image_size <= 0 or patch_size <= 0 or image_size % patch_size:
        raise ValueError(
            f"image_size must be a positive multiple of patch_size, got {image_size} and {patch_size}"
        )
    if vision_feature_select_strategy not in ("default", "full"):
        raise ValueError(
            f"vision_feature_select_strategy must be default or full, got {vision_feature_select_strategy!r}"
        )
    if image_aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"image_aspect_ratio must be one of {ASPECT_RATIOS}, got {image_aspect_ratio!r}")
    if patch_merge_type not in MERGES:
        raise ValueError(f"patch_merge_type must be one of {MERGES}, got {patch_merge_type!r}")
    check_pinpoints(options.get("image_grid_pinpoints"), image_size)
    check_pieces(tokenizer)
    images = CumoImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_aspect_ratio=image_aspect_ratio,
        **options,
    )
    return CumoProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the tower's class token
        chat_template=chat_template(template),
        patch_merge_type=patch_merge_type,
    )


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder, with padding on the right; `<image>` is added after its vocabulary."""
    found = AutoTokenizer.from_pretrained(folder, use_fast=True)
    backend, model = found.backend_tokenizer, Path(folder, "tokenizer.model")
    if model.is_file() and not Path(folder, "tokenizer.json").is_file():
        backend = like_sentencepiece(backend, model)
    backend = pieces_alike(backend, IMAGE_MARKER)
    # LlamaTokenizer of transformers does not save that text after a special token begins with a space;
    # PreTrainedTokenizerFast saves the tokenizer unchanged
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=found.bos_token,
        eos_token=found.eos_token,
        unk_token=found.unk_token,
        pad_token=found.pad_token or found.unk_token or found.eos_token,
        padding_side="right",
        extra_special_tokens=found.extra_special_tokens,
        model_specific_special_tokens={
            k: v for k, v in found.special_tokens_map.items() if k not in OWN_TOKENS
        },
        model_max_length=found.model_max_length,
        chat_template=found.chat_template,
    )
    if tokenizer.convert_tokens_to_ids(IMAGE_MARKER) in (None, tokenizer.unk_token_id):
        more = {"extra_special_tokens": [IMAGE_MARKER]}
        tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)
    return tokenizer


def processor_from(
    folder: str | os.PathLike, config: CumoConfig, template: str | None = None
) -> CumoProcessor:
    """Build the processor of a model from the tokenizer files of a folder.

    The folder may be that of a language model, or of a checkpoint in the released layout. `<image>` is added
    as a token after the vocabulary.

    Args:
        folder: contains tokenizer.json or tokenizer.model.
        config: configuration of the model; gives the sizes and the treatment of pictures.
        template: name of a chat template; by default that of the tokenizer if it writes pictures, otherwise
            that of the later stages of CuMo, because it is that of a language model.
    """
    tokenizer = load_tokenizer(folder)
    processor, chat = processor_for(config, tokenizer, template or DEFAULT_TEMPLATE), tokenizer.chat_template
    if template is None and "image" in str(chat):
        processor.chat_template = chat
    pictures = Path(folder, "preprocessor_config.json")
    if pictures.is_file() and CumoImageProcessor.__name__ in pictures.read_text():  # not that of a CLIP
        processor.image_processor = CumoImageProcessor.from_pretrained(folder)
    return processor


def aspect_of(config: CumoConfig) -> str:
    """The treatment of pictures that a config asks for, one of ASPECT_RATIOS."""
    if config.image_grid_pinpoints is not None:
        return "anyres"
    ratio = (config.original or {}).get("image_aspect_ratio", "pad")
    return ratio if ratio in ASPECT_RATIOS else "square"  # for any other value the original code crops


def processor_for(config: CumoConfig, tokenizer, template: str = DEFAULT_TEMPLATE) -> CumoProcessor:
    """Build the processor of a model with this configuration, tokenizer and chat template."""
    vision, pinpoints, ratio = config.vision_config, config.image_grid_pinpoints, aspect_of(config)
    if pinpoints is None and ratio == "anyres":
        raise ValueError(
            "image_grid_pinpoints must be in config.json with image_aspect_ratio anyres, got none"
        )
    return build_processor(
        tokenizer,
        vision.image_size,
        vision.patch_size,
        config.vision_feature_select_strategy,
        template,
        ratio,
        config.patch_merge_type,
        **({} if pinpoints is None else {"image_grid_pinpoints": pinpoints}),
    )


def image_seq_length(processor: LlavaProcessor) -> int:
    """Number of image tokens per picture.

    Raises:
        ValueError: with anyres the number depends on the size of the picture. Training data use one tile per
            picture.
    """
    if not isinstance(processor, CumoProcessor):
        return _tile_tokens(processor)
    if processor.is_tiled():
        raise ValueError(
            "image_aspect_ratio must be pad or square where all pictures need the same number of tokens, as "
            "in training data, got 'anyres'"
        )
    return processor.picture_layout().tokens(None)


def _tile_tokens(processor: LlavaProcessor) -> int:
    side = processor.image_processor.crop_size["height"] // processor.patch_size
    dropped = processor.vision_feature_select_strategy == "default"
    return side * side + processor.num_additional_image_tokens - dropped
