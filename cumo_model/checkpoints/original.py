"""The layout of the released SHI-Labs/CuMo checkpoints, as `from_pretrained` reads it."""

import os
from pathlib import Path

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.auto import AutoConfig
from transformers.utils import logging

from cumo_model.checkpoints.layout import LOADING_RULES, original_layout
from cumo_model.checkpoints.original_config import TEXT_TYPE, from_original
from cumo_model.checkpoints.shards import Shards, check_tensors
from cumo_model.model.config import CumoConfig
from cumo_model.model.layouts import LAYOUTS
from cumo_model.processing.processor import has_tokenizer, load_tokenizer
from cumo_model.processing.templates import IMAGE_MARKER

logger = logging.get_logger(__name__)

# While a checkpoint in the original layout is read, the model's class is one of this name, derived from the
# class asked for: transformers finds its rules by class name.
LOADER = "OriginalCumoLoader"


class OriginalLayout:
    model_types = tuple(TEXT_TYPE)

    config_values = staticmethod(from_original)

    def is_loader(self, cls: type) -> bool:
        return cls.__name__ == LOADER

    def load(self, cls: type, path: str | os.PathLike, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: the folder lacks tensors, or holds others, or a harmful pickle.
        """
        folder = Path(path, kwargs.get("subfolder", ""))
        if folder.is_dir():  # of a hub's files transformers names what is missing, after loading
            wanted = original_layout(CumoConfig.from_pretrained(folder))
            check_tensors(Shards(folder).shapes, wanted, str(folder))
        wants_info = kwargs.pop("output_loading_info", False)
        loader = type(LOADER, (cls,), {"__module__": cls.__module__})
        model, info = loader.from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model.__class__ = cls
        model.config.image_token_index = _image_token(folder, model.config.image_token_index)
        model._weight_conversions = None  # from here on it is saved in our layout
        return (model, info) if wants_info else model


def _image_token(folder: Path, default: int) -> int:
    """Id of `<image>` in a folder's tokenizer, which may have one or be of another size than the vocabulary;
    `default` without a tokenizer, or with one that cannot be read."""
    if not has_tokenizer(folder):
        return default
    try:
        return load_tokenizer(folder).convert_tokens_to_ids(IMAGE_MARKER)
    except Exception as error:  # whatever a tokenizer's files make its loader raise, the weights are whole
        logger.warning(
            f"{folder}: image tokens are taken to be {default}, its tokenizer is damaged ({error})"
        )
        return default


def _register_config(model_type: str) -> None:
    """AutoConfig on a checkpoint in the original layout gives a CumoConfig."""

    class OriginalConfig(CumoConfig):
        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            values = from_original(config_dict, kwargs.get("name_or_path"))
            return CumoConfig.from_dict({"model_type": CumoConfig.model_type, **values}, **kwargs)

    OriginalConfig.model_type = model_type
    AutoConfig.register(model_type, OriginalConfig)


LAYOUTS.append(OriginalLayout())
register_checkpoint_conversion_mapping(LOADER, LOADING_RULES, overwrite=True)
for _model_type in TEXT_TYPE:
    _register_config(_model_type)
