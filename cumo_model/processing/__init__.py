"""Conversion of pictures and prompts to tensors: image processor, tokenizer, conversation templates."""

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
