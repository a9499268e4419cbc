"""Support of `from_pretrained` for the layout of the released SHI-Labs/CuMo checkpoints."""

import os
from pathlib import Path

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.auto import AutoConfig

from cumo_model.checkpoints.layout import LOADING_RULES, original_layout
from cumo_model.checkpoints.original_config import TEXT_TYPE, from_original
from cumo_model.checkpoints.processors import read_image_token
from cumo_model.checkpoints.shards import Shards, check_tensors
from cumo_model.model.config import CumoConfig
from cumo_model.model.layouts import LAYOUTS, TOKEN_READERS

# transformers finds loading rules by class name. While a released checkpoint is loaded, the model has a
# subclass of the requested class with this name.
LOADER = "OriginalCumoLoader"


class OriginalLayout:
    """The released layout, for `cumo_model.model.layouts`."""

    model_types = tuple(TEXT_TYPE)

    config_values = staticmethod(from_original)

    def is_loader(self, cls: type) -> bool:
        """Whether `cls` is a subclass made by `load`."""
        return cls.__name__ == LOADER

    def load(self, cls: type, path: str | os.PathLike, *args, **kwargs):
        """Load a checkpoint in the released layout; arguments as in transformers.

        Raises:
            ValueError: tensors are missing, unexpected or of another shape, or a file contains more than
                tensors.
        """
        folder = Path(path, kwargs.get("subfolder", ""))
        if folder.is_dir():  # for files of the hub, transformers reports missing tensors
            wanted = original_layout(CumoConfig.from_pretrained(folder))
            check_tensors(Shards(folder).shapes, wanted, str(folder))
        wants_info = kwargs.pop("output_loading_info", False)
        loader = type(LOADER, (cls,), {"__module__": cls.__module__})
        model, info = loader.from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model.__class__ = cls
        model._weight_conversions = None  # so that the model is saved in this project's layout
        return (model, info) if wants_info else model


def _register_config(model_type: str) -> None:
    """Make AutoConfig return a CumoConfig for a checkpoint in the released layout."""

    class OriginalConfig(CumoConfig):
        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            values = from_original(config_dict, kwargs.get("name_or_path"))
            return CumoConfig.from_dict({"model_type": CumoConfig.model_type, **values}, **kwargs)

    OriginalConfig.model_type = model_type
    AutoConfig.register(model_type, OriginalConfig)


LAYOUTS.append(OriginalLayout())
TOKEN_READERS.append(read_image_token)
register_checkpoint_conversion_mapping(LOADER, LOADING_RULES, overwrite=True)
for _model_type in TEXT_TYPE:
    _register_config(_model_type)
