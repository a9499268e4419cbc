"""The quantiser "cumo" of transformers: experts in four bits, read, written and made by its own functions.

    model = AutoModelForImageTextToText.from_pretrained(folder)          # of a quantised folder
    model.save_pretrained(other)                                         # the same bits again
    model = from_pretrained(folder, quantization_config=CumoQuantizationConfig("int4"))   # of any other one

It holds for the experts of this project and for those of every model of transformers that uses its experts
interface. A weight NAME of a module is a PackedWeight; in files it is NAME_packed, NAME_scales and, for int4
with zero points, NAME_zeros. Gates, norms, biases and everything that is no expert keep their precision: a
rounding error in a gate can select another expert.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from cumo_kernels.packing.tensor import PackedWeight, check_packing, pack
from cumo_model.model.moe import Experts

NAME = "cumo"
PACKED, SCALES, ZEROS = SUFFIXES = ("_packed", "_scales", "_zeros")
SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTERFACE = ("has_gate", "is_transposed", "is_concatenated")  # attributes of transformers' experts modules


class CumoQuantizationConfig(QuantizationConfigMixin):
    """How experts are rounded to four bits; the `quantization_config` of config.json and `from_pretrained`.

    Args:
        format: "nf4", "fp4", "mxfp4" or "int4", as in `cumo_kernels.packing`.
        group: weights of a row that share a scale. None: 64, in mxfp4 32, in int4 128; in a config.json, that
            tensors have groups of their own.
        symmetric: False gives int4 a zero point for each group.
        scale_dtype: "float32", "bfloat16" or "float16", or a torch.dtype. None: float32, and in mxfp4 its
            exponents.
        whole: names of parts, such as "vision_tower", or of weights, that keep their precision.
        quant_method: "cumo".

    Raises:
        ValueError: an argument is wrong or not known; the message names it.
    """

    def __init__(
        self,
        format: str = "nf4",
        group: int | None = None,
        symmetric: bool = True,
        scale_dtype: str | torch.dtype | None = None,
        whole: list[str] | tuple[str, ...] = (),
        quant_method: str = NAME,
        **unknown: Any,
    ):
        if unknown:
            raise ValueError(f"quantization_config has unknown keys: {', '.join(sorted(unknown))}")
        if quant_method != NAME:
            raise ValueError(f"quant_method must be {NAME!r}, got {quant_method!r}")
        if isinstance(scale_dtype, torch.dtype):
            scale_dtype = str(scale_dtype).removeprefix("torch.")
        if scale_dtype is not None and scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {tuple(SCALE_DTYPES)}, got {scale_dtype!r}")
        if not isinstance(whole, list | tuple | set | frozenset) or not all(
            isinstance(name, str) and name for name in whole
        ):
            raise ValueError(f"whole must be a list of names, got {whole!r}")
        self.quant_method = NAME
        self.format, self.group, self.symmetric = format, group, symmetric
        self.scale_dtype, self.whole = scale_dtype, sorted(whole)
        used = check_packing(**self.packing)[1]
        self.scale_dtype = None if used == torch.uint8 else str(used).removeprefix("torch.")

    @property
    def packing(self) -> dict[str, Any]:
        """Keyword arguments of `cumo_kernels.packing.tensor.pack`."""
        dtype = SCALE_DTYPES.get(self.scale_dtype)
        return {"format": self.format, "group": self.group, "symmetric": self.symmetric, "scale_dtype": dtype}

    def is_whole(self, name: str) -> bool:
        """Whether the weight with this dotted name keeps its precision."""
        return any(_names(part, name) for part in self.whole)


def _names(part: str, name: str) -> bool:
    """Whether a dotted name is that of the weight `name`, or of a part of the model that holds it."""
    return f".{part}." in f".{name}."


@dataclass(frozen=True)
class ExpertWeight:
    """A stacked weight of experts in a model.

    Attributes:
        shape: (E, N, K): experts, rows and the weights of a row, of which groups share a scale.
        dtype: in which the model computes.
        is_transposed: whether the module holds it as (E, K, N).
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    is_transposed: bool


def expert_weights(model: nn.Module) -> dict[str, ExpertWeight]:
    """The stacked weights of all experts of a model, by name; biases are none of them.

    Args:
        model: a module that holds MoELayers, or experts modules of transformers; it may be on the device
            "meta".
    """
    found = {}
    for path, module in model.named_modules():
        is_flipped = False
        if isinstance(module, Experts):
            names = (module.up_name, "down_proj")
        elif all(hasattr(module, flag) for flag in INTERFACE):
            names, is_flipped = (
                ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"),
                module.is_transposed,
            )
        else:
            continue
        for name in names:
            weight = module._parameters.get(name)
            if weight is not None and weight.ndim == 3:
                experts, rows, width = weight.shape
                shape = (experts, width, rows) if is_flipped else (experts, rows, width)
                found[f"{path}.{name}" if path else name] = ExpertWeight(shape, weight.dtype, is_flipped)
    return found


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The parameters of a model that are packed, by name."""
    return {name: value for name, value in model.named_parameters() if isinstance(value, PackedWeight)}


def left_out_of_broadcasts(model: nn.Module) -> list[str]:
    """Names of packed weights for DistributedDataParallel, which would broadcast them as plain ones.

    Every process has read the same file. Names are those of the model alone and inside of peft's wrappers, of
    which a module has one for each weight with adapters.
    """
    found = []
    for name in packed_weights(model):
        path, _, own = name.rpartition(".")
        inner = [path + ".base_layer" * depth for depth in range(3)]
        found += [f"{outer}{one}.{own}" for outer in ("", "base_model.model.") for one in inner]
    return found


def packed_parameter(weight: Tensor, of: ExpertWeight, packing: dict[str, Any]) -> nn.Parameter:
    """A plain weight, in the orientation of its module, as a frozen packed parameter."""
    rows = weight.transpose(1, 2).contiguous() if of.is_transposed else weight
    return frozen(pack(rows, **packing), of)


def frozen(packed: PackedWeight, of: ExpertWeight) -> nn.Parameter:
    """A packed weight (E, N, K) as the parameter of its module, which requires no gradient."""
    shown = packed.transpose(1, 2) if of.is_transposed else packed
    return nn.Parameter(shown, requires_grad=False)


def check_weights(weights: dict[str, ExpertWeight], config: CumoQuantizationConfig) -> None:
    """Check that the weights can be packed, before they are read.

    Raises:
        ValueError: there are none, or rows are no multiple of the group; the message names the weight.
    """
    if not weights:
        raise ValueError("there is nothing to quantise: the model has no experts in stacked weights")
    for name, weight in weights.items():
        check_packing(**config.packing, width=weight.shape[2], what=name)


def no_experts(model: nn.Module) -> str:
    """Why a model has no weights to quantise, as the end of a sentence that begins with its name."""
    kinds = {type(m).__name__ for m in model.modules() if type(m).__name__.endswith("Experts")}
    if kinds:
        return f"has experts of a class that is not supported: {', '.join(sorted(kinds))}"
    return "has no experts in stacked weights"


def check_whole(weights: dict[str, ExpertWeight], config: CumoQuantizationConfig) -> None:
    """Check that every name in `whole` is that of a weight of experts, or of a part that holds one.

    Raises:
        ValueError: a name fits no weight; the message names it.
    """
    for part in config.whole:
        if not any(_names(part, name) for name in weights):
            known = ", ".join(list(weights)[:2]) or "none"
            raise ValueError(
                f"whole must name weights of experts, or parts that hold some, got {part!r}, which fits none "
                f"of {len(weights)} ({known}{', ...' if len(weights) > 2 else ''})"
            )


def state_of(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """A packed weight as the tensors of a file."""
    rows = weight.transpose(1, 2) if weight.is_transposed else weight
    parts = zip(SUFFIXES, rows.parts(), strict=True)
    return {f"{name}{suffix}": part.contiguous() for suffix, part in parts if part is not None}


def check_files(weights: dict[str, ExpertWeight], found: dict[str, tuple], config, source: str) -> None:
    """Check names, shapes and dtypes of packed weights in files.

    Args:
        weights: the weights that the model needs, by name.
        found: (shape, dtype) by name, of all tensors of the files.
        config: the `quantization_config` of the files.
        source: for messages.

    Raises:
        ValueError: a tensor is missing, or has another shape; the message names it.
    """
    for name, weight in weights.items():
        experts, rows, width = weight.shape
        wanted = [name + suffix for suffix in SUFFIXES[: 2 if config.symmetric else 3]]
        missing = [key for key in wanted if key not in found]
        if missing:
            plain = ", which has the weight unquantised" if name in found else ""
            raise ValueError(f"{missing[0]} is missing in {source}{plain}")
        if config.symmetric and f"{name}{ZEROS}" in found:
            raise ValueError(f"{name}{ZEROS} is in {source}, whose quantization_config says symmetric")
        parts = [torch.empty(*found[key][:1], dtype=found[key][1], device="meta") for key in wanted]
        shape = tuple(found[name + PACKED][0])
        if shape != (experts, rows, width // 2) or width % 2:
            raise ValueError(f"{name}{PACKED} of {source} must be {(experts, rows, width // 2)}, got {shape}")
        try:
            group = PackedWeight(*parts, format=config.format).group
        except ValueError as error:
            raise ValueError(f"{name} of {source}: {error}") from None
        if config.group not in (None, group):
            raise ValueError(f"{name}{SCALES} of {source} must be of groups of {config.group}, got {group}")


class ReadPacked(ConversionOps):
    """Makes the packed parameter from the tensors of a file."""

    def __init__(self, hf_quantizer: "CumoQuantizer"):
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo):  # transformers copies it for every weight
        return self

    def convert(self, input_dict, full_layer_name=None, **kwargs):
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        of = self.hf_quantizer.weights[full_layer_name]
        packed, scales, zeros = (parts.get(f"{suffix}$") for suffix in SUFFIXES)
        weight = PackedWeight(packed, scales, zeros, self.hf_quantizer.quantization_config.format, of.dtype)
        return {full_layer_name: frozen(weight, of)}


class Pack(ConversionOps):
    """Rounds a weight to four bits as soon as it is read."""

    def __init__(self, hf_quantizer: "CumoQuantizer"):
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo):
        return self

    def convert(self, input_dict, full_layer_name=None, **kwargs):
        ((name, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        of = self.hf_quantizer.weights[name]
        return {name: packed_parameter(value, of, self.hf_quantizer.quantization_config.packing)}


class CumoQuantizer(HfQuantizer):
    """Reads, makes and writes packed experts for transformers.

    Attributes:
        weights: the weights that are packed, by name.
    """

    requires_calibration = False
    quantization_config: CumoQuantizationConfig

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.weights: dict[str, ExpertWeight] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map must keep packed experts in memory, got disk")

    def param_element_size(self, model, param_name, param) -> float:
        """Bytes a weight; the scales of a group of 32 are at most another 1/8."""
        return 0.625 if param_name in self.weights else param.element_size()

    def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
        return param_name in self.weights

    def get_quantize_ops(self):
        return Pack(self)

    def get_weight_conversions(self):
        if not self.pre_quantized:
            return []
        # $: names of models may contain these words; without a target the rest of the name is kept
        return [WeightConverter([f"{suffix}$" for suffix in SUFFIXES], "", [ReadPacked(self)])]

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        weights = expert_weights(model)
        if not weights:
            raise ValueError(f"there is nothing to quantise: the model {no_experts(model)}")
        check_whole(weights, config)
        self.weights = {n: w for n, w in weights.items() if not config.is_whole(n)}
        self._dtypes = {name: value.dtype for name, value in model.named_parameters()}
        if self.pre_quantized:
            self._check_files(model, checkpoint_files)
            return
        check_weights(self.weights, config)
        config.group = check_packing(**config.packing)[0]  # None in files: tensors have groups of their own

    def _check_files(self, model: PreTrainedModel, files: list[str] | None) -> None:
        files = [file for file in files or () if str(file).endswith(".safetensors")]
        found = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    for key in opened.keys():
                        part, own = opened.get_slice(key), self._own_name(model, key)
                        found[own] = tuple(part.get_shape()), TYPES.get(part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is damaged: {error}") from None
        if files:
            check_files(self.weights, found, self.quantization_config, str(Path(files[0]).parent))

    def _own_name(self, model: PreTrainedModel, key: str) -> str:
        """The name in this model; a base model is read from files of a model with a head, and vice versa."""
        prefix = f"{model.base_model_prefix}."
        name = key.rpartition("_")[0] if key.endswith(SUFFIXES) else key
        for known in (name, name.removeprefix(prefix), prefix + name):
            if known in self.weights:
                return known + key[len(name) :]
        return key

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, value in model.named_parameters():
            wanted = self._dtypes.get(name, value.dtype)
            if value.dtype != wanted and value.is_floating_point() and not value.is_meta:
                # transformers 5.17 keeps the dtype of files whose names differ from those of the model
                value.data = value.data.to(wanted)
        model._weight_conversions = []  # names of files are those of the model, whatever they were before
        model._ddp_params_and_buffers_to_ignore = left_out_of_broadcasts(model)
        return model

    def get_state_dict_and_metadata(self, model):
        state: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            state.update(state_of(name, value) if isinstance(value, PackedWeight) else {name: value})
        return state, {}

    def _dequantize(self, model, dtype=None):
        dtype = (
            getattr(torch, dtype) if isinstance(dtype, str) else dtype
        )  # as a config that was saved has it
        for name, weight in packed_weights(model).items():
            path, _, own = name.rpartition(".")
            plain = weight.dequantize(dtype).contiguous()
            setattr(model.get_submodule(path), own, nn.Parameter(plain, requires_grad=False))
        model._weight_conversions = None  # the model is saved as any other one again
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the packed weights


TYPES = {
    "U8": torch.uint8,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


def config_for(model: nn.Module) -> CumoQuantizationConfig:
    """The `quantization_config` of a model that holds packed weights.

    Raises:
        ValueError: they have several formats.
    """
    packed = packed_weights(model)
    kinds = {(weight.format, weight.zeros is None) for weight in packed.values()}
    if len(kinds) != 1:
        named = ", ".join(
            sorted(f"{format}{'' if symmetric else ' with zeros'}" for format, symmetric in kinds)
        )
        raise ValueError(f"experts must have one format to be saved, got {named or 'none'}")
    ((format, symmetric),) = kinds
    groups = {weight.group for weight in packed.values()}
    dtypes = {weight.scales.dtype for weight in packed.values()} - {torch.uint8}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    whole = [name.removeprefix(prefix) for name in expert_weights(model) if name not in packed]
    group = groups.pop() if len(groups) == 1 else None
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return CumoQuantizationConfig(format, group, symmetric, dtype, whole)


def unsaved(other: HfQuantizer) -> str:
    """Why a model is not saved whose other weights another quantiser has packed."""
    method = other.quantization_config.quant_method
    return (
        f"a model whose experts are packed and whose other weights {getattr(method, 'value', method)} has "
        "quantised cannot be saved: save its adapters, or quantise the experts only"
    )


class Unsaved:
    """The answer to "is it serializable?" that is an error where `save_pretrained` uses it.

    It does not use it for a model with adapters, which are saved alone.
    """

    def __init__(self, words: str):
        self.words = words

    def __call__(self, *args, **kwargs) -> "Unsaved":
        return self

    def __bool__(self) -> bool:
        raise ValueError(self.words)


def attach(model: PreTrainedModel) -> None:
    """Give a model that holds packed weights what `save_pretrained` and `from_pretrained` need of it.

    Raises:
        ValueError: the weights have several formats, or another quantiser has packed other weights.
    """
    other = getattr(model, "hf_quantizer", None)
    if other is not None and not isinstance(other, CumoQuantizer):
        raise ValueError(unsaved(other))
    config = config_for(model)
    quantizer = CumoQuantizer(config, pre_quantized=True)
    quantizer.weights = {n: w for n, w in expert_weights(model).items() if not config.is_whole(n)}
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, NAME
    model.config.quantization_config = config
    model._weight_conversions = []
    model._ddp_params_and_buffers_to_ignore = left_out_of_broadcasts(model)


if NAME not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a reload of this module registers nothing twice
    register_quantization_config(NAME)(CumoQuantizationConfig)
if NAME not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(NAME)(CumoQuantizer)
