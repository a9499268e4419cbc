"""Data set over one conversation file, completely in memory, for small sets. `streamed` is for large ones.

    [{"id": ..., "image": "path under image_root", "conversations": [{"from": "human", "value":
    "<image>\n..."}, {"from": "gpt", ...}]}]

If a record has several pictures, `image` is a list in the order of the markers.
"""

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cumo_model.data.batches import pad
from cumo_model.data.pictures import Pictures, PixelReader
from cumo_model.data.records import Problem, picture_names, row_problems, scan
from cumo_model.data.samples import Tokenising, summaries
from cumo_model.processing.processor import CumoProcessor
from cumo_model.processing.templates import get_template


class ConversationDataset(Dataset):
    """Data set of conversations as token ids, labels and normalised pixels.

    The text is tokenised once, on construction. A picture is decoded at its first use and then kept as uint8.
    """

    def __init__(
        self,
        json_path: str | os.PathLike,
        image_root: str | os.PathLike,
        processor: CumoProcessor,
        template: str = "mistral_instruct",
        max_length: int | None = None,
    ):
        """Read, check and tokenise the file.

        Args:
            json_path: LLaVA-format file.
            image_root: folder to which the image paths are relative.
            processor: as made by `build_processor`.
            template: a name of templates.TEMPLATES.
            max_length: ids and labels are truncated to this many tokens, with a warning that counts the
                records; None: not truncated.

        Raises:
            ValueError: the file, a record or a picture's path is not usable, or `max_length` leaves a record
                no label; the message names the file, the record and the reason.
        """
        get_template(template)
        tokenising = Tokenising(processor, template, max_length)
        path = os.fspath(json_path)
        rows, self.pictures = list(scan(path)), Pictures(image_root)
        if not rows:
            raise ValueError(f"{path}: holds no records")
        problems = [
            problem for row in rows for problem in row_problems(row, path, self.pictures, False, template)
        ]
        _refuse(problems)
        self.records: list[dict] = [row.value for row in rows]
        self.reader = PixelReader(processor.image_processor)
        self.pad_id: int = processor.tokenizer.pad_token_id or 0
        whole = tokenising.whole([record["conversations"] for record in self.records])
        for row, sample in zip(rows, whole, strict=True):
            reason = tokenising.problem(row.value["conversations"], sample)
            if reason:
                problems.append(Problem(path, row.number, row.value.get("id"), reason, line=row.line))
        _refuse(problems)
        for said in summaries(problems, sum(map(tokenising.is_cut, whole)), max_length):
            warnings.warn(said, stacklevel=2)
        self.samples = [tokenising.cut(sample) for sample in whole]
        self._pixels: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor | None]:
        """input_ids and labels (N,) int64; pixel_values (pictures, 3, s, s) fp32 or None without pictures."""
        ids, labels = self.samples[index]
        pixels = self.pixels(index)
        return {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": None if pixels is None else self.normalise(pixels),
        }

    def pixels(self, index: int) -> Tensor | None:
        """The pictures of a record before normalisation, (pictures, 3, s, s) uint8; None without pictures.

        They are decoded once and then kept in memory.
        """
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
        """Scale and normalise as the image processor does: (..., 3, s, s) uint8 -> fp32."""
        return self.reader.normalise(pixels)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch that `collate` would make of these records; normalises all pictures in one operation."""
        pictures = [picture for index in indices if (picture := self.pixels(index)) is not None]
        batch = pad([self.samples[index] for index in indices], self.pad_id)
        if pictures:
            batch["pixel_values"] = self.normalise(torch.cat(pictures))
        return batch


def _refuse(problems: Sequence[Problem]) -> None:
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more problems)" if len(fatal) > 1 else ""
        raise ValueError(f"{fatal[0]}{more}")
