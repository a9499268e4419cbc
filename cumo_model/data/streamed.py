"""Data set over conversation files of any size: the index is in memory, records and pictures stay on disk.

The index has 25 bytes per record: its position in the file and its number of tokens. All records are checked
and tokenised once, when the index is built. The index is kept in `cache_dir`. Pictures are decoded when they
are used. With `skip_bad` the list of records depends on the record files only, not on the pictures.
"""

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from cumo_model.data.patterns import record_files
from cumo_model.data.pictures import Pictures, PixelReader, is_system_failure
from cumo_model.data.records import (
    Problem,
    Row,
    picture_names,
    read_row,
    row_problems,
    scan,
    with_pictures,
)
from cumo_model.data.samples import Tokenising, summaries
from cumo_model.processing.conversation import IGNORE_INDEX
from cumo_model.processing.processor import CumoProcessor
from cumo_model.processing.templates import get_template

CHUNK = 1024  # records per tokenizer call
INDEX_FORMAT = 5
TRIED = 100  # pictures, all unreadable, after which a run with skip_bad stops


class StreamedConversations(Dataset):
    """Data set of LLaVA-format conversations in .json, .jsonl and .tar files.

    Items are as in `ConversationDataset`: input_ids and labels (N,) int64, pixel_values (pictures, 3, s, s)
    fp32 or None. `lengths` (in tokens) and `has_image` of all records are available without reading files.
    """

    def __init__(
        self,
        files: str | os.PathLike | Sequence[str | os.PathLike],
        image_root: str | os.PathLike | Sequence[str | os.PathLike] | None,
        processor: CumoProcessor,
        template: str = "mistral_instruct_system",
        max_length: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        skip_bad: bool = False,
    ):
        """Build the index, or load it from `cache_dir`.

        Args:
            files: names or patterns of record files, read in this order.
            image_root: as in `Pictures`; None: each picture is in the .tar shard of its record.
            processor: as made by `build_processor`.
            template: a name of templates.TEMPLATES.
            max_length: ids and labels are truncated to this many tokens, with a warning that counts the
                records; None: not truncated.
            cache_dir: folder in which the index is stored for later runs; None: it is not stored.
            skip_bad: leave out records that cannot be trained on, with one warning, instead of raising an
                error. A record whose picture is missing or cannot be decoded is kept, with a grey picture and
                no labels, and a warning. An index that was stored without `skip_bad` is used with all its
                records, so that a run can go on with `skip_bad`.

        Raises:
            ValueError: a file cannot be used; a record cannot be used and `skip_bad` is False; or, with
                `skip_bad`, none of the pictures can be read (up to TRIED of them are tried).
        """
        get_template(template)
        self.files = record_files(list(files) if isinstance(files, list | tuple) else files)
        own = [file for file in self.files if file.endswith(".tar")]
        roots = [image_root] if isinstance(image_root, str | os.PathLike) else list(image_root or [])
        if not roots and not own:
            raise ValueError("image_root must name a folder or tar files, got None")
        self.pictures = Pictures([*own, *roots])
        self.processor, self.template, self.max_length = processor, template, max_length
        self.skip_bad = skip_bad
        self.tokenising = Tokenising(processor, template, max_length)
        self.tokens_per_image = self.tokenising.tokens_per_image
        self._unread: set[str] = set()  # pictures that have been warned about
        self._in_a_row: set[str] = set()  # unreadable pictures since the last one that was read
        self.reader = PixelReader(processor.image_processor)
        self.pad_id: int = processor.tokenizer.pad_token_id or 0
        index = self._load_index(cache_dir, skip_bad)
        self._file, self._offset, self._length = index["file"], index["offset"], index["length"]
        self._line = index["line"]
        self.lengths: np.ndarray = index["tokens"]
        self.has_image: np.ndarray = index["has_image"]
        names = json.loads(index["beside"].tobytes())
        self._beside: dict[int, list[str]] = dict(zip(index["beside_places"].tolist(), names, strict=True))
        if skip_bad:
            self._require_a_picture()

    def identity(self) -> str:
        """A digest of file names and sizes, template, tokenizer and max_length, independent of the folder."""
        what = [
            [[os.path.basename(file), os.path.getsize(file)] for file in self.files],
            self.template,
            self.max_length,
            self.tokens_per_image,
            hashlib.sha256(self.processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _load_index(self, cache_dir: str | os.PathLike | None, skip_bad: bool) -> dict[str, np.ndarray]:
        if cache_dir is None:
            return self._build_index(skip_bad)
        roots = [os.path.abspath(root) for root in self.pictures.roots]
        times = [os.stat(file).st_mtime_ns for file in self.files]
        paths = []
        for skipped in (True, False) if skip_bad else (False,):
            what = [INDEX_FORMAT, self.identity(), times, roots, skipped]
            key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]
            paths.append(Path(cache_dir) / f"index-{key}.safetensors")
        for path in paths:
            if path.exists():
                index = load_file(path)
                for said in json.loads(index["said"].tobytes()):
                    warnings.warn(
                        f"{said}; found when {path} was made, delete it to check again", stacklevel=4
                    )
                return index
        index, path = self._build_index(skip_bad), paths[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(
            f".{path.name}.{uuid.uuid4().hex}.part"
        )  # process ids are not unique across nodes
        save_file(index, part)
        os.replace(part, path)
        return index

    def _build_index(self, skip_bad: bool) -> dict[str, np.ndarray]:
        names = ("file", "line", "offset", "length", "tokens", "has_image", "cut")
        columns: dict[str, list] = {name: [] for name in names}
        beside: dict[int, Sequence[str]] = {}
        bad: list[Problem] = []
        grey: list[Problem] = []
        for number, file in enumerate(self.files):
            waiting: list[Row] = []
            said = f"reading {os.path.basename(file)}"
            rows = tqdm(scan(file), desc=said, unit=" records", mininterval=2, delay=20)  # what is long
            for row in rows:
                problems = row_problems(row, file, None if skip_bad else self.pictures, False, self.template)
                fatal = [problem for problem in problems if problem.fatal]
                if skip_bad and not fatal:
                    lost = self._missing_picture(row, file)
                    if lost and lost.fatal:
                        fatal = problems = [lost]
                    elif lost:
                        problems = []
                        grey.append(lost)
                bad += problems
                if fatal and not skip_bad:
                    raise ValueError(str(fatal[0]))
                if not fatal:
                    waiting.append(row)
                if len(waiting) == CHUNK:
                    self._add(columns, beside, bad, number, waiting, skip_bad)
                    waiting = []
            self._add(columns, beside, bad, number, waiting, skip_bad)
        summary = summaries(bad, sum(columns.pop("cut")), self.max_length, grey)
        for said in summary:
            warnings.warn(said, stacklevel=4)
        if not columns["file"]:
            raise ValueError(f"{self.files[0]}: holds no records that can be trained on")
        kinds = {"offset": np.int64} | dict.fromkeys(("file", "line", "length", "tokens"), np.int32)
        index = {name: np.array(values, kinds.get(name, bool)) for name, values in columns.items()}
        index["said"] = np.frombuffer(json.dumps(summary).encode(), np.uint8)
        index["beside_places"] = np.array(list(beside), np.int64)
        index["beside"] = np.frombuffer(json.dumps(list(beside.values())).encode(), np.uint8)
        return index

    def _missing_picture(self, row: Row, file: str) -> Problem | None:
        """The problem of a picture that cannot be used: fatal if its name is wrong wherever it is."""
        lost = None
        for name in picture_names(row.value):
            reason = self.pictures.name_problem(name)
            if reason:
                return Problem(file, row.number, row.value.get("id"), reason, line=row.line)
            try:
                self.pictures.place(name)
            except ValueError as error:
                if is_system_failure(error):
                    raise
                lost = lost or Problem(
                    file, row.number, row.value.get("id"), str(error), fatal=False, line=row.line
                )
        return lost

    def _require_a_picture(self) -> None:
        """Raise an error if none of the pictures can be read, looking at TRIED of them at most."""
        places = self.has_image.nonzero()[0]
        if not len(places):
            return
        tried: dict[str, str] = {}  # name -> reason
        for place in np.unique(np.linspace(0, len(places) - 1, TRIED).astype(np.int64)).tolist():
            for name in picture_names(self.record(int(places[place]))):
                if name in tried or len(tried) == TRIED:
                    continue
                try:
                    self.reader.pixels(self.pictures.load(name))
                    return
                except ValueError as error:
                    if is_system_failure(error):
                        raise
                    tried[name] = str(error)
        raise ValueError(
            f"skip_bad: none of the pictures can be read ({len(tried)} tried), the first: "
            f"{next(iter(tried.values()))}"
        )

    def _add(self, columns, beside, bad, number: int, rows: list[Row], skip_bad: bool) -> None:
        if not rows:
            return
        for row, (tokens, cut, problem) in zip(rows, self._count(rows, self.files[number]), strict=True):
            if problem is not None:
                if not skip_bad:
                    raise ValueError(str(problem))
                bad.append(problem)
                continue
            if row.beside:
                beside[len(columns["file"])] = row.beside
            columns["file"].append(number)
            columns["line"].append(row.line)
            columns["offset"].append(row.offset)
            columns["length"].append(row.length)
            columns["tokens"].append(tokens)
            columns["has_image"].append(bool(picture_names(row.value)))
            columns["cut"].append(cut)

    def _count(self, rows: list[Row], file: str) -> list[tuple[int, bool, Problem | None]]:
        """Tokens of each record, whether it is cut, and why max_length does not fit it, or None."""
        samples = self.tokenising.whole([row.value["conversations"] for row in rows])
        counts = []
        for row, sample in zip(rows, samples, strict=True):
            reason = self.tokenising.problem(row.value["conversations"], sample)
            if reason:
                problem = Problem(file, row.number, row.value.get("id"), reason, line=row.line)
                counts.append((0, False, problem))
            else:
                tokens = len(self.tokenising.cut(sample)[0])
                counts.append((tokens, self.tokenising.is_cut(sample), None))
        return counts

    def __len__(self) -> int:
        return len(self.lengths)

    def file_of(self, index: int) -> str:
        """Name of the file that contains this record."""
        return self.files[self._file[index]]

    def record(self, index: int) -> dict:
        """The record as in the file; in a tar shard, with the names of its picture members.

        Raises:
            ValueError: the file has changed since it was indexed.
        """
        file = self.files[self._file[index]]
        try:
            value = read_row(file, int(self._offset[index]), int(self._length[index]))
            if not isinstance(value, dict) or "conversations" not in value:
                raise ValueError("there is no record at its place")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file}:{self._line[index]}: the file has changed since it was indexed: {error}"
            ) from error
        return with_pictures(value, self._beside.get(index, ()))

    def __getitem__(self, index: int) -> dict[str, Tensor | None]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor | None]]:
        """The items of a batch, tokenised in one call."""
        records = [self.record(index) for index in indices]
        items = []
        samples = self.tokenising.whole([record["conversations"] for record in records])
        for index, record, sample in zip(indices, records, samples, strict=True):
            ids, labels = self.tokenising.cut(sample)
            names = picture_names(record)
            pictures = [self._picture(index, record, name) for name in names]
            if any(picture is None for picture in pictures):
                labels = torch.full_like(labels, IGNORE_INDEX)
            pixels = torch.stack([self._grey() if p is None else p for p in pictures]) if names else None
            items.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
        return items

    def _grey(self) -> Tensor:
        return torch.zeros(3, self.reader.side, self.reader.side)  # the mean colour after normalisation

    def _picture(self, index: int, record: dict, name: str) -> Tensor | None:
        """A picture of a record, (3, s, s) fp32; with `skip_bad` a warning and None if it cannot be read."""
        try:
            found = self.reader.normalise(self.reader.pixels(self.pictures.load(name)))
        except (ValueError, OSError, MemoryError) as error:
            told = f"{self.file_of(index)}:{self._line[index]}: record (id {record.get('id')!r}): "
            told += str(error) or type(error).__name__
            if is_system_failure(error):
                raise ValueError(f"{told}; this is a failure of the system, not of the picture") from error
            if not self.skip_bad:
                raise ValueError(
                    f"{told}; a training run goes on without this record with data.skip_bad=true"
                ) from error
            self._in_a_row.add(name)
            if len(self._in_a_row) == TRIED:
                raise ValueError(f"{told}; skip_bad: {TRIED} pictures in a row cannot be read") from error
            if name not in self._unread:
                self._unread.add(name)
                where = " in this data loader worker" if get_worker_info() else ""
                warnings.warn(
                    f"{told}; it is replaced by grey and its record's labels are not used "
                    f"({len(self._unread)} such pictures so far{where})",
                    stacklevel=4,
                )
            return None
        self._in_a_row.clear()
        return found
