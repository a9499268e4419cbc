"""Quantisation of the experts of a checkpoint on disk, the command `python -m cumo_model quantize`.

One expert is in memory at a time, beside what is packed already of its layer and the file that is being
written. Names and shapes are compared with config.json before anything is written.
"""

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cumo_kernels.packing.formats import FORMATS
from cumo_kernels.packing.tensor import PackedWeight, check_packing, pack
from cumo_model.checkpoints.convert import check_content, check_disk, copy_files, copy_to_own, other_files
from cumo_model.checkpoints.expert_files import Source, Stack, read_source
from cumo_model.checkpoints.folders import in_units, new_directory, write_json
from cumo_model.checkpoints.shards import Shape, write_shards
from cumo_model.model.config import CumoConfig
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.json_files import read_object
from cumo_model.model.quantizer import SUFFIXES, CumoQuantizationConfig

SHARD_BYTES = 1000**3
CHUNK = 1 << 19  # weights that are rounded at a time, for which several copies in fp32 are needed
REPORT = "quantization_report.json"

Plan = list[tuple[str, Shape, Callable[[], Tensor]]]


def quantize_checkpoint(
    source: str | os.PathLike,
    out: str | os.PathLike,
    format: str | None = None,
    group: int | None = None,
    symmetric: bool = True,
    scale_dtype: str | torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a checkpoint whose experts are in four bits; `from_pretrained` reads it as any other one.

    Gates, norms, biases and everything that is no expert are copied as they are, and so are all other files.
    What others have published in four bits (compressed-tensors, MXFP4 of gpt-oss) keeps its bits; linear
    layers that compressed-tensors has quantised beside the experts are dequantised.

    Args:
        source: folder of a CuMo in either layout, or of a model of transformers with experts.
        out: new folder, created atomically.
        format: "nf4", "fp4", "mxfp4" or "int4". None: nf4, or that of the published experts.
        group: weights of a row that share a scale. None: 64, in mxfp4 32, in int4 128.
        symmetric: False gives int4 a zero point for each group.
        scale_dtype: as in CumoQuantizationConfig.
        shard_bytes: largest size of an output file in bytes, unless a single tensor is larger.
        progress: whether to show a progress bar.

    Returns:
        The report, which is also in the folder as REPORT: for each weight its relative root mean square error
        (None: its bits have been kept) and its bytes before and after; the bytes of all tensors before and
        after; the names of dequantised tensors; and the model's type. The folder is loaded after
        `import cumo_model`, which registers the quantiser.

    Raises:
        ValueError: `out` exists or is inside `source`; the folder is quantised already, has no experts or is
            not complete; an argument does not fit the weights, or the published ones; a weight or a scale is
            NaN or infinite; or the disk is too small. The message names the argument or the tensor; nothing
            has been written.
    """
    source, out = Path(source), Path(out)
    if not shard_bytes >= 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    given = {"format": format, "group": group, "symmetric": symmetric, "scale_dtype": scale_dtype}
    if format is not None:
        _wanted(given)  # before anything is read
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out} exists already: choose another folder or delete it")
    if not (source / "config.json").is_file():
        raise ValueError(f"source must be a folder of a model, got {str(source)!r}, which has no config.json")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out must be outside the source folder {source}, got {str(out)!r}")
    found = read_source(source)
    config = _config(found, given)
    parts = _Parts(found.stacks, config)
    plan = [(other.name, other.shape, other.read) for other in found.others]
    dtypes = {other.name: other.dtype for other in found.others}
    for stack in found.stacks:
        for name, shape, dtype in parts.layout(stack):
            plan.append((name, shape, lambda stack=stack, name=name: parts.read(stack, name)))
            dtypes[name] = dtype
    files = other_files(source, found.shards)
    size = lambda name, shape: prod(shape) * dtypes[name].itemsize
    after = sum(size(name, shape) for name, shape, _ in plan)
    check_disk(out, after + sum((source / inner).stat().st_size for inner in files))
    with new_directory(out) as work:
        _write_config(work, found, config, files)
        write_shards(work, plan, dtypes.__getitem__, shard_bytes, progress)
        report = {
            "source": os.fspath(source),
            "model_type": CumoConfig.model_type if found.config is not None else found.values["model_type"],
            "quantization_config": config.to_dict(),
            "bytes_before": sum(
                prod(s) * found.shards.dtypes[n].itemsize for n, s in found.shards.shapes.items()
            ),
            "bytes_after": after,
            "experts": [parts.row(stack) for stack in found.stacks],
            "dequantised": [other.name for other in found.others if other.is_dequantised],
        }
        write_json(work / REPORT, report)
    return report


def _wanted(given: dict[str, Any]) -> CumoQuantizationConfig:
    """The arguments as a `quantization_config`; messages name the options of the command too."""
    format = given["format"] or "nf4"
    if not given["symmetric"] and format in FORMATS and format != "int4":
        raise ValueError(f"symmetric (--asymmetric) must be left out for {format}: only int4 has zero points")
    return CumoQuantizationConfig(**given | {"format": format})


def _config(source: Source, given: dict[str, Any]) -> CumoQuantizationConfig:
    """The `quantization_config` of the result, which fits all weights."""
    if source.published is None:
        wanted = _wanted(given)
        for stack in source.stacks:
            check_packing(**wanted.packing, width=stack.of.shape[2], what=stack.name)
            if stack.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{stack.name} must be fp32, bf16 or fp16, got {stack.dtype}")
        wanted.group = check_packing(**wanted.packing)[0]
        return wanted
    kind = source.published.format
    if given["format"] not in (None, kind):
        raise ValueError(
            f"format (--bits) must be {kind} or left out for {source.folder}, "
            f"whose experts are {kind} already, got {given['format']}"
        )
    packed = [stack.packed for stack in source.stacks]
    symmetric = {one.zeros is None for one in packed}
    groups, dtypes = {one.group for one in packed}, {one.scales.dtype for one in packed} - {torch.uint8}
    if given["group"] is not None and groups != {given["group"]}:
        raise ValueError(
            f"group (--group) must be left out for {source.folder}, whose groups are of "
            f"{', '.join(map(str, sorted(groups)))} weights, got {given['group']}"
        )
    if not given["symmetric"] or given["scale_dtype"] is not None:
        name = "scale_dtype" if given["symmetric"] else "symmetric (--asymmetric)"
        raise ValueError(f"{name} must be left out for {source.folder}, whose experts are {kind} already")
    if len(symmetric) > 1:
        raise ValueError(f"all experts of {source.folder} must have zero points, or none, got both")
    group = groups.pop() if len(groups) == 1 else None
    return CumoQuantizationConfig(kind, group, symmetric.pop(), dtypes.pop() if len(dtypes) == 1 else None)


class _Parts:
    """The tensors of packed weights; one weight is held at a time."""

    def __init__(self, stacks: list[Stack], config: CumoQuantizationConfig):
        self.config = config
        self._held: tuple[str, dict[str, Tensor]] = ("", {})
        self._errors: dict[str, float | None] = {}
        self._layouts = {stack.name: self._layout(stack) for stack in stacks}

    def _layout(self, stack: Stack) -> list[tuple[str, Shape, torch.dtype]]:
        experts, rows, width = stack.of.shape
        if stack.packed is not None:
            one = stack.packed
        else:
            packing = self.config.packing
            group, dtype = check_packing(**packing)
            scales = torch.empty(1, rows, width // group, dtype=dtype, device="meta")
            zeros = None if self.config.symmetric else scales.to(torch.uint8)
            packed = torch.empty(1, rows, width // 2, dtype=torch.uint8, device="meta")
            one = PackedWeight(packed, scales, zeros, self.config.format)
        named = zip(SUFFIXES, one.parts(), strict=True)
        return [
            (stack.name + s, (experts, *part.shape[1:]), part.dtype) for s, part in named if part is not None
        ]

    def layout(self, stack: Stack) -> list[tuple[str, Shape, torch.dtype]]:
        """Names, shapes and dtypes of the tensors of a weight."""
        return self._layouts[stack.name]

    def read(self, stack: Stack, name: str) -> Tensor:
        """One of the tensors of a weight."""
        if self._held[0] != stack.name:
            self._held = ("", {})
            self._held = (stack.name, self._packed(stack))
        return self._held[1].pop(name)

    def _packed(self, stack: Stack) -> dict[str, Tensor]:
        found = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in self.layout(stack)}
        wrong = total = 0.0
        for expert in range(stack.of.shape[0]):
            weight = stack.read(expert)
            if isinstance(weight, PackedWeight):
                _put(found, stack.name, expert, slice(None), weight)
                continue
            step = max(1, CHUNK // weight.shape[1])
            for first in range(0, weight.shape[0], step):
                rows = slice(first, first + step)
                try:
                    packed = pack(weight[None, rows], **self.config.packing)
                except ValueError as error:
                    raise ValueError(f"{stack.name} of expert {expert}: {error}") from None
                whole = weight[rows].float()
                total += _square(whole)
                wrong += _square(packed.dequantize(torch.float32)[0] - whole)
                _put(found, stack.name, expert, rows, packed)
        exact = stack.packed is not None
        self._errors[stack.name] = None if exact else (wrong / total) ** 0.5 if total else 0.0
        return found

    def row(self, stack: Stack) -> dict[str, Any]:
        """The row of the report of a weight, after it has been read."""
        after = sum(prod(shape) * dtype.itemsize for _, shape, dtype in self.layout(stack))
        return {
            "name": stack.name,
            "error": self._errors[stack.name],
            "bytes_before": stack.nbytes,
            "bytes_after": after,
        }


def _put(found: dict[str, Tensor], name: str, expert: int, rows: slice, packed: PackedWeight) -> None:
    for suffix, part in zip(SUFFIXES, packed.parts(), strict=True):
        if part is not None:
            found[name + suffix][expert, rows] = part[0]


def _square(values: Tensor) -> float:
    """The sum of squares, in fp64."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2


def _write_config(work: Path, source: Source, config: CumoQuantizationConfig, files: list[Path]) -> None:
    """config.json, and all other files."""
    if source.is_released:
        source.config.architectures = [CumoForConditionalGeneration.__name__]
        source.config.save_pretrained(work)
        copy_to_own(source.folder, files, work, source.processor)
        check_content(work, source.config, source.processor)
        values = read_object(work / "config.json")
    else:
        copy_files(source.folder, [inner for inner in files if inner != Path(REPORT)], work)
        values = source.values
    values["quantization_config"] = config.to_dict()
    (work / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def print_report(report: dict[str, Any], out: str | os.PathLike) -> None:
    """Print the error by layer, and the size before and after."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for row in report["experts"]:
        layers.setdefault(row["name"].rpartition(".")[0], []).append(row)
    config = report["quantization_config"]
    width = max(map(len, layers))
    what, error = f"experts in {config['format']}", "relative error (up, down)"
    print(f"{what:{width}}  {error:>28}  {'before':>10}  {'after':>10}")
    for layer, rows in layers.items():
        errors = ", ".join("kept" if row["error"] is None else f"{100 * row['error']:.2f}%" for row in rows)
        sizes = [sum(row[key] for row in rows) for key in ("bytes_before", "bytes_after")]
        print(f"{layer:{width}}  {errors:>28}  {in_units(sizes[0]):>10}  {in_units(sizes[1]):>10}")
    before, after = (in_units(report[key]) for key in ("bytes_before", "bytes_after"))
    print(f"{'the whole model':{width}}  {'':>28}  {before:>10}  {after:>10}")
    if report["dequantised"]:
        number = len(report["dequantised"])
        print(f"dequantised: {number} weights that are no experts, such as {report['dequantised'][0]}")
    if report["model_type"] != CumoConfig.model_type:
        print("before from_pretrained: import cumo_model (else transformers loads experts of random weights)")
    print(f"wrote {os.fspath(out)}")


def run_quantize(source: Path, out: Path, format: str | None, group: int | None, symmetric: bool) -> None:
    """The command: quantise, and print the report."""
    print_report(quantize_checkpoint(source, out, format, group, symmetric), out)
