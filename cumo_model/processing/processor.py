"""Pictures and prompts to tensors: transformers' LLaVA processor with CuMo's choices."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorKwargs,
    LlavaNextImageProcessorPil,
)

from cumo_model.model.config import CumoConfig, check_pinpoints
from cumo_model.model.image_tokens import MERGES, PictureLayout
from cumo_model.model.layouts import layout_of, read_config
from cumo_model.processing.conversation import IMAGE_MARKER, chat_template
from cumo_model.processing.sentencepieces import like_sentencepiece

ASPECT_RATIOS = ("pad", "square", "anyres")
DEFAULT_TEMPLATE = "mistral_instruct_system"


class CumoImageProcessorKwargs(LlavaNextImageProcessorKwargs, total=False):
    """
    image_aspect_ratio (`str`, *optional*):
        "pad", "square" or "anyres".
    """

    image_aspect_ratio: str


class CumoImageProcessor(LlavaNextImageProcessorPil):
    """Pictures of any sizes -> pixel_values (tiles, 3, s, s); image_sizes, (height, width) of each picture.

    `image_aspect_ratio`: "pad" to a square with the mean colour, as CuMo's later stages; "square" cuts off
    what the shorter side does not fill, as its first; "anyres" gives the whole picture, then the tiles of the
    best of `image_grid_pinpoints`, into which it is fitted on black. Then bicubic (Pillow's, as CuMo), 1/255,
    CLIP's mean and deviation.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = CumoImageProcessorKwargs
    size = {"shortest_edge": 336}
    crop_size = {"height": 336, "width": 336}
    image_aspect_ratio = "pad"

    pad_to_square = LlavaImageProcessorPil.pad_to_square

    def _preprocess(
        self, images: list[np.ndarray], image_aspect_ratio: str, image_grid_pinpoints, do_pad, **kwargs
    ) -> BatchFeature:
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(f"image_aspect_ratio must be one of {ASPECT_RATIOS}, got {image_aspect_ratio!r}")
        side = kwargs["crop_size"].height
        tiles = []
        for image in images:
            cut = [image]
            if image_aspect_ratio == "anyres":
                cut = self.get_image_patches(
                    image, image_grid_pinpoints, (side, side), side, kwargs["resample"]
                )
            tiles += cut
        # int(255 * mean) around the picture, at the floor of half the difference
        out = LlavaImageProcessorPil._preprocess(self, tiles, do_pad=image_aspect_ratio == "pad", **kwargs)
        sizes = [image.shape[-2:] for image in images]
        out.update(BatchFeature({"image_sizes": sizes}, tensor_type=kwargs.get("return_tensors")))
        return out


class CumoProcessor(LlavaProcessor):
    """Tokenizer and CumoImageProcessor in one; an `<image>` becomes the placeholders of all of its tiles.

    `patch_merge_type` is the model's: see merge.py.
    """

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
        """As in transformers; a checkpoint in the original layout has none: `processor_from` makes it."""
        path = pretrained_model_name_or_path
        try:
            layout = layout_of(read_config(path))
        except ValueError:  # a config.json that is damaged: a processor may be whole beside it
            layout = None
        if layout is not None and not Path(path, "processor_config.json").is_file():
            return processor_from(path, CumoConfig.from_pretrained(path))
        return super().from_pretrained(path, *args, **kwargs)

    def validate_inputs(self, images=None, text=None, *args, **kwargs):
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            markers = sum(part.count(self.image_token) for part in texts)
            pictures = 0 if images is None else len(make_flat_list_of_images(images))
            if markers != pictures:
                raise ValueError(
                    f"images must have one picture for each of the {markers} {self.image_token} in text, "
                    f"got {pictures}"
                )
        super().validate_inputs(images, text, *args, **kwargs)

    def picture_layout(self, image_grid_pinpoints: list | None = None) -> PictureLayout:
        """Tiles and tokens of a picture of any size, as the model has them."""
        side = self.image_processor.crop_size["height"]
        pinpoints = image_grid_pinpoints or self.image_processor.image_grid_pinpoints
        tokens = _tile_tokens(self)
        return PictureLayout(side, side // self.patch_size, tokens, self.patch_merge_type, pinpoints)

    def is_tiled(self, image_aspect_ratio: str | None = None, **kwargs) -> bool:
        """Whether pictures are cut into tiles, by the image processor's way or the one given instead."""
        return (image_aspect_ratio or self.image_processor.image_aspect_ratio) == "anyres"

    def replace_image_token(
        self, image_inputs: dict, image_idx: int, image_grid_pinpoints=None, **kwargs
    ) -> str:
        size = tuple(map(int, image_inputs["image_sizes"][image_idx])) if self.is_tiled(**kwargs) else None
        return self.image_token * self.picture_layout(image_grid_pinpoints).tokens(size)

    def _process_images(self, images, **kwargs) -> tuple[BatchFeature, list[str]]:
        processed, replacements = super()._process_images(images, **kwargs)
        if self.patch_merge_type == "flat" or not self.is_tiled(**kwargs):
            processed.pop("image_sizes")  # the model takes tile after tile
        return processed, replacements

    def _get_num_multimodal_tokens(self, image_sizes=None, image_grid_pinpoints=None, **kwargs):
        """transformers' question how many tokens and tiles pictures of these (height, width) have."""
        found = super()._get_num_multimodal_tokens(image_sizes)
        if image_sizes is not None:
            layout, is_tiled = self.picture_layout(image_grid_pinpoints), self.is_tiled(**kwargs)
            sizes = [tuple(size) if is_tiled else None for size in image_sizes]
            found.num_image_tokens = [layout.tokens(size) for size in sizes]
            found.num_image_patches = [layout.tiles(size) for size in sizes]
        return found


AutoImageProcessor.register(CumoConfig, image_processor_classes={"pil": CumoImageProcessor})
AutoProcessor.register(CumoConfig, CumoProcessor)


def build_processor(
    tokenizer,
    image_size: int,
    patch_size: int,
    vision_feature_select_strategy: str = "default",
    template: str = "mistral_instruct",
    image_aspect_ratio: str = "pad",
    patch_merge_type: str = "flat",
    **options: Any,
) -> CumoProcessor:
    """A processor for a tower of these sizes.

    Args:
        tokenizer: knows `<image>` as one token.
        image_size: side of the tower's input in pixels.
        patch_size: side of a patch in pixels.
        vision_feature_select_strategy: "default" drops the tower's class token, "full" keeps it.
        template: a name of templates.TEMPLATES, for `apply_chat_template`.
        image_aspect_ratio: see CumoImageProcessor.
        patch_merge_type: the model's, see CumoConfig.
        options: `image_grid_pinpoints`, for "anyres": [[height, width], ...], multiples of image_size.

    Returns:
        A processor that `save_pretrained` and `AutoProcessor.from_pretrained` know.
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


def has_tokenizer(folder: str | os.PathLike) -> bool:
    return any(Path(folder, name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, padding on the right, with `<image>` as a token behind its vocabulary."""
    found = AutoTokenizer.from_pretrained(folder, use_fast=True)
    backend, model = found.backend_tokenizer, Path(folder, "tokenizer.model")
    if model.is_file() and not Path(folder, "tokenizer.json").is_file():
        backend = like_sentencepiece(backend, model)
    # transformers' LlamaTokenizer forgets in saving that a text after a special token begins with a blank;
    # the plain class keeps the tokenizer as it is
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=found.bos_token,
        eos_token=found.eos_token,
        unk_token=found.unk_token,
        pad_token=found.pad_token or found.unk_token or found.eos_token,
        padding_side="right",
    )
    if tokenizer.convert_tokens_to_ids(IMAGE_MARKER) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_MARKER]})
    return tokenizer


def processor_from(
    folder: str | os.PathLike, config: CumoConfig, template: str = DEFAULT_TEMPLATE
) -> CumoProcessor:
    """The processor of a model, from the tokenizer files of a folder that need not be a processor's: a
    language model's, or a checkpoint's in the original layout. `<image>` is a token behind the vocabulary.

    Args:
        folder: with tokenizer.json or tokenizer.model.
        config: sizes of the model and its way with pictures.
        template: name of a chat template; by default that of CuMo's later stages.
    """
    return processor_for(config, load_tokenizer(folder), template)


def processor_for(config: CumoConfig, tokenizer, template: str = DEFAULT_TEMPLATE) -> CumoProcessor:
    """The processor of a model: its sizes, its way with pictures, and the chat template of that name."""
    vision, pinpoints = config.vision_config, config.image_grid_pinpoints
    ratio = (config.original or {}).get("image_aspect_ratio", "pad")
    if pinpoints is not None:
        ratio = "anyres"
    elif ratio == "anyres":
        raise ValueError(
            "image_grid_pinpoints must be in config.json with image_aspect_ratio anyres, got none"
        )
    elif ratio not in ASPECT_RATIOS:  # whatever else theirs says, it cuts
        ratio = "square"
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
    """Image tokens that stand for one picture.

    Raises:
        ValueError: with anyres that depends on the picture's size; training data have one tile a picture.
    """
    if not isinstance(processor, CumoProcessor):
        return _tile_tokens(processor)
    if processor.is_tiled():
        raise ValueError(
            "image_aspect_ratio must be pad or square where all pictures have as many tokens, as in training "
            "data, got 'anyres'"
        )
    return processor.picture_layout().tokens(None)


def _tile_tokens(processor: LlavaProcessor) -> int:
    side = processor.image_processor.crop_size["height"] // processor.patch_size
    dropped = processor.vision_feature_select_strategy == "default"
    return side * side + processor.num_additional_image_tokens - dropped


def load_image(path: str | os.PathLike) -> Image.Image:
    """Decode a whole picture as RGB.

    Raises:
        ValueError: the file is missing, is not a picture, or is cut off; the message names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {os.fspath(path)!r} does not exist") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"image {os.fspath(path)!r} is not a picture in a format Pillow knows") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {os.fspath(path)!r} cannot be read: {error}") from error
