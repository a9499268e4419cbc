"""LLaVA-format conversations with pictures: check, tokenise once, decode each picture once, batch.

    [{"id": ..., "image": "path under image_root", "conversations": [{"from": "human", "value":
    "<image>\\n..."}, {"from": "gpt", ...}]}]

`check` yields what is wrong with a file; ConversationDataset refuses a file with a problem before anything is
trained on it.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cumo_model.conversation import (
    IGNORE_INDEX,
    IMAGE_MARKER,
    RESERVED,
    get_template,
    render,
    tokenize_conversations,
    turn_problem,
)
from cumo_model.processing import image_seq_length, load_image


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a conversation file."""

    file: str
    record: int | None  # position in the list from 0; None: the file itself
    id: Any
    reason: str
    fatal: bool = True  # False: the record loads, but none of its labels are trained on

    def __str__(self) -> str:
        if self.record is None:
            return f"{self.file}: {self.reason}"
        name = f" (id {self.id!r})" if self.id is not None else ""
        return f"{self.file}: record {self.record}{name}: {self.reason}"


def check(
    json_path: str | os.PathLike, image_root: str | os.PathLike | None = None, decode: bool = False
) -> Iterator[Problem]:
    """Yield every problem of a conversation file, in order; nothing when it is fine.

    Args:
        json_path: the file.
        image_root: folder its image paths are relative to; None leaves the pictures unchecked.
        decode: decode each picture too, which finds cut-off and foreign files.
    """
    path = os.fspath(json_path)
    try:
        records = _read(path)
    except ValueError as error:
        yield Problem(path, None, None, str(error).removeprefix(f"{path}: "))
        return
    yield from _check_records(records, path, image_root, decode)


def _read(path: str) -> list:
    try:
        records = json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: the file does not exist") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply to be a list of conversations") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: must hold a list of records, got {type(records).__name__}")
    if not records:
        raise ValueError(f"{path}: holds no records")
    return records


def _check_records(
    records: list, path: str, image_root: str | os.PathLike | None, decode: bool
) -> Iterator[Problem]:
    pictures: dict[str, str | None] = {}
    for number, record in enumerate(records):
        name = record.get("id") if isinstance(record, dict) else None
        reason = _record_problem(record)
        if reason is None and image_root is not None and "image" in record:
            image = record["image"]
            if image not in pictures:
                pictures[image] = _image_problem(image, image_root, decode)
            reason = pictures[image]
        if reason is not None:
            yield Problem(path, number, name, reason)
            continue
        for order, turn in enumerate(record["conversations"], 1):
            mark = next((mark for mark in RESERVED if mark in turn["value"]), None)
            if mark:
                yield Problem(
                    path,
                    number,
                    name,
                    f"turn {order} holds {mark}, which the templates use: no label is trained on",
                    fatal=False,
                )
                break


def _record_problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return f"must be an object with conversations, got {type(record).__name__}"
    if "conversations" not in record:
        return "has no conversations"
    problem = turn_problem(record["conversations"])
    if problem:
        return problem
    if len(record["conversations"]) % 2:
        return "the last question has no answer"
    if "image" in record and (not isinstance(record["image"], str) or not record["image"]):
        return f"image must be a file name, got {record['image']!r}"
    markers = sum(turn["value"].count(IMAGE_MARKER) for turn in record["conversations"])
    images = int("image" in record)
    if markers > images:
        return f"{markers} {IMAGE_MARKER} markers but {images} images"
    if markers < images:
        return f"names the image {record['image']!r} but no turn holds {IMAGE_MARKER}"
    return None


def _image_problem(image: str, image_root: str | os.PathLike, decode: bool) -> str | None:
    if os.path.isabs(image) or ".." in Path(image).parts:
        return f"image {image!r} must lie under image_root {os.fspath(image_root)!r}"
    path = os.path.join(image_root, image)
    if not os.path.isfile(path):
        return f"image {image!r} does not exist under {os.fspath(image_root)!r}"
    if decode:
        try:
            load_image(path)
        except ValueError as error:
            return str(error)
    return None


class ConversationDataset(Dataset):
    """Conversations as token ids, labels and normalised pixels.

    Text is tokenised once, here; a picture is decoded at its first use and then kept as uint8.
    """

    def __init__(
        self,
        json_path: str | os.PathLike,
        image_root: str | os.PathLike,
        processor,
        template: str = "mistral_instruct",
        max_length: int | None = None,
    ):
        """
        Args:
            json_path: LLaVA-format file.
            image_root: folder its image paths are relative to.
            processor: from `build_processor`.
            template: a name of conversation.TEMPLATES.
            max_length: ids and labels are cut here; None leaves them whole.

        Raises:
            ValueError: the file, a record or a picture's path is not usable; the message names the file, the
                record and the reason.
        """
        get_template(template)
        path = os.fspath(json_path)
        records = _read(path)
        problems = list(_check_records(records, path, image_root, decode=False))
        fatal = [problem for problem in problems if problem.fatal]
        if fatal:
            more = f" (and {len(fatal) - 1} more problems)" if len(fatal) > 1 else ""
            raise ValueError(f"{fatal[0]}{more}")
        if problems:
            warnings.warn(f"{problems[0]} ({len(problems)} such records)", stacklevel=2)

        self.records: list[dict] = records
        self.image_root = os.fspath(image_root)
        self.image_processor = processor.image_processor
        self.pad_id: int = processor.tokenizer.pad_token_id or 0
        self.samples = self._tokenize(path, processor, template, max_length)
        self._pixels: dict[str, Tensor] = {}
        mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        # (pixel / 255 - mean) / std as one multiply and one add
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def _tokenize(
        self, path: str, processor, template: str, max_length: int | None
    ) -> list[tuple[Tensor, Tensor]]:
        tokens = image_seq_length(processor)
        conversations = [record["conversations"] for record in self.records]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reserved markers were named above
            try:
                samples = tokenize_conversations(conversations, processor.tokenizer, template, tokens)
            except ValueError as error:
                raise ValueError(f"{path}: {self._culprit(template)}{error}") from None
        if max_length is None:
            return samples
        image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
        for number, (ids, _) in enumerate(samples):
            if (ids[max_length:] == image_id).any():
                raise ValueError(
                    f"{path}: record {number} (id {self.records[number].get('id')!r}): "
                    f"max_length {max_length} cuts through the {tokens} tokens of its image"
                )
        return [(ids[:max_length], labels[:max_length]) for ids, labels in samples]

    def _culprit(self, template: str) -> str:
        for number, record in enumerate(self.records):
            try:
                render(record["conversations"], template)
            except ValueError:
                return f"record {number} (id {record.get('id')!r}): "
        return ""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor | None]:
        """input_ids (N,) int64, labels (N,) int64, pixel_values (3, s, s) fp32 or None for text alone."""
        ids, labels = self.samples[index]
        pixels = self.pixels(index)
        return {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": None if pixels is None else self.normalise(pixels),
        }

    def pixels(self, index: int) -> Tensor | None:
        """The picture of a record as the tower's input before normalisation, (3, s, s) uint8, from RAM after
        the first time."""
        image = self.records[index].get("image")
        if image is None:
            return None
        if image not in self._pixels:
            try:
                self._pixels[image] = self._decode(os.path.join(self.image_root, image))
            except ValueError as error:
                raise ValueError(f"record {index} (id {self.records[index].get('id')!r}): {error}") from error
        return self._pixels[image]

    def _decode(self, path: str) -> Tensor:
        picture, side = load_image(path), self.image_processor.crop_size["height"]
        if picture.size == (side, side):  # padding, resizing and cropping change nothing
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        done = self.image_processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")[
            "pixel_values"
        ][0]
        return torch.from_numpy(np.ascontiguousarray(done).astype(np.uint8))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, s, s) uint8 -> fp32 as the image processor scales and normalises."""
        return pixels.to(torch.float32).mul_(self._scale).add_(self._shift)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch `collate` makes of these records, with one normalisation for all of its pictures."""
        pictures = [picture for index in indices if (picture := self.pixels(index)) is not None]
        batch = _pad([self.samples[index] for index in indices], self.pad_id)
        if pictures:
            batch["pixel_values"] = self.normalise(torch.stack(pictures))
        return batch


def collate(samples: Sequence[dict[str, Tensor | None]], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right and stack.

    Args:
        samples: B items of a ConversationDataset.
        pad_id: written behind the shorter ones.

    Returns:
        input_ids (B, N) int64, labels (B, N) int64 with -100 behind, attention_mask (B, N) int64 (1 on real
        tokens), and, if any sample has a picture, pixel_values (pictures, 3, s, s) fp32 in the order of their
        markers.
    """
    batch = _pad([(sample["input_ids"], sample["labels"]) for sample in samples], pad_id)
    pictures = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
    if pictures:
        batch["pixel_values"] = torch.stack(pictures)
    return batch


def _pad(samples: Sequence[tuple[Tensor, Tensor]], pad_id: int) -> dict[str, Tensor]:
    if not samples:
        raise ValueError("a batch must hold at least one sample, got none")
    shape = (len(samples), max(len(ids) for ids, _ in samples))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, (ids, targets) in enumerate(samples):
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = targets
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
