"""Conversion of pictures and prompts to tensors: image processor, tokenizer, conversation templates."""

from typing import TYPE_CHECKING

from cumo_model.names import attributes

if TYPE_CHECKING:
    from cumo_model.processing.image_processor import CumoImageProcessor
    from cumo_model.processing.pictures import load_image
    from cumo_model.processing.processor import (
        CumoProcessor,
        build_processor,
        image_seq_length,
        load_tokenizer,
        processor_for,
        processor_from,
    )

_MODULES = {
    "cumo_model.processing.image_processor": "CumoImageProcessor",
    "cumo_model.processing.pictures": "load_image",
    "cumo_model.processing.processor": "CumoProcessor build_processor image_seq_length load_tokenizer "
    "processor_for processor_from",
}
__getattr__, __dir__ = attributes(__name__, _MODULES)

__all__ = [
    "CumoImageProcessor",
    "CumoProcessor",
    "build_processor",
    "image_seq_length",
    "load_image",
    "load_tokenizer",
    "processor_for",
    "processor_from",
]
