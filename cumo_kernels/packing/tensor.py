"""PackedWeight: the stacked weights of experts in four bits, in a tensor that modules can hold."""

import logging
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cumo_kernels.packing import formats
from cumo_kernels.packing.formats import FORMATS

log = logging.getLogger(__name__)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
aten = torch.ops.aten


class PackedWeight(Tensor):
    """Weights (E, N, K) of E experts, held in four bits and a scale for every `group` of them.

    `expert_mlp` and `grouped_gemm` take it in place of a plain weight and read it as it is. It can be the
    parameter of a module (`torch.nn.Parameter(packed, requires_grad=False)`): `to`, `detach`, `clone`,
    `transpose(1, 2)`, and slices, splits and selections of experts stay packed; `add_`, `sub_` and `copy_`
    of plain weights round the result to the format again, as merging an adapter does, and a block keeps its
    scale where that is not worse. Any other operator of torch runs on the dequantised weights, with a
    warning. It gets no gradient.

    Args:
        packed: (E, N, K / 2) uint8; weight 2i of a row is in the low half of byte i.
        scales: (E, N, K / G): fp32, bf16 or fp16, or uint8 exponents (mxfp4).
        zeros: (E, N, K / G) uint8 from 0 to 15, of int4 only; None: 8.
        format: a name in FORMATS: "nf4", "fp4", "mxfp4" or "int4".
        dtype: the float dtype that the tensor shows, and dequantises to by default. The kernels dequantise
            to the dtype of their input.

    Attributes:
        packed, scales, zeros, format: the arguments.
        is_transposed: whether the tensor shows the weights as (E, K, N).

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: str
    is_transposed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        format: str = "nf4",
        dtype: torch.dtype = torch.bfloat16,
        is_transposed: bool = False,
    ):
        _check(packed, scales, zeros, format, dtype)
        experts, rows, half = packed.shape
        shape = (experts, 2 * half, rows) if is_transposed else (experts, rows, 2 * half)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        format: str = "nf4",
        dtype: torch.dtype = torch.bfloat16,
        is_transposed: bool = False,
    ):
        self.packed, self.scales, self.zeros = packed, scales, zeros
        self.format, self.is_transposed = format, is_transposed

    def __repr__(self) -> str:
        return (
            f"PackedWeight({self.format}, {tuple(self.shape)}, group={self.group}, dtype={self.dtype}, "
            f"device={self.device}{', with zeros' if self.zeros is not None else ''})"
        )

    @property
    def group(self) -> int:
        """Number of weights that share a scale."""
        return 2 * self.packed.shape[-1] // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take in memory."""
        return sum(part.numel() * part.element_size() for part in self.parts() if part is not None)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """packed, scales, zeros."""
        return self.packed, self.scales, self.zeros

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights as a plain tensor; computed in fp32, rounded once to `dtype` (None: that shown)."""
        plain = formats.unpack(*self.parts(), self.format, dtype or self.dtype)
        return plain.transpose(1, 2) if self.is_transposed else plain

    def __tensor_flatten__(self):
        names = ["packed", "scales"] + (["zeros"] if self.zeros is not None else [])
        return names, (self.format, self.dtype, self.is_transposed)

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return PackedWeight(inner["packed"], inner["scales"], inner.get("zeros"), *meta)

    def _with(self, change, dtype: torch.dtype | None = None, flip: bool = False) -> "PackedWeight":
        parts = [None if part is None else change(part) for part in self.parts()]
        return PackedWeight(*parts, self.format, dtype or self.dtype, self.is_transposed != flip)

    def _overwrite(self, plain: Tensor) -> "PackedWeight":
        plain = plain.transpose(1, 2) if self.is_transposed else plain
        formats.requantize(plain, *self.parts(), self.format)
        return self

    @property
    def data(self) -> "PackedWeight":
        """The tensor itself, detached; assigning a PackedWeight of the same shape replaces all parts."""
        return self.detach()

    @data.setter
    def data(self, other: "PackedWeight") -> None:
        if not isinstance(other, PackedWeight) or other.shape != self.shape:
            got = f"{type(other).__name__} {tuple(getattr(other, 'shape', ()))}"
            raise ValueError(f"data must be a PackedWeight {tuple(self.shape)}, got {got}")
        Tensor.data.__set__(self, other)
        self.packed, self.scales, self.zeros = other.parts()
        self.format, self.is_transposed = other.format, other.is_transposed

    def share_memory_(self) -> "PackedWeight":
        """Move the parts to shared memory, for other processes of this machine."""
        for part in self.parts():
            if part is not None:
                part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the parts are in shared memory."""
        return all(part is None or part.is_shared() for part in self.parts())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None and isinstance(args[0], PackedWeight):
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        mutated = [
            arg
            for arg, described in zip(args, func._schema.arguments, strict=False)
            if described.alias_info is not None and described.alias_info.is_write
        ]
        if any(isinstance(arg, PackedWeight) for arg in mutated):
            raise RuntimeError(
                f"{func} cannot change weights that are packed in 4 bits: dequantize them first"
            )
        _note(str(func))
        args, kwargs = tree_map_only(PackedWeight, PackedWeight.dequantize, (args, kwargs))
        return func(*args, **kwargs)


@lru_cache
def _note(name: str) -> None:
    log.warning(f"{name} runs on weights that are dequantised for it, as it cannot read weights in 4 bits")


def _to_copy(weight, *, dtype=None, device=None, non_blocking=False, memory_format=None, **_):
    if dtype is not None and dtype not in FLOATS:
        return NotImplemented
    move = lambda part: part.to(device=device or part.device, non_blocking=non_blocking, copy=True)
    return weight._with(move, dtype)


def _transpose(weight, first, second):
    dims = {first % 3, second % 3}
    return weight._with(lambda part: part, flip=True) if dims == {1, 2} else NotImplemented


def _permute(weight, dims):
    return _transpose(weight, 1, 2) if [d % 3 for d in dims] == [0, 2, 1] else NotImplemented


def _select(weight, dim, index):
    if dim % 3:
        return NotImplemented
    experts = weight.shape[0]
    if not -experts <= index < experts:
        raise IndexError(f"there are {experts} experts, got index {index}")
    index %= experts
    return weight._with(lambda part: part[index : index + 1]).dequantize()[0]


def _of_experts(take):
    """A rule for an operator along a dimension: `take` on every part, if it is that of the experts."""

    def rule(weight, dim=0, *args, **kwargs):
        if not isinstance(dim, int) or dim % 3:
            return NotImplemented
        return weight._with(lambda part: take(part, 0, *args, **kwargs))

    return rule


def _split(weight, sizes, dim=0):
    if dim % 3:
        return NotImplemented
    return [weight[first : first + size] for first, size in _starts(weight.shape[0], sizes)]


def _starts(total: int, sizes: int | list[int]):
    if isinstance(sizes, int):
        sizes = [min(sizes, total - first) for first in range(0, total, sizes)] or [0]
    first = 0
    for size in sizes:
        yield first, size
        first += size


def _index(weight, indices):
    if len(indices) != 1 or indices[0] is None or indices[0].ndim != 1:
        return NotImplemented
    return weight._with(lambda part: aten.index.Tensor(part, indices))


def _add_(weight, other, *, alpha=1):
    return weight._overwrite(torch.add(weight.dequantize(torch.float32), _plain(other), alpha=alpha))


def _copy_(weight, source, non_blocking=False):
    if isinstance(source, PackedWeight) and _kind(source) == _kind(weight):
        for part, new in zip(weight.parts(), source.parts(), strict=True):
            if part is not None:
                part.copy_(new, non_blocking)
        return weight
    return weight._overwrite(_plain(source).to(weight.device, torch.float32))


def _record_stream(weight, stream):
    for part in weight.parts():
        if part is not None:
            part.record_stream(stream)


def _kind(weight: PackedWeight) -> tuple:
    return (
        weight.format,
        weight.is_transposed,
        [None if p is None else (p.shape, p.dtype) for p in weight.parts()],
    )


def _plain(value):
    return value.dequantize(torch.float32) if isinstance(value, PackedWeight) else value


_RULES = {
    aten.detach.default: lambda weight: weight._with(aten.detach.default),
    aten.alias.default: lambda weight: weight._with(aten.alias.default),
    aten.clone.default: lambda weight, **_: weight._with(torch.clone),
    aten._to_copy.default: _to_copy,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.select.int: _select,
    aten.slice.Tensor: _of_experts(aten.slice.Tensor),
    aten.index_select.default: _of_experts(aten.index_select.default),
    aten.index.Tensor: _index,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.add_.Tensor: _add_,
    aten.sub_.Tensor: lambda weight, other, *, alpha=1: _add_(weight, other, alpha=-alpha),
    aten.copy_.default: _copy_,
    aten.record_stream.default: _record_stream,
    aten.is_pinned.default: lambda weight, device=None: weight.packed.is_pinned(),
    aten._pin_memory.default: lambda weight, device=None: weight._with(Tensor.pin_memory),
}


torch.serialization.add_safe_globals([PackedWeight])  # its parts are tensors


def _check(packed, scales, zeros, name, dtype) -> None:
    row = check_format(name)
    for argument, tensor in (("packed", packed), ("scales", scales)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{argument} must be a tensor, got {type(tensor).__name__}")
    if packed.dtype != torch.uint8 or packed.ndim != 3:
        raise ValueError(f"packed must be (E, N, K / 2) uint8, got {tuple(packed.shape)} {packed.dtype}")
    if scales.dtype not in row.scales:
        wanted = " or ".join(str(one).removeprefix("torch.") for one in row.scales)
        raise ValueError(f"scales must be {wanted} in {name}, got {scales.dtype}")
    experts, rows, half = packed.shape
    if scales.ndim != 3 or scales.shape[:2] != packed.shape[:2] or not scales.shape[2]:
        flipped = scales.ndim == 3 and (scales.shape[0], scales.shape[2]) == (experts, rows)
        hint = ": they are transposed" if flipped else ""
        raise ValueError(f"scales must be ({experts}, {rows}, K / group), got {tuple(scales.shape)}{hint}")
    group, rest = divmod(2 * half, scales.shape[2])
    if rest or group not in row.groups:
        got = f"{scales.shape[2]} scales for {2 * half} weights"
        raise ValueError(
            f"scales must be one for {_listed(row.groups)} weights of a row in {name}, got {got}"
        )
    if zeros is not None:
        if not row.may_have_zeros:
            raise ValueError(f"zeros must be None in {name}, which has none")
        if not isinstance(zeros, Tensor) or zeros.dtype != torch.uint8 or zeros.shape != scales.shape:
            got = f"{tuple(zeros.shape)} {zeros.dtype}" if isinstance(zeros, Tensor) else type(zeros).__name__
            raise ValueError(f"zeros must be {tuple(scales.shape)} uint8, as the scales, got {got}")
    if any(part is not None and part.device != packed.device for part in (scales, zeros)):
        raise ValueError(f"scales and zeros must be on the device of packed, {packed.device}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")


def _listed(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))


def check_format(name: str) -> formats.Format:
    """The row of FORMATS; ValueError for an unknown name."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format must be one of {tuple(FORMATS)}, got {name!r}")
    return FORMATS[name]


def check_packing(
    format: str,
    group: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
    width: int | None = None,
    what: str = "weight",
) -> tuple[int, torch.dtype]:
    """Check the arguments of `pack` before there are weights.

    Args:
        format, group, symmetric, scale_dtype: as for `pack`.
        width: K of the weights, or None.
        what: name of the weights, for messages.

    Returns:
        The group and the dtype of the scales.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    row = check_format(format)
    group = row.group if group is None else group
    if type(group) is not int or group not in row.groups:
        raise ValueError(f"group must be {_listed(row.groups)} in {format}, got {group!r}")
    if type(symmetric) is not bool:
        raise ValueError(f"symmetric must be True or False, got {symmetric!r}")
    if not symmetric and not row.may_have_zeros:
        raise ValueError(f"symmetric must be True in {format}, which has no zero points")
    scale_dtype = row.scales[0] if scale_dtype is None else scale_dtype
    if scale_dtype not in row.scales:
        wanted = " or ".join(str(one).removeprefix("torch.") for one in row.scales)
        raise ValueError(f"scale_dtype must be {wanted} in {format}, got {scale_dtype}")
    if width is not None and (width % group or not width):
        raise ValueError(f"{what} must have rows of a multiple of {group} weights, the group, got {width}")
    return group, scale_dtype


def pack(
    weight: Tensor,
    format: str = "nf4",
    group: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> PackedWeight:
    """Round the stacked weights of experts to four bits.

    Args:
        weight: (E, N, K) float, finite.
        format: "nf4" (the values of QLoRA), "fp4" (bitsandbytes), "mxfp4" (OCP MX) or "int4" (affine).
        group: weights of a row that share a scale; it divides K. None: 64, in mxfp4 32, in int4 128.
        symmetric: False gives int4 a zero point for each block.
        scale_dtype: fp32, bf16 or fp16; bf16 saves 0.25 bits a weight at a group of 64. None: fp32, and in
            mxfp4 uint8 exponents, its only choice.

    Returns:
        The packed weights, on the device and with the dtype of `weight`.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    if not isinstance(weight, Tensor) or isinstance(weight, PackedWeight):
        raise ValueError(f"weight must be a plain tensor, got {type(weight).__name__}")
    if weight.ndim != 3 or weight.dtype not in FLOATS:
        raise ValueError(f"weight must be (E, N, K) float, got {tuple(weight.shape)} {weight.dtype}")
    group, scale_dtype = check_packing(format, group, symmetric, scale_dtype, weight.shape[2])
    with torch.no_grad():
        packed, scales, zeros = formats.quantize(weight.detach(), format, group, symmetric, scale_dtype)
    # a weight that is not finite makes the scale of its block so
    is_mx = scales.dtype == torch.uint8
    whole = scales != formats.E8M0_OF_NOT_FINITE if is_mx else scales.isfinite()
    if not weight.is_meta and not whole.all():
        raise ValueError(
            "weight must be finite, got infinite or NaN weights, or some too large for the scales"
        )
    return PackedWeight(packed, scales, zeros, format, weight.dtype)
