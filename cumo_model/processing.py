"""Pictures and prompts to tensors with transformers' stock LLaVA processor, set up as CuMo feeds its
tower."""

import os

from PIL import Image
from transformers import LlavaImageProcessorPil, LlavaProcessor

from cumo_model.conversation import chat_template


def build_processor(
    tokenizer,
    image_size: int,
    patch_size: int,
    vision_feature_select_strategy: str = "default",
    template: str = "mistral_instruct",
) -> LlavaProcessor:
    """A stock LlavaProcessor: pad to a square with the mean colour, resize (bicubic), normalise; one
    `<image>` token per patch.

    Args:
        tokenizer: knows `<image>` as one token.
        image_size: side of the tower's input in pixels.
        patch_size: side of a patch in pixels.
        vision_feature_select_strategy: "default" drops the tower's class token, "full" keeps it.
        template: a name of conversation.TEMPLATES, for `apply_chat_template`.

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
    images = LlavaImageProcessorPil(  # Pillow's bicubic, as CuMo; the torchvision twin resizes differently
        do_pad=True,  # with int(255 * mean), at the floor of half the difference
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the tower's class token
        chat_template=chat_template(template),
    )


def image_seq_length(processor: LlavaProcessor) -> int:
    """Image tokens that stand for one picture."""
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
