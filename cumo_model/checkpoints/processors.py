"""Processors of checkpoints: which one a folder has, its image token for the model, its template by name."""

import copy
import json
import warnings
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils import logging

from cumo_model.checkpoints.folders import first_line, write_json
from cumo_model.model.config import CumoConfig
from cumo_model.model.json_files import read_object
from cumo_model.model.remote import auto_map_of
from cumo_model.processing.conversation import chat_template, template_of
from cumo_model.processing.image_processor import CumoImageProcessor
from cumo_model.processing.processor import CumoProcessor, load_tokenizer, processor_from
from cumo_model.processing.templates import IMAGE_MARKER, TEMPLATES, get_template
from cumo_model.processing.tokenizer_files import has_tokenizer

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
logger = logging.get_logger(__name__)


def read_processor(folder: Path, config: CumoConfig) -> CumoProcessor | None:
    """The processor of a checkpoint's folder; without processor_config.json it is made for its tokenizer.

    Returns:
        The processor; None if the folder has no tokenizer.

    Raises:
        ValueError: its files are damaged.
    """
    if not has_tokenizer(folder):
        return None
    has_processor = (folder / "processor_config.json").is_file()
    for name in PROCESSOR_FILES:  # the loaders do not name a damaged file
        if (folder / name).is_file():
            read_object(folder / name)
    try:
        return AutoProcessor.from_pretrained(folder) if has_processor else processor_from(folder, config)
    except Exception as error:  # damaged files make the loaders raise many kinds of errors
        raise ValueError(f"the processor in {folder} cannot be loaded: {first_line(error)}") from error


def open_anywhere(folder: Path) -> None:
    """Add an `auto_map` to the files of a folder's processor, as `save_pretrained(remote_code=True)` does."""
    images, whole = (part.remote_classes for part in (CumoImageProcessor, CumoProcessor))
    for name in PROCESSOR_FILES[:2]:
        if not (folder / name).is_file():
            continue
        values = read_object(folder / name)
        if isinstance(inner := values.get("image_processor"), dict):
            inner["auto_map"] = auto_map_of(images)
            values["auto_map"] = auto_map_of(whole)
        else:
            values["auto_map"] = auto_map_of(images | whole)
        write_json(folder / name, values)


def read_image_token(folder: Path) -> int | None:
    """Id of the image token in the tokenizer files of a checkpoint, as `read_processor` gives it.

    Returns:
        The id; None if there is no tokenizer. If it is damaged, a warning is logged and None is returned:
        the weights are still valid.
    """
    try:
        if not has_tokenizer(folder):
            return None
        if (folder / "processor_config.json").is_file():
            return AutoProcessor.from_pretrained(folder).image_token_id
        return load_tokenizer(folder).convert_tokens_to_ids(IMAGE_MARKER)
    except Exception as error:
        logger.warning(
            f"{folder}: the tokenizer is damaged ({first_line(error)}), config.json gives the image token"
        )
    return None


def agree(config: CumoConfig, processor: CumoProcessor) -> None:
    """Set the image token of a model's config to that of its processor.

    The tokenizer may have `<image>` already, and the vocabulary may be padded, so the id does not follow from
    config.json. Warns of other tokens that have no embedding.
    """
    config.image_token_index = processor.image_token_id
    words, tokenizer = config.text_config.vocab_size, processor.tokenizer
    if len(tokenizer) > words:
        extra = [t for t, i in tokenizer.get_vocab().items() if i >= words and i != processor.image_token_id]
        if extra:
            warnings.warn(
                f"the tokenizer has {len(extra)} tokens without an embedding in the vocabulary of {words}, "
                f"such as {sorted(extra)[0]!r}: text that contains them cannot be used",
                stacklevel=3,
            )


def with_settings(processor: CumoProcessor, template: str | None, aspect: str | None) -> CumoProcessor:
    """A copy of a processor with another chat template or aspect ratio; None keeps that of the processor."""
    changed = copy.copy(processor)
    if template is not None:
        changed.chat_template = chat_template(template)
    if aspect is not None:
        changed.image_processor = copy.deepcopy(processor.image_processor)
        changed.image_processor.image_aspect_ratio = aspect
    return changed


def template_for(processor: CumoProcessor, name: str | None = None, option: str = "template") -> str:
    """Name of a conversation template: `name` if it is given, otherwise that of the processor.

    Args:
        processor: the processor of a checkpoint.
        name: a name of TEMPLATES, or None.
        option: what the user can set, for messages.

    Raises:
        ValueError: `name` is unknown; or it is None, and the processor has a chat template of its own that is
            none of TEMPLATES.
    """
    if name is not None:
        get_template(name)
        return name
    chat = processor.chat_template_for()
    found = template_of(chat, tuple(TEMPLATES))
    if found is None:
        raise ValueError(
            f"{option} must be given, one of {', '.join(TEMPLATES)}: the checkpoint's chat template "
            f"{'is none of them' if chat else 'is missing'}, got None"
        )
    return found


def same_processor(one: CumoProcessor | None, other: CumoProcessor | None) -> bool:
    """Whether two processors have the same settings, templates and tokenizer."""
    if one is None or other is None:
        return one is other
    return _content(one) == _content(other)


def _content(processor: CumoProcessor) -> str:
    tokenizer = processor.tokenizer
    settings = processor.to_dict()
    settings["image_processor"] = processor.image_processor.to_dict()
    content = {
        "settings": {key: value for key, value in settings.items() if key != "tokenizer"},
        "template": processor.chat_template,
        "tokens": json.loads(tokenizer.backend_tokenizer.to_str()),
        "special": [tokenizer.special_tokens_map, list(map(str, tokenizer.extra_special_tokens))],
        "text": [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length],
    }
    return json.dumps(content, sort_keys=True, default=str)
