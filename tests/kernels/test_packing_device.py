"""What packed weights need on a GPU: the table of codes, streams and pinned memory; without a GPU too."""

import types

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cumo_kernels import PackedWeight, pack
from cumo_kernels.packing import formats
from cumo_kernels.packing.formats import NF4


def test_the_table_of_codes_is_kept_only_if_it_has_values(monkeypatch):
    """On a GPU it is kept for all later calls, whatever the first of them was."""
    kept = {}
    monkeypatch.setattr(formats, "_LASTING", kept)
    weight = pack(torch.randn(2, 4, 64), "nf4")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_gpu = [mode.from_tensor(part) for part in (weight.packed, weight.scales)]
        on_gpu = [part.to("cuda") for part in on_gpu]
        assert formats.unpack(*on_gpu, None, "nf4", torch.float32).device.type == "cuda"
        assert type(formats.codes_of("nf4", on_gpu[0])) is FakeTensor
        made = formats._lasting("nf4", torch.device("cpu"))  # as a first call inside a mode would
    assert formats.codes_of("nf4", on_gpu[0]).device.type == "cuda"  # a fake tensor outside of its mode
    assert not kept
    assert type(made) is torch.Tensor and torch.equal(made, torch.tensor(NF4))


def test_a_kept_table_is_used_in_captures_too(monkeypatch):
    table, capturing = torch.empty(16), []

    def asked() -> bool:
        capturing.append(True)
        return len(capturing) > 1

    gpu = types.SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(formats, "is_eager", lambda like: True)
    monkeypatch.setattr(formats, "_LASTING", {})
    monkeypatch.setattr(formats, "_lasting", lambda name, device: table)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    assert formats.codes_of("fp4", gpu) is table and formats.codes_of("fp4", gpu) is table
    assert len(capturing) == 1  # asked only before it is made


def test_streams_and_pinned_memory(monkeypatch):
    """As offloading uses them: of every part, without dequantising."""
    weight = pack(torch.randn(2, 4, 64), "int4", symmetric=False, group=32)
    seen = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda part, stream: seen.append((part.dtype, stream)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    aten = torch.ops.aten
    assert PackedWeight.__torch_dispatch__(aten.record_stream.default, (), (weight, "stream")) is None
    assert seen == [(part.dtype, "stream") for part in weight.parts()] and len(seen) == 3
    pinned = PackedWeight.__torch_dispatch__(aten._pin_memory.default, (), (weight,))
    assert isinstance(pinned, PackedWeight) and torch.equal(pinned.dequantize(), weight.dequantize())
    assert not weight.is_pinned()
