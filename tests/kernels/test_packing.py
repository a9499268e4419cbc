"""Weights in four bits: the formats against written tables and other libraries, and their tensor."""

import copy
import io
import logging
import math

import pytest
import torch
from torch import nn

from cumo_kernels import PackedWeight, pack
from cumo_kernels.packing import tensor as module
from cumo_kernels.packing.formats import E2M1, FORMATS, FP4, NF4, nibbles, pack_nibbles
from cumo_kernels.packing.layouts import (
    from_bitsandbytes,
    from_compressed_tensors,
    from_gpt_oss,
    to_bitsandbytes,
    to_compressed_tensors,
    to_gpt_oss,
)

# a GPU machine has none of them
bnb = pytest.importorskip("bitsandbytes.functional")
helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
quantization = pytest.importorskip("compressed_tensors.quantization")
mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
pack_to_int32, unpack_from_int32 = helpers.pack_to_int32, helpers.unpack_from_int32
MXTensor, to_mx = mx.MXTensor, mx.to_mx

E, N, K = 3, 20, 256
KINDS = [("nf4", True), ("fp4", True), ("mxfp4", True), ("int4", True), ("int4", False)]
kinds = pytest.mark.parametrize("name, symmetric", KINDS, ids=lambda v: v if isinstance(v, str) else f"{v}")


@pytest.fixture
def weight():
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(3 * torch.randn(E, N, 1, generator=generator))
    return torch.randn(E, N, K, generator=generator) * scale


def every_number(name: str, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> PackedWeight:
    """(1, 1, 2 * 16): each number from 0 to 15 twice."""
    q = torch.arange(16, dtype=torch.uint8).repeat(2)
    return PackedWeight(pack_nibbles(q)[None, None], scales.view(1, 1, 1), zeros, name, torch.float32)


@pytest.mark.parametrize("name, codes", [("nf4", NF4), ("fp4", FP4)])
def test_codes_are_those_of_bitsandbytes(name, codes):
    assert torch.equal(torch.tensor(codes, dtype=torch.float32), bnb.get_4bit_type(name, device="cpu"))
    found = every_number(name, torch.tensor(2.0)).dequantize()
    assert found.flatten().tolist() == [2 * code for code in torch.tensor(codes).tolist()] * 2


def test_e2m1_is_its_bits():
    """Sign, two bits of an exponent with bias 1, one of a mantissa (OCP MX 1.0, section 5.3.3)."""
    for q, code in enumerate(E2M1):
        exponent, mantissa = q >> 1 & 3, q & 1
        magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert (code, math.copysign(1, code)) == (magnitude * (-1) ** (q >> 3), (-1) ** (q >> 3))


def test_exponents_are_powers_of_two():
    for s in (0, 1, 126, 127, 128, 250):
        found = every_number("mxfp4", torch.tensor(s, dtype=torch.uint8)).dequantize(torch.float64)
        assert found.flatten().tolist() == [code * 2.0 ** (s - 127) for code in E2M1] * 2
    assert every_number("mxfp4", torch.tensor(255, dtype=torch.uint8)).dequantize().isnan().all()


def test_integers_are_shifted():
    found = every_number("int4", torch.tensor(0.5)).dequantize()
    assert found.flatten().tolist() == [(q - 8) / 2 for q in range(16)] * 2
    zeros = torch.tensor([[[3]]], dtype=torch.uint8)
    found = every_number("int4", torch.tensor(0.5), zeros).dequantize()
    assert found.flatten().tolist() == [(q - 3) / 2 for q in range(16)] * 2


def test_the_first_weight_is_in_the_low_half():
    assert pack_nibbles(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
    assert nibbles(torch.tensor([0x21, 0x0F], dtype=torch.uint8)).tolist() == [1, 2, 15, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_rounds_and_dequantizes_as_bitsandbytes_does(weight, name, group, dtype):
    weight = (weight / weight.abs().max()).to(dtype)
    data, state = bnb.quantize_4bit(weight, blocksize=group, quant_type=name)
    mine, theirs = (
        pack(weight, name, group),
        from_bitsandbytes(data, state.absmax, weight.shape, name, group, dtype),
    )
    assert torch.equal(mine.packed, theirs.packed) and torch.equal(mine.scales, theirs.scales)
    assert torch.equal(mine.dequantize(), bnb.dequantize_4bit(data, state)) and mine.dtype == dtype
    back = to_bitsandbytes(mine)
    assert torch.equal(back[0], data) and torch.equal(back[1], state.absmax)


def test_rounds_to_mx_as_torchao_does(weight):
    weight[0, 0], weight[0, 1], weight[0, 2] = 0, weight[0, 1] * 1e-38, weight[0, 2] * 1e-42
    halfway = torch.tensor([0.25, -0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9] * 4)
    weight[0, 3, :32] = halfway
    scales, data = to_mx(weight.view(-1, K), torch.float4_e2m1fn_x2, 32)
    mine = pack(weight, "mxfp4")
    assert torch.equal(mine.packed, data.view(E, N, K // 2))
    assert torch.equal(mine.scales, scales.view(torch.uint8).view(E, N, K // 32))
    theirs = MXTensor.to_mx(weight.view(-1, K), torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    ordinary = torch.ones(E * N, dtype=torch.bool)
    ordinary[2] = False  # the smallest power of two, which torchao replaces by a larger one
    assert torch.equal(mine.dequantize().view(-1, K)[ordinary], theirs[ordinary])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [N, 24])
def test_integers_are_packed_as_compressed_tensors_does(symmetric, rows):
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-8, 8, (E, rows, K), generator=generator, dtype=torch.int8)
    zero = torch.randint(-8, 8, (E, rows, 2), generator=generator, dtype=torch.int8)
    scale = torch.rand(E, rows, 2, generator=generator).to(torch.bfloat16)
    words = torch.stack([pack_to_int32(one, 4) for one in q])
    points = None if symmetric else torch.stack([pack_to_int32(one, 4, packed_dim=0) for one in zero])
    mine = from_compressed_tensors(words, scale, points, q.shape)
    wide = scale.float().repeat_interleave(128, 2)
    shift = 0 if symmetric else zero.float().repeat_interleave(128, 2)
    assert torch.equal(mine.dequantize(torch.float32), (q.float() - shift) * wide)
    back = to_compressed_tensors(mine)
    assert torch.equal(back[0], words) and torch.equal(back[1], scale)
    if not symmetric:  # words that no row fills hold 0, as zero points
        assert torch.equal(unpack_from_int32(back[2][1], 4, zero[1].shape, packed_dim=0), zero[1])
    one = from_compressed_tensors(words[1], scale[1], None if symmetric else points[1], q[1].shape)
    assert torch.equal(one.packed[0], mine.packed[1]) and one.shape == (1, rows, K)


def test_blocks_of_gpt_oss():
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (E, N, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 130, (E, N, 4), generator=generator, dtype=torch.uint8)
    mine = from_gpt_oss(blocks, scales)
    codes = torch.tensor(E2M1)
    halves = torch.stack((codes[(blocks & 15).int()], codes[(blocks >> 4).int()]), -1).flatten(-2)
    wanted = torch.ldexp(halves, scales.int()[..., None] - 127).flatten(2)
    assert torch.equal(mine.dequantize(torch.float32), wanted) and mine.shape == (E, N, 128)
    assert all(torch.equal(a, b) for a, b in zip(to_gpt_oss(mine), (blocks, scales), strict=True))


@kinds
def test_no_other_number_is_nearer(weight, name, symmetric):
    packed = pack(weight, name, symmetric=symmetric)
    group = packed.group
    row = FORMATS[name]
    assert group == row.group and (packed.zeros is None) == symmetric
    blocks, found = weight.unflatten(-1, (-1, group)), packed.dequantize().unflatten(-1, (-1, group))
    numbers = torch.arange(16, dtype=torch.uint8)
    for q in numbers:
        every = torch.full_like(packed.packed, int(q) * 17)
        other = PackedWeight(every, packed.scales, packed.zeros, name, torch.float32).dequantize()
        nearer = (blocks - other.unflatten(-1, (-1, group))).abs() < (blocks - found).abs()
        if name == "int4":  # 7.5 scales, halfway between two numbers
            nearer &= blocks.abs() < blocks.abs().amax(-1, keepdim=True)
        assert not nearer.any()
    if row.codes is not None and name != "mxfp4":
        assert torch.equal(packed.scales, blocks.abs().amax(-1))


@kinds
def test_what_is_packed_can_be_packed_again(weight, name, symmetric):
    once = pack(weight, name, symmetric=symmetric)
    scales = torch.bfloat16 if name != "mxfp4" else None
    assert name == "int4" or torch.equal(pack(once.dequantize(), name).dequantize(), once.dequantize())
    narrow = pack(weight, name, symmetric=symmetric, scale_dtype=scales)
    assert narrow.scales.dtype == (scales or torch.uint8)
    assert narrow.nbytes < once.nbytes or name == "mxfp4"
    assert narrow.nbytes == sum(p.numel() * p.element_size() for p in narrow.parts() if p is not None)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
def test_a_narrow_scale_is_rounded_before_it_is_used(weight, name):
    """The numbers fit the scale that is kept: rounding what was packed changes nothing."""
    packed = pack(weight, name, scale_dtype=torch.bfloat16)
    blocks = weight.unflatten(-1, (-1, packed.group))
    largest = blocks.abs().amax(-1, keepdim=True)
    best = torch.full_like(blocks, math.inf)
    for q in range(16):
        every = torch.full_like(packed.packed, q * 17)
        other = PackedWeight(every, packed.scales, None, name, torch.float32).dequantize()
        best = best.minimum((blocks - other.unflatten(-1, (-1, packed.group))).abs())
    error = (blocks - packed.dequantize().unflatten(-1, (-1, packed.group))).abs()
    inside = blocks.abs() < largest
    assert torch.equal(error[inside], best[inside])


@kinds
def test_a_part_of_an_expert_is_plain(weight, name, symmetric):
    packed = pack(weight, name, symmetric=symmetric)
    values = packed.dequantize()
    for taken, wanted in (
        (packed[:, 2:4], values[:, 2:4]),
        (packed[..., 1:], values[..., 1:]),
        (packed.index_select(1, torch.tensor([3, 1])), values[:, [3, 1]]),
        (packed.select(1, 3), values[:, 3]),
        (packed.transpose(0, 1), values.transpose(0, 1)),
    ):
        assert not isinstance(taken, PackedWeight) and torch.equal(taken, wanted)


@kinds
def test_of_an_empty_block_nothing_is_left(name, symmetric):
    packed = pack(torch.zeros(2, 3, 256), name, symmetric=symmetric)
    assert torch.equal(packed.dequantize(), torch.zeros(2, 3, 256))
    if name == "int4":  # no 0 / 0, whose number is any
        assert packed.scales.all() and torch.equal(nibbles(packed.packed)[..., ::128], _zeros(packed))


def _zeros(packed):
    return torch.full_like(packed.scales, 8, dtype=torch.uint8) if packed.zeros is None else packed.zeros


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_and_zero_points_are_those_of_compressed_tensors(weight, symmetric):
    args = quantization.QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=128
    )
    blocks = weight.unflatten(-1, (-1, 128))
    scales, zeros = quantization.utils.calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    packed = pack(weight, "int4", symmetric=symmetric)
    assert torch.equal(packed.scales, scales)
    assert torch.equal(_zeros(packed).int() - 8, zeros.int())


@kinds
def test_large_stacks_are_cut(weight, name, symmetric, monkeypatch):
    whole = pack(weight, name, symmetric=symmetric)
    for limit in ("CHUNK", "CACHED"):
        monkeypatch.setattr(f"cumo_kernels.packing.formats.{limit}", 7 * K)
    parts = pack(weight, name, symmetric=symmetric)
    assert torch.equal(whole.packed, parts.packed) and torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.dequantize(), parts.dequantize())


@kinds
def test_a_module_holds_it(weight, name, symmetric):
    layer = nn.Module()
    layer.weight = nn.Parameter(pack(weight, name, symmetric=symmetric), requires_grad=False)
    values = layer.weight.dequantize()
    assert [n for n, _ in layer.named_parameters()] == ["weight"] and not layer.weight.requires_grad
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter) and isinstance(twin.weight, PackedWeight)
    assert twin.weight.packed.data_ptr() != layer.weight.packed.data_ptr()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    read = torch.load(file)["weight"]
    assert torch.equal(read.dequantize(), values)
    twin.load_state_dict({"weight": torch.zeros_like(values)})
    assert not twin.weight.dequantize().any()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight.packed, layer.weight.packed)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight.dequantize(), values.bfloat16())
    assert layer.to("meta").weight.packed.is_meta


@kinds
def test_of_experts_it_stays_packed(weight, name, symmetric, caplog):
    packed = pack(weight, name, symmetric=symmetric)
    values = packed.dequantize()
    with caplog.at_level(logging.WARNING):
        chosen = torch.tensor([2, 0])
        for taken, wanted in (
            (packed[1:], values[1:]),
            (packed[chosen], values[chosen]),
            (packed.index_select(0, chosen), values[chosen]),
            (packed.transpose(1, 2), values.transpose(1, 2)),
            (packed.mT, values.mT),
            (packed.permute(0, 2, 1).transpose(-1, -2), values),
            (packed.detach().clone(), values),
            (packed.to(torch.float16).to(torch.float32), values),
        ):
            assert isinstance(taken, PackedWeight) and taken.shape == wanted.shape
            assert torch.equal(taken.dequantize(), wanted)
        assert torch.equal(packed[-1], values[-1]) and torch.equal(packed.mT[0], values.mT[0])
        assert not isinstance(packed[0], PackedWeight)
    assert not caplog.records
    with pytest.raises(IndexError):
        packed[E]


def test_other_operators_see_plain_weights_and_say_so(weight, caplog):
    packed = pack(weight)
    module._note.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = torch.einsum("enk,ek->en", packed, weight[:, 0])
    assert torch.equal(found, torch.einsum("enk,ek->en", packed.dequantize(), weight[:, 0]))
    assert "dequantised for it" in caplog.text
    with pytest.raises(RuntimeError, match="cannot change weights that are packed in 4 bits"):
        packed.mul_(2)


@kinds
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_sum_in_place_is_rounded_again(weight, name, symmetric, is_transposed):
    """As merging an adapter does: `parameter.data += delta`."""
    packed = pack(weight, name, symmetric=symmetric)
    flip = lambda plain: plain.mT if is_transposed else plain
    added = torch.randn(E, N, K, generator=torch.Generator().manual_seed(3)) * weight.abs().amax((1, 2), True)
    shown = nn.Parameter(packed.mT if is_transposed else packed, requires_grad=False)
    for change, wanted_of in (
        (lambda: shown.data.add_(flip(added), alpha=2), lambda start: start + 2 * added),
        (lambda: shown.data.sub_(flip(added)), lambda start: start - added),
        (lambda: shown.data.copy_(flip(added)), lambda start: added),
    ):
        start = packed.dequantize()
        wanted = wanted_of(start)
        error = lambda found, w=wanted: (found - w).unflatten(-1, (-1, packed.group)).square().sum(-1)
        change()
        assert not torch.equal(start, packed.dequantize())
        fresh = pack(wanted, name, symmetric=symmetric)
        assert (error(packed.dequantize()) <= error(fresh.dequantize())).all()


@kinds
def test_weights_that_are_packed_already_keep_their_bits(weight, name, symmetric):
    """As in DDP's broadcast of parameters, or a merged adapter of zeros."""
    packed = pack(weight, name, symmetric=symmetric)
    before = [None if part is None else part.clone() for part in packed.parts()]
    values = packed.dequantize()
    for change in (
        lambda: packed.add_(torch.zeros(E, N, K)),
        lambda: packed.copy_(values),
        lambda: packed.mT.copy_(values.mT),
        lambda: packed.view(-1).copy_(values.view(-1)),
    ):
        change()
        assert torch.equal(packed.dequantize(), values)
        assert all(
            torch.equal(a, b) for a, b in zip(packed.parts()[1:], before[1:], strict=True) if a is not None
        )


def test_data_can_be_replaced_by_packed_weights_of_the_shape(weight):
    parameter = nn.Parameter(pack(weight), requires_grad=False)
    other = pack(weight.flip(0), "int4", 32, symmetric=False).to(torch.bfloat16)
    parameter.data = other
    assert torch.equal(parameter.dequantize(), other.dequantize()) and parameter.format == "int4"
    assert parameter.dtype == torch.bfloat16 and isinstance(parameter, nn.Parameter)
    with pytest.raises(ValueError, match=r"data must be a PackedWeight \(3, 20, 256\), got Tensor"):
        parameter.data = weight
    with pytest.raises(ValueError, match=r"data must be .* got PackedWeight \(2, 20, 256\)"):
        parameter.data = other[:2]


def test_other_processes_see_shared_parts(weight):
    layer = nn.Module()
    layer.weight = nn.Parameter(pack(weight), requires_grad=False)
    assert not layer.weight.is_shared()
    layer.share_memory()
    assert layer.weight.is_shared() and layer.weight.packed.is_shared()


def test_splits_of_experts_stay_packed(weight):
    packed = pack(weight)
    for taken, wanted in (
        (packed.split(2), weight.split(2)),
        (packed.chunk(3), weight.chunk(3)),
        (packed.split([1, 2]), weight.split([1, 2])),
    ):
        assert [part.shape for part in taken] == [part.shape for part in wanted]
        assert all(isinstance(part, PackedWeight) for part in taken)
        assert torch.equal(torch.cat([part.dequantize() for part in taken]), packed.dequantize())
    assert not isinstance(packed.split(5, 1)[0], PackedWeight)


def test_compiled_code_reads_it(weight):
    packed = pack(weight)
    compiled = torch.compile(lambda w: w.mT.dequantize() * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed), packed.mT.dequantize() * 2)


def wrong_pack(weight):
    yield "weight must be a plain tensor, got NoneType", lambda: pack(None)
    yield "weight must be a plain tensor, got PackedWeight", lambda: pack(pack(weight))
    yield r"weight must be \(E, N, K\) float, got \(20, 256\)", lambda: pack(weight[0])
    yield r"weight must be \(E, N, K\) float, .*int64", lambda: pack(weight.long())
    yield r"format must be one of \('nf4', .*got 'nf5'", lambda: pack(weight, "nf5")
    yield "format must be one of .*got None", lambda: pack(weight, None)
    yield "group must be 32 or 64 or 128 or 256 in nf4, got 48", lambda: pack(weight, "nf4", 48)
    yield "group must be 32 in mxfp4, got 64", lambda: pack(weight, "mxfp4", 64)
    yield "group must be .*got True", lambda: pack(weight, "nf4", True)
    yield "rows of a multiple of 64 weights, the group, got 96", lambda: pack(weight[..., :96])
    yield "symmetric must be True in nf4, which has no zero points", lambda: pack(weight, symmetric=False)
    yield "symmetric must be True or False, got 1", lambda: pack(weight, "int4", symmetric=1)
    yield (
        "scale_dtype must be uint8 in mxfp4, got torch.float32",
        lambda: pack(weight, "mxfp4", scale_dtype=torch.float32),
    )
    for name, symmetric in KINDS:
        for value in (math.inf, -math.inf, math.nan):
            broken = weight.clone()
            broken[1, 2, 3] = value
            yield "weight must be finite", lambda b=broken, n=name, s=symmetric: pack(b, n, symmetric=s)
    yield "some too large for the scales", lambda: pack(weight * 1e6, scale_dtype=torch.float16)


def test_wrong_arguments_of_pack_are_named(weight):
    for words, call in wrong_pack(weight):
        with pytest.raises(ValueError, match=words):
            call()


def test_wrong_parts_are_named(weight):
    packed, scales, _ = pack(weight).parts()
    zeros = torch.zeros_like(scales, dtype=torch.uint8)
    for words, parts in (
        ("packed must be a tensor, got list", ([], scales)),
        (r"packed must be \(E, N, K / 2\) uint8", (packed.int(), scales)),
        (r"packed must be \(E, N, K / 2\) uint8", (packed[0], scales)),
        ("scales must be a tensor, got NoneType", (packed, None)),
        (
            "scales must be float32 or bfloat16 or float16 in nf4, got torch.float64",
            (packed, scales.double()),
        ),
        (r"scales must be \(3, 20, K / group\), got \(3, 4, 20\): they are transposed", (packed, scales.mT)),
        (r"scales must be \(3, 20, K / group\), got \(3, 19, 4\)$", (packed, scales[:, 1:])),
        ("scales must be one for 32 or 64 .* got 3 scales for 256 weights", (packed, scales[..., :3])),
        ("scales must be one for 32 or 64 .* got 16 scales", (packed, scales.repeat(1, 1, 4))),
        (r"zeros must be None in nf4", (packed, scales, zeros)),
        (r"zeros must be \(3, 20, 4\) uint8, .*torch.float32", (packed, scales, scales, "int4")),
        ("zeros must be .* got list", (packed, scales, [], "int4")),
        ("must be on the device of packed", (packed, scales.to("meta"))),
        ("dtype must be float32", (packed, scales, None, "nf4", torch.int8)),
    ):
        with pytest.raises(ValueError, match=words):
            PackedWeight(*parts)


def test_wrong_layouts_are_named(weight):
    data, absmax = to_bitsandbytes(pack(weight))
    words, scale, points = to_compressed_tensors(pack(weight, "int4", symmetric=False))
    blocks, exponents = to_gpt_oss(pack(weight, "mxfp4"))
    shape = weight.shape
    for message, call in (
        ("data must be torch.uint8, got torch.int32", lambda: from_bitsandbytes(data.int(), absmax, shape)),
        ("data must be 7680 bytes", lambda: from_bitsandbytes(data[1:], absmax, shape)),
        ("absmax must have 240 elements", lambda: from_bitsandbytes(data, absmax[1:], shape)),
        ("multiple of 96", lambda: from_bitsandbytes(data, absmax, shape, group=96)),
        ("weight_packed must be torch.int32", lambda: from_compressed_tensors(data, scale, None, shape)),
        (
            r"weight_packed must be \(3, 20, 32\)",
            lambda: from_compressed_tensors(words[:, 1:], scale, None, shape),
        ),
        (
            "weight_scale must be a tensor, got NoneType",
            lambda: from_compressed_tensors(words, None, None, shape),
        ),
        (
            r"weight_scale must be \(3, 20, K / group\), got \(3, 2, 20\): it is transposed",
            lambda: from_compressed_tensors(words, scale.mT, None, shape),
        ),
        (
            r"weight_zero_point must be \(3, 3, 2\)",
            lambda: from_compressed_tensors(words, scale, points.mT, shape),
        ),
        ("multiple of 8 weights, got 250", lambda: from_compressed_tensors(words, scale, None, (3, 20, 250))),
        (r"blocks must be \(E, N, K / 32, 16\)", lambda: from_gpt_oss(blocks.flatten(2), exponents)),
        (r"scales must be \(3, 20, 8\), .*transposed", lambda: from_gpt_oss(blocks, exponents.mT)),
        ("scales must be torch.uint8", lambda: from_gpt_oss(blocks, exponents.float())),
        ("scales must be a tensor, got NoneType", lambda: from_gpt_oss(blocks, None)),
        ("weight must be in int4, got nf4", lambda: to_compressed_tensors(pack(weight))),
        ("weight must be in mxfp4, got nf4", lambda: to_gpt_oss(pack(weight))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
