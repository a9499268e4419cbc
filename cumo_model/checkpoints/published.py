"""Experts that others have published in four bits: their tensors, moved bit by bit into packed weights.

compressed-tensors, format "pack-quantized": for each linear layer weight_packed, weight_scale,
weight_zero_point and weight_shape. gpt-oss, MXFP4: for each stacked weight NAME_blocks and NAME_scales.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cumo_kernels.packing.formats import FORMATS
from cumo_kernels.packing.layouts import from_compressed_tensors, from_gpt_oss
from cumo_kernels.packing.tensor import PackedWeight
from cumo_model.checkpoints.shards import Shape, Shards
from cumo_model.model.quantizer import ExpertWeight

Parts = dict[str, str]  # part of a quantised tensor -> its name; "" of a plain one
INT4 = "pack-quantized"
WORD = 32  # bits
NAN_EXPONENT = 255  # of the scales of MXFP4


class Published:
    """Tensors that are not quantised; its subclasses are quantisations.

    Attributes:
        format: of the experts in FORMATS; None.
    """

    format: str | None = None

    def grouped(self, shards: Shards) -> dict[str, Parts]:
        """The parts of each weight, by the name that the weight has unquantised."""
        return {name: {"": name} for name in shards.shapes}

    def other(
        self, shards: Shards, base: str, parts: Parts, shape: Shape | None, dtype: torch.dtype
    ) -> tuple[Shape, torch.dtype, Callable[[], Tensor], bool]:
        """A tensor that is no expert's: shape, dtype, how it is read, whether it is dequantised for that."""
        name = parts[""]
        if shape is not None and shards.shapes[name] != shape:
            raise ValueError(f"{name} must be {shape}, as config.json says, got {shards.shapes[name]}")
        return shards.shapes[name], shards.dtypes[name], lambda: shards.read(name), False

    def stack(
        self, shards: Shards, of: ExpertWeight, columns: list[list[Parts]], names: list[str]
    ) -> tuple[Callable[[int], PackedWeight], int, PackedWeight]:
        """The experts of one weight: `read`, `nbytes` and `packed` of a Stack."""
        raise NotImplementedError


PLAIN = Published()


def published_of(quantization: Any, source: str) -> Published:
    """The quantisation that a config.json names.

    Args:
        quantization: its `quantization_config`.
        source: for messages.

    Raises:
        ValueError: it is not known; the message says what of it.
    """
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    known = {"compressed-tensors": CompressedTensors, "mxfp4": GptOss}
    if method not in known:
        raise ValueError(f"quant_method of {source} must be one of {tuple(known)}, got {method!r}")
    return known[method](quantization, source)


def _finite(name: str, scale: Tensor) -> Tensor:
    """Scales as they are; ValueError if one is not finite, which a plain weight must not be either."""
    if scale.dtype == torch.uint8 and (scale == NAN_EXPONENT).any():
        raise ValueError(f"{name} must be exponents below {NAN_EXPONENT}, which is NaN, got {NAN_EXPONENT}")
    if not scale.isfinite().all():
        raise ValueError(f"{name} must be finite, got nan or inf")
    return scale


def _meta(shards: Shards, name: str) -> Tensor:
    return torch.empty(shards.shapes[name], dtype=shards.dtypes[name], device="meta")


def _size(shards: Shards, parts: Parts) -> int:
    return sum(_meta(shards, name).nbytes for name in parts.values())


def _named(name: str, make: Callable[[], PackedWeight]) -> PackedWeight:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class GptOss(Published):
    """MXFP4 as gpt-oss has it."""

    format = "mxfp4"

    def __init__(self, quantization: dict[str, Any], source: str):
        pass

    def grouped(self, shards: Shards) -> dict[str, Parts]:
        found: dict[str, Parts] = {}
        names = set(shards.shapes)
        for name in shards.shapes:
            base, _, part = name.rpartition("_")
            if part == "blocks" or (part == "scales" and f"{base}_blocks" in names):
                found.setdefault(base, {})[part] = name
            else:
                found[name] = {"": name}
        for base, parts in found.items():
            if "blocks" in parts and "scales" not in parts:
                raise ValueError(f"{base}_scales is missing in {shards.folder}, which has {base}_blocks")
        return found

    def other(self, shards, base, parts, shape, dtype):
        if "" not in parts:
            raise ValueError(f"{base}_blocks of {shards.folder} is no weight of experts")
        return super().other(shards, base, parts, shape, dtype)

    def stack(self, shards, of, columns, names):
        if len(columns) > 1 or len(names) > 1:
            raise ValueError(f"{names[0]}_blocks must be that of all experts, got {len(names)} tensors")
        parts, (experts, rows, width) = columns[0][0], of.shape
        blocks, scales = parts["blocks"], parts["scales"]
        if shards.shapes[blocks] != (experts, rows, width // 32, 16) or width % 32:
            wanted = (experts, rows, width // 32, 16)
            raise ValueError(f"{blocks} must be {wanted}, as config.json says, got {shards.shapes[blocks]}")
        shown = _named(names[0], lambda: from_gpt_oss(_meta(shards, blocks), _meta(shards, scales)))
        scale = lambda e: _finite(scales, shards.read(scales, e))[None]
        read = lambda e: from_gpt_oss(shards.read(blocks, e)[None], scale(e))
        return read, _size(shards, parts), shown[:1]


def _group(name: str, group: Any, source: str) -> tuple[dict[str, Any], list[str]]:
    """`weights` and `targets` of one of the `config_groups` of compressed-tensors.

    Raises:
        ValueError: one of them is not of the right kind.
    """
    if not isinstance(group, dict):
        raise ValueError(f"{name} of config_groups in {source} must be an object, got {group!r}")
    scheme, targets = group.get("weights") or {}, group.get("targets") or []
    if not isinstance(scheme, dict):
        raise ValueError(f"weights of {name} in {source} must be an object, got {scheme!r}")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"targets of {name} in {source} must be a list of names, got {targets!r}")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise ValueError(
                f"targets of {name} in {source} must be names or patterns, got {target!r}: {error}"
            ) from None
    return scheme, targets


class CompressedTensors(Published):
    """Integers of compressed-tensors; experts must have four bits, linear layers may have eight."""

    format = "int4"
    suffixes = ("packed", "scale", "zero_point", "shape", "g_idx")

    def __init__(self, quantization: dict[str, Any], source: str):
        groups = quantization.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ValueError(f"config_groups of {source} must name how weights are quantised, got {groups!r}")
        self.source, self.schemes = source, []
        self._shapes: dict[str, tuple[int, int]] = {}  # by name of the tensor
        for name, group in groups.items():
            scheme, targets = _group(name, group, source)
            format = group.get("format") or quantization.get("format")
            if format != INT4:
                raise ValueError(f"format of {name} in {source} must be {INT4!r}, got {format!r}")
            if scheme.get("type") != "int" or scheme.get("num_bits") not in (4, 8):
                got = f"{scheme.get('type')} of {scheme.get('num_bits')} bits"
                raise ValueError(f"weights of {name} in {source} must be int of 4 or 8 bits, got {got}")
            if group.get("input_activations") or group.get("output_activations"):
                raise ValueError(f"{name} in {source} must quantise weights only, got activations too")
            self.schemes.append((targets, scheme))
        for key in ("kv_cache_scheme", "transform_config"):
            if quantization.get(key):
                raise ValueError(f"{key} of {source} must be empty, got {quantization[key]!r}")
        sparsity = quantization.get("sparsity_config") or {}
        sparsity = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
        if sparsity != "dense":
            raise ValueError(f"sparsity_config of {source} must be dense, got {sparsity!r}")

    def grouped(self, shards: Shards) -> dict[str, Parts]:
        found: dict[str, Parts] = {}
        pattern = re.compile(rf"(.*\.weight)_({'|'.join(self.suffixes)})")
        packed = {name.removesuffix("_packed") for name in shards.shapes if name.endswith(".weight_packed")}
        for name in shards.shapes:
            match = pattern.fullmatch(name)
            base, part = (match[1], match[2]) if match else (name, "")
            if part and base not in packed:
                raise ValueError(f"{base}_packed is missing in {shards.folder}, which has {name}")
            found.setdefault(base, {})[part] = name
        for base, parts in found.items():
            if "packed" in parts:
                self._check(shards, base, parts)
        return found

    def scheme_of(self, base: str) -> dict[str, Any]:
        """How a weight is quantised: by a group that names its layer, else by one for all of a class."""
        layer = base.removesuffix(".weight")
        fits = lambda target: (
            bool(re.match(target[3:], layer)) if target.startswith("re:") else target == layer
        )
        of_name = [scheme for targets, scheme in self.schemes if any(map(fits, targets))]
        of_class = [s for targets, s in self.schemes if any("." not in t and ":" not in t for t in targets)]
        found = of_name or of_class
        if not found:
            raise ValueError(f"{base}_packed is in no group of {self.source}")
        return found[0]

    def _check(self, shards: Shards, base: str, parts: Parts) -> None:
        """Check the names and shapes of a weight's parts against its scheme."""
        scheme = self.scheme_of(base)
        if "g_idx" in parts:
            raise ValueError(
                f"{parts['g_idx']} is not known: weights in the order of activations have no groups"
            )
        wanted = ["scale", "shape"] + ([] if scheme.get("symmetric", True) else ["zero_point"])
        for part in wanted:
            if part not in parts:
                raise ValueError(f"{base}_{part} is missing in {shards.folder}, which has {base}_packed")
        if scheme.get("symmetric", True) and "zero_point" in parts:
            raise ValueError(f"{parts['zero_point']} is there, but {self.source} says that it is symmetric")
        if shards.shapes[parts["shape"]] != (2,):
            raise ValueError(f"{parts['shape']} must be (2,), got {shards.shapes[parts['shape']]}")
        rows, width = self.shape(shards, parts)
        packed = (rows, -(-width * scheme["num_bits"] // WORD))
        if shards.shapes[parts["packed"]] != packed or shards.dtypes[parts["packed"]] != torch.int32:
            got = f"{shards.shapes[parts['packed']]} {shards.dtypes[parts['packed']]}"
            raise ValueError(f"{parts['packed']} must be {packed} torch.int32, got {got}")
        strategy = scheme.get("strategy") or ("group" if scheme.get("group_size") else "channel")
        if strategy not in ("group", "channel"):
            raise ValueError(
                f"strategy of {base} in {self.source} must be group or channel, got {strategy!r}"
            )
        group = width if strategy == "channel" else scheme.get("group_size")
        if type(group) is not int or group < 1 or width % group:
            raise ValueError(
                f"{base}_packed must have rows of a multiple of group_size {group!r}, got {width}"
            )
        found = shards.shapes[parts["scale"]]
        if found != (rows, width // group):
            hint = ": it is transposed" if found == (width // group, rows) else f" for groups of {group}"
            raise ValueError(f"{parts['scale']} must be {(rows, width // group)}, got {found}{hint}")
        if "zero_point" in parts:
            zeros = (-(-rows * scheme["num_bits"] // WORD), width // group)
            if shards.shapes[parts["zero_point"]] != zeros:
                raise ValueError(
                    f"{parts['zero_point']} must be {zeros}, got {shards.shapes[parts['zero_point']]}"
                )

    def shape(self, shards: Shards, parts: Parts) -> tuple[int, int]:
        """The shape of the unquantised weight, a tensor of two numbers."""
        if parts["shape"] not in self._shapes:
            rows, width = map(int, shards.read(parts["shape"]).tolist())
            self._shapes[parts["shape"]] = rows, width
        return self._shapes[parts["shape"]]

    def other(self, shards, base, parts, shape, dtype):
        if "" in parts:
            return super().other(shards, base, parts, shape, dtype)
        found, bits = self.shape(shards, parts), self.scheme_of(base)["num_bits"]
        if shape is not None and found != shape:
            raise ValueError(f"{parts['shape']} must say {shape}, as config.json, got {found}")

        def read() -> Tensor:
            some = {part: shards.read(name) for part, name in parts.items()}
            _finite(parts["scale"], some["scale"])
            return dequantized(some["packed"], some["scale"], some.get("zero_point"), found, bits, dtype)

        return found, dtype, read, True

    def stack(self, shards, of, columns, names):
        experts, rows, width = of.shape
        part = (rows // len(columns), width)
        shown, known = [], {}  # thousands of experts have parts of the same shapes
        for parts, name in zip([one for column in columns for one in column], names, strict=True):
            if "" in parts:
                raise ValueError(f"{name} must be quantised as the other experts are, got plain weights")
            if self.scheme_of(name)["num_bits"] != 4:
                raise ValueError(
                    f"{name} must have 4 bits, as an expert, got {self.scheme_of(name)['num_bits']}"
                )
            if self.shape(shards, parts) != part:
                raise ValueError(
                    f"{parts['shape']} must say {part}, as config.json, got {self.shape(shards, parts)}"
                )
            kind = tuple((p, shards.shapes[n], shards.dtypes[n]) for p, n in sorted(parts.items()))
            if kind not in known:
                show = lambda parts=parts: self._packed(parts, part, lambda key: _meta(shards, key))
                known[kind] = _named(name, show)
            one = known[kind]
            shown.append(one)
            if (one.group, one.zeros is None, one.scales.dtype) != (
                shown[0].group,
                shown[0].zeros is None,
                shown[0].scales.dtype,
            ):
                raise ValueError(f"{name} must be quantised as {names[0]} is, to be experts of one tensor")

        def read(expert: int) -> PackedWeight:
            return _rows([self._packed(column[expert], part, shards.read) for column in columns])

        size = sum(_size(shards, parts) for column in columns for parts in column)
        return read, size, _rows([shown[i * experts] for i in range(len(columns))])

    def _packed(self, parts: Parts, shape: Shape, read: Callable[[str], Tensor]) -> PackedWeight:
        """One expert's weight. A scale for many weights is repeated for the groups that kernels can read."""
        packed, scale = read(parts["packed"]), read(parts["scale"])
        if not scale.is_meta:
            _finite(parts["scale"], scale)
        zeros = read(parts["zero_point"]) if "zero_point" in parts else None
        group = shape[1] // scale.shape[1]
        if group not in FORMATS["int4"].groups:
            fitting = [size for size in FORMATS["int4"].groups if group % size == 0]
            if not fitting:
                raise ValueError(
                    f"groups must be multiples of {FORMATS['int4'].groups[0]} weights, got {group}"
                )
            times = group // max(fitting)
            scale = scale.repeat_interleave(times, 1)
            zeros = None if zeros is None else zeros.repeat_interleave(times, 1)
        return from_compressed_tensors(packed, scale, zeros, shape)


def _rows(parts: list[PackedWeight]) -> PackedWeight:
    """Weights of one expert below each other."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(part.parts() for part in parts), strict=True)
    joined = [None if column[0] is None else torch.cat(column, 1) for column in columns]
    return PackedWeight(*joined, parts[0].format, parts[0].dtype)


def _numbers(words: Tensor, bits: int, count: int) -> Tensor:
    """(R, C) int32 words -> (R, count) numbers of so many bits, the first in the lowest bits of a word."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)[:, :count]


def dequantized(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, shape: Shape, bits: int, dtype: torch.dtype
) -> Tensor:
    """A linear layer's weight: (q - zero) * scale, computed in fp32 and rounded once.

    Args:
        packed: (N, K * bits / 32) int32.
        scale: (N, K / G).
        zero_point: (N * bits / 32, K / G) int32; None: half of the range.
        shape: (N, K).
        bits: 4 or 8.
        dtype: of the result.
    """
    rows, width = shape
    q = _numbers(packed, bits, width).unflatten(1, (scale.shape[1], -1))
    zeros = 2 ** (bits - 1) if zero_point is None else _numbers(zero_point.T, bits, rows).T[:, :, None]
    return ((q - zeros).float() * scale.float()[:, :, None]).to(dtype).flatten(1)
