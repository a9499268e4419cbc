"""A conversation file in memory: tokenised once, each picture decoded once. For small sets; `streamed` has
the large ones.

    [{"id": ..., "image": "path under image_root", "conversations": [{"from": "human", "value":
    "<image>\n..."}, {"from": "gpt", ...}]}]

With several pictures `image` is a list, in the order of the markers.
"""

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cumo_model.data.batches import pad
from cumo_model.data.pictures import Pictures, PixelReader
from cumo_model.data.records import picture_names, row_problems, scan
from cumo_model.processing.conversation import (
    IMAGE_MARKER,
    tokenize_conversations,
)
from cumo_model.processing.processor import image_seq_length
from cumo_model.processing.templates import get_template


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
            template: a name of templates.TEMPLATES.
            max_length: ids and labels are cut here; None leaves them whole.

        Raises:
            ValueError: the file, a record or a picture's path is not usable; the message names the file, the
                record and the reason.
        """
        get_template(template)
        path = os.fspath(json_path)
        rows, self.pictures = list(scan(path)), Pictures(image_root)
        if not rows:
            raise ValueError(f"{path}: holds no records")
        problems = [
            problem for row in rows for problem in row_problems(row, path, self.pictures, False, template)
        ]
        fatal = [problem for problem in problems if problem.fatal]
        if fatal:
            more = f" (and {len(fatal) - 1} more problems)" if len(fatal) > 1 else ""
            raise ValueError(f"{fatal[0]}{more}")
        if problems:
            warnings.warn(f"{problems[0]} ({len(problems)} such records)", stacklevel=2)

        self.records: list[dict] = [row.value for row in rows]
        self.reader = PixelReader(processor.image_processor)
        self.pad_id: int = processor.tokenizer.pad_token_id or 0
        self.samples = self._tokenize(path, processor, template, max_length)
        self._pixels: dict[str, Tensor] = {}

    def _tokenize(
        self, path: str, processor, template: str, max_length: int | None
    ) -> list[tuple[Tensor, Tensor]]:
        tokens = image_seq_length(processor)
        conversations = [record["conversations"] for record in self.records]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reserved markers were named above
            samples = tokenize_conversations(conversations, processor.tokenizer, template, tokens)
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

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor | None]:
        """input_ids (N,) int64, labels (N,) int64, pixel_values (pictures, 3, s, s) fp32 or None for text
        alone."""
        ids, labels = self.samples[index]
        pixels = self.pixels(index)
        return {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": None if pixels is None else self.normalise(pixels),
        }

    def pixels(self, index: int) -> Tensor | None:
        """The pictures of a record as the tower's input before normalisation, (pictures, 3, s, s) uint8, from
        RAM after the first time; None for text alone."""
        names = picture_names(self.records[index])
        for name in names:
            if name not in self._pixels:
                try:
                    self._pixels[name] = self.reader.pixels(self.pictures.load(name))
                except ValueError as error:
                    record = f"record {index} (id {self.records[index].get('id')!r})"
                    raise ValueError(f"{record}: {error}") from error
        return torch.stack([self._pixels[name] for name in names]) if names else None

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, s, s) uint8 -> fp32 as the image processor scales and normalises."""
        return self.reader.normalise(pixels)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch `collate` makes of these records, with one normalisation for all of its pictures."""
        pictures = [picture for index in indices if (picture := self.pixels(index)) is not None]
        batch = pad([self.samples[index] for index in indices], self.pad_id)
        if pictures:
            batch["pixel_values"] = self.normalise(torch.cat(pictures))
        return batch
