"""One picture gives the same tensor whichever way it comes; every mode and orientation; limits of size."""

import base64
import io
import json
import re
import tarfile
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import pipeline

from cumo_model.data import ConversationDataset, Pictures, StreamedConversations
from cumo_model.data.pictures import PixelReader
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing import build_processor, load_image
from cumo_model.processing import pictures as reading
from cumo_model.processing.pictures import (
    MEMORY,
    SIDE,
    TURNS,
    decode_image,
    needed,
    orientation_of,
    read_picture,
)

# for each EXIF orientation, the transposition with which an upright picture is stored
STORED = {1: None, **TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def _file(upright: np.ndarray, orientation: int, kind: str = "PNG") -> bytes:
    """A lossless file whose EXIF orientation makes it the picture `upright`, (H, W, 3) uint8."""
    image, exif, out = Image.fromarray(upright), Image.Exif(), io.BytesIO()
    if STORED[orientation] is not None:
        image = image.transpose(STORED[orientation])
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    image.save(out, kind, exif=exif, **options)
    return out.getvalue()


def _shard(data: bytes, folder: Path, name: str) -> Path:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        member = tarfile.TarInfo(f"./{name}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return folder / "shard.tar"


def _ways(data: bytes, upright: np.ndarray, folder: Path):
    """The same picture as every kind of source, by name."""
    path = folder / "a.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    yield from {
        "path": str(path),
        "Path": path,
        "file URL": f"file://{path}",
        "bytes": data,
        "file": io.BytesIO(data),
        "opened": Image.open(path),
        "loaded": load_image(path),
        "data URL": f"data:image/png;base64,{text}",
        "base64": text,
        "array": upright,
        "channels first": np.ascontiguousarray(upright.transpose(2, 0, 1)),
        "floats": upright.astype(np.float64) / 255,
        "fp32 to 255": upright.astype(np.float32),
        "tensor": torch.from_numpy(upright).permute(2, 0, 1),
        "float tensor": torch.from_numpy(upright).permute(2, 0, 1).float() / 255,
        "int64 tensor": torch.from_numpy(upright).permute(2, 0, 1).long(),
        "folder": Pictures(folder).load("a.png"),
        "shard": Pictures(_shard(data, folder, "a.png")).load("a.png"),
    }.items()


def _chat(processor, **part) -> torch.Tensor:
    messages = [
        {"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "what is it?"}]}
    ]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")[
        "pixel_values"
    ]


def _is_ambiguous(upright: np.ndarray) -> bool:
    """Whether an array could be read otherwise: both (H, W, C) and (C, H, W), or floats up to 1."""
    return 3 in upright.shape[:2] or upright.max() < 2


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    orientation=st.integers(1, 8),
    kind=st.sampled_from(["PNG", "WEBP", "TIFF"]),
    ratio=st.sampled_from(["pad", "square", "anyres"]),
    seed=st.integers(0, 99),
)
def test_every_way_gives_the_same_tensor(processors, height, width, orientation, kind, ratio, seed):
    processor = processors[ratio]
    upright = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = _file(upright, orientation, kind)
    wanted = processor.image_processor(Image.fromarray(upright), return_tensors="pt")
    arrays = ("array", "channels first", "floats", "fp32 to 255", "tensor", "float tensor", "int64 tensor")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way, source in _ways(data, upright, folder):
            if way in arrays and _is_ambiguous(upright):
                continue
            got = processor.image_processor(source, return_tensors="pt")
            assert torch.equal(got["pixel_values"], wanted["pixel_values"]), way
            assert got["image_sizes"].tolist() == [[height, width]], way
            both = processor(images=source, text="<image>", return_tensors="pt")
            assert torch.equal(both["pixel_values"], wanted["pixel_values"]), way
        path = str(folder / "a.png")
        parts = ({"path": path}, {"url": path}, {"image": path}, {"image": Image.open(path)})
        for part in (*parts, {"base64": base64.b64encode(data).decode()}):
            assert torch.equal(_chat(processor, **part), wanted["pixel_values"]), part
        if ratio != "anyres":
            reader = PixelReader(processor.image_processor)
            raw = reader.pixels(Pictures(folder).load("a.png"))
            plain = processor.image_processor(
                Image.fromarray(upright), do_rescale=False, do_normalize=False, return_tensors="pt"
            )
            assert torch.equal(raw, plain["pixel_values"][0])
            assert torch.equal(reader.normalise(raw[None]), wanted["pixel_values"])


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@contextmanager
def _served(folder: Path):
    """A web server of the folder's files; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_url_gives_the_same_tensor(processors, tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(_file(upright, 6))
    with _served(tmp_path) as address:
        url = f"{address}/a.png"
        wanted = processors["pad"].image_processor(upright, return_tensors="pt")["pixel_values"]
        got = processors["pad"](images=url, text="<image>", return_tensors="pt")["pixel_values"]
        assert torch.equal(got, wanted)
        assert torch.equal(_chat(processors["pad"], url=url), wanted)
        with pytest.raises(ValueError, match=r"image 'http://.*/b\.png' cannot be fetched: .*404"):
            load_image(url.replace("a.png", "b.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(orientation):
    upright = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    picture = read_picture(_file(upright, orientation))
    assert picture.size == (5, 3)
    assert np.array_equal(np.asarray(picture.image), upright)
    for left, top, right, bottom in ((0, 1, 5, 3), (2, 0, 4, 3), (1, 1, 2, 2)):
        part = np.asarray(picture.part(left, top, right, bottom))
        assert np.array_equal(part, upright[top:bottom, left:right])


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_unknown_and_damaged_orientations_are_none(orientation, tmp_path):
    upright = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    image, exif = Image.fromarray(upright), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), upright)
    for data in (b"Exif\x00\x00II*\x00 damaged", b"no EXIF"):
        image.save(tmp_path / "b.png", exif=data)
        assert orientation_of(Image.open(tmp_path / "b.png")) == 1
        assert np.array_equal(np.asarray(load_image(tmp_path / "b.png")), upright)


def test_a_picture_is_turned_once():
    """Also if the user has turned it already, which removes the tag."""
    from PIL import ImageOps

    upright = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(_file(upright, 8))))
    assert np.array_equal(np.asarray(load_image(turned)), upright)
    assert np.array_equal(np.asarray(load_image(load_image(_file(upright, 8)))), upright)


# mode, colour of all pixels, RGB; docs/pictures.md has this table in words
MODES = [
    ("1", 1, (255, 255, 255)),
    ("1", 0, (0, 0, 0)),
    ("L", 77, (77, 77, 77)),
    ("LA", (77, 10), (77, 77, 77)),
    ("La", (60, 128), (119, 119, 119)),
    ("RGB", (1, 2, 3), (1, 2, 3)),
    ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
    ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
    ("RGBa", (50, 25, 10, 128), (99, 49, 19)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("YCbCr", (76, 85, 255), (254, 0, 0)),
    ("HSV", (85, 255, 255), (0, 255, 0)),
    ("LAB", (255, 128, 128), (255, 255, 255)),
    ("LAB", (113, 192, 158), (199, 31, 60)),
    ("I", 200, (200, 200, 200)),
    ("I", 40_000, (156, 156, 156)),
    ("I;16", 40_000, (156, 156, 156)),
    ("I;16", 200, (0, 0, 0)),
    ("I;16B", 65_535, (255, 255, 255)),
    ("F", 0.5, (128, 128, 128)),
    ("F", 1.0, (255, 255, 255)),
    ("F", 200.4, (200, 200, 200)),
]


@pytest.mark.parametrize("mode, colour, rgb", MODES)
def test_modes(processors, mode, colour, rgb):
    image = Image.new(mode, (5, 7), colour)
    tolerance = 1 if mode == "LAB" else 0  # of the colour management module
    difference = np.asarray(load_image(image), int) - rgb
    assert np.abs(difference).max() <= tolerance
    if not tolerance:
        wanted = processors["square"].image_processor(Image.new("RGB", (5, 7), rgb), return_tensors="pt")
        got = processors["square"].image_processor(image, return_tensors="pt")
        assert torch.equal(got["pixel_values"], wanted["pixel_values"])


def test_palettes():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    assert load_image(image).getpixel((0, 0)) == (10, 20, 30)
    assert load_image(image.convert("PA")).getpixel((0, 0)) == (10, 20, 30)
    out = io.BytesIO()
    image.save(out, "PNG", transparency=1)
    assert load_image(out.getvalue()).getpixel((0, 0)) == (10, 20, 30)


def test_options_that_would_be_ignored_are_refused(processors):
    image = Image.new("RGB", (30, 20))
    with pytest.raises(ValueError, match="do_pad must not be False with image_aspect_ratio 'pad'"):
        processors["pad"].image_processor(image, do_pad=False)
    with pytest.raises(ValueError, match="pad_size must be None"):
        processors["pad"].image_processor(image, pad_size={"height": 9, "width": 9})


def test_limits_name_the_picture_and_the_bound(tmp_path, monkeypatch):
    Image.new("L", (SIDE + 1, 1)).save(tmp_path / "long.png")
    with pytest.raises(
        ValueError, match=rf"long\.png' must have sides of at most {SIDE} pixels, got 65536 x 1"
    ):
        load_image(tmp_path / "long.png")
    with pytest.raises(ValueError, match="sides of at most"):
        read_picture(np.zeros((1, SIDE + 1, 3), np.uint8))
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(reading, "MEMORY", 60 * 50 * 4 - 1)
    with pytest.raises(
        ValueError, match=r"a\.png' must be decoded in at most .* got a PNG of 60 x 50 pixels"
    ):
        load_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="must be decoded in at most"):
        read_picture(Image.open(tmp_path / "a.png"))
    opened = Image.open(tmp_path / "a.png")
    opened.load()
    assert read_picture(opened).size == (60, 50)  # the memory is used already
    monkeypatch.setattr(reading, "MEMORY", 60 * 50 * 4)
    assert load_image(tmp_path / "a.png").size == (60, 50)
    opened = Image.open(tmp_path / "a.png")
    assert load_image(opened).size == (60, 50) and opened.im is not None  # decoded itself, not once more
    Image.new("RGB", (SIDE, 1)).save(tmp_path / "long.png")
    monkeypatch.undo()
    assert load_image(tmp_path / "long.png").size == (SIDE, 1)


# format and mode of a picture of 40 x 30 pixels, options of saving, bytes per pixel while it is decoded:
# those that Pillow stores, and those of the decoder beside them
HELD = [
    ("PNG", "L", {}, 1),
    ("PNG", "I;16", {}, 2),
    ("PNG", "RGB", {}, 4),
    ("WEBP", "RGB", {}, 4 + 8.5),
    ("AVIF", "RGB", {}, 4 + 8),
    ("JPEG2000", "RGB", {}, 4 + 11),
    ("JPEG", "RGB", {}, 4),
    # coefficients of 16 bits: of each channel, or with a quarter of the two colours
    ("JPEG", "RGB", {"progressive": True, "subsampling": 0}, 4 + 2 * 3),
    ("JPEG", "RGB", {"progressive": True, "subsampling": 2}, 4 + 2 * 1.5),
    ("JPEG", "L", {"progressive": True}, 1 + 2),
    ("TIFF", "RGB", {"tiffinfo": {278: 30}}, 4 + 3),  # all rows in one strip
    ("TIFF", "RGB", {"tiffinfo": {278: 10}}, 4 + 1),
]


@pytest.mark.parametrize("kind, mode, options, held", HELD)
def test_the_memory_of_a_file_is_that_of_its_pixels_and_decoder(kind, mode, options, held):
    out = io.BytesIO()
    Image.new(mode, (40, 30)).save(out, kind, **options)
    assert needed(Image.open(out)) == 40 * 30 * held


def test_a_large_jpeg_is_decoded_smaller(tmp_path, monkeypatch):
    wave = (np.sin(np.arange(400) / 40) * 100 + 128).astype(np.uint8)
    Image.fromarray(np.repeat(np.repeat(wave[None, :, None], 301, 0), 3, 2)).save(
        tmp_path / "a.jpg", quality=95
    )
    whole = load_image(tmp_path / "a.jpg")
    monkeypatch.setattr(reading, "MEMORY", 200 * 151 * 4)
    opened = Image.open(tmp_path / "a.jpg")
    small = load_image(tmp_path / "a.jpg")
    assert small.size == (200, 151) and needed(decode_image(tmp_path / "a.jpg")) <= reading.MEMORY
    data = (tmp_path / "a.jpg").read_bytes()
    for other in (opened, data, Image.open(io.BytesIO(data))):
        assert np.array_equal(np.asarray(load_image(other)), np.asarray(small))
    assert opened.size == (400, 301)  # the user's own object is unchanged
    reduced = Image.open(tmp_path / "a.jpg")
    reduced.draft("RGB", (200, 150))
    assert np.array_equal(np.asarray(small), np.asarray(reduced))
    # a smooth picture, so that half its size shows the same: libjpeg's rounding, in levels of 255
    difference = np.asarray(whole.resize((24, 24)), int) - np.asarray(small.resize((24, 24)), int)
    assert np.abs(difference).max() <= 3


def _claims(side: int) -> bytes:
    """A PNG of a few bytes that claims to have side x side pixels of one bit."""
    out = io.BytesIO()
    Image.new("1", (1, 1)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


# more pixels than Pillow opens, and fewer, but more memory than a picture gets
BOMBS = {
    "bomb": (65_000, "cannot be read: .*decompression bomb"),
    "memory": (13_000, "must be decoded in at"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_named_whichever_way_it_comes(processors, tmp_path, kind):
    side, told = BOMBS[kind]
    data, processor = _claims(side), processors["pad"]
    path = tmp_path / "big.png"
    path.write_bytes(data)
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "image": "big.png", "conversations": turns}]))
    folder, shard = Pictures(tmp_path), Pictures(_shard(data, tmp_path, "big.png"))
    text = base64.b64encode(data).decode()
    named = {  # whose name the message has
        "path": (load_image, str(path)),
        "Path": (load_image, path),
        "file URL": (load_image, f"file://{path}"),
        "bytes": (lambda source: load_image(source, "big.png"), data),
        "file": (lambda source: read_picture(source, "big.png"), io.BytesIO(data)),
        "folder": (folder.load, "big.png"),
        "shard": (shard.load, "big.png"),
        "image processor": (processor.image_processor, str(path)),
        "processor": (lambda source: processor(images=source, text="<image>"), str(path)),
        "chat": (lambda source: _chat(processor, path=source), str(path)),
        "in memory": (lambda file: ConversationDataset(file, tmp_path, processor)[0], tmp_path / "a.json"),
        "streamed": (lambda file: StreamedConversations(file, tmp_path, processor)[0], tmp_path / "a.json"),
    }
    if kind == "memory":
        named["opened"] = load_image, Image.open(path)
    with _served(tmp_path) as address:
        named["URL"] = load_image, f"{address}/big.png"
        named["URL in a chat"] = (lambda source: _chat(processor, url=source)), f"{address}/big.png"
        for way, (read, source) in named.items():
            with pytest.raises(ValueError, match=rf"image '[^']*big\.png.*' {told}"):
                pytest.fail(f"{way}: {read(source)}")
    for way, source in {"data URL": f"data:image/png;base64,{text}", "base64": text}.items():
        with pytest.raises(ValueError, match=rf"image '{source[:30]}.*' {told}"):
            pytest.fail(f"{way}: {load_image(source)}")
    assert re.search(rf"image 'big\.png in .*shard\.tar' {told}", shard.problem("big.png", decode=True) or "")
    assert MEMORY < 200e6
    with pytest.raises(ValueError, match=rf"image 'big' must have sides of at most {SIDE} pixels"):
        read_picture(np.zeros((SIDE + 1, 1, 3), np.uint8), "big")


@pytest.mark.parametrize("orientation", [1, 6])
def test_training_data_and_the_pipeline_see_the_same_picture(tiny_model, tmp_path, orientation, monkeypatch):
    tokenizer = train_tokenizer(["what is it?", "red"] * 20, 300)
    model = tiny_model(
        text_options={"vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    ).eval()
    processor = build_processor(tokenizer, 12, 4)
    upright = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(_file(upright, orientation))
    wanted = processor.image_processor(upright, return_tensors="pt")["pixel_values"]

    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": turns}]))
    for kind in (ConversationDataset, StreamedConversations):
        item = kind(tmp_path / "a.json", tmp_path, processor, "mistral_instruct")[0]
        assert torch.equal(item["pixel_values"], wanted)

    seen = []
    encode = model.model._encode_tiles
    monkeypatch.setattr(
        model.model, "_encode_tiles", lambda tiles, *a, **k: seen.append(tiles) or encode(tiles, *a, **k)
    )
    ask = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    content = [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "what is it?"}]
    ask(text=[{"role": "user", "content": content}], max_new_tokens=1)
    ask(images=str(tmp_path / "a.png"), text="[INST] <image>\nwhat is it? [/INST]", max_new_tokens=1)
    assert len(seen) == 2 and all(torch.equal(tiles, wanted) for tiles in seen)


def test_float_pictures_in_training_are_those_of_the_processor(processors, tmp_path):
    """A float TIFF from 0 to 1 was black in training."""
    for size in ((40, 30), (24, 24)):
        values = np.random.default_rng(0).random(size[::-1], dtype=np.float32)
        Image.fromarray(values).save(tmp_path / "a.tif")
        for ratio in ("pad", "square"):
            images = processors[ratio].image_processor
            reader = PixelReader(images)
            raw = reader.pixels(Pictures(tmp_path).load("a.tif"))
            wanted = images(str(tmp_path / "a.tif"), return_tensors="pt")["pixel_values"]
            assert torch.equal(reader.normalise(raw[None]), wanted) and raw.float().std() > 1


def test_one_opened_image_in_several_threads(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            image = Image.open(tmp_path / "a.png")
            for got in pool.map(lambda _, image=image: np.asarray(load_image(image)), range(4)):
                assert np.array_equal(got, values)


def test_the_size_of_a_large_jpeg_is_that_of_its_file(processors, tmp_path, monkeypatch):
    Image.new("RGB", (100, 60), "red").save(tmp_path / "a.jpg", exif=_exif(6))
    monkeypatch.setattr(reading, "MEMORY", 50 * 30 * 4)
    picture = read_picture(tmp_path / "a.jpg")
    assert (picture.full_size, picture.size) == ((60, 100), (30, 50))  # no smaller than must be
    found = processors["anyres"].image_processor(str(tmp_path / "a.jpg"), return_tensors="pt")
    assert found["image_sizes"].tolist() == [[100, 60]]


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("option", [{"data_format": "channels_last"}, {"do_convert_rgb": False}])
def test_options_without_effect_are_refused(processors, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        processors["pad"].image_processor(Image.new("RGB", (9, 9)), **option)


def test_paths_urls_and_errors_of_unusual_form(tmp_path, recwarn):
    Image.new("RGB", (5, 4), "red").save(tmp_path / "a b.png")
    assert load_image(f"file://{tmp_path}/a%20b.png").size == (5, 4)
    with pytest.raises(ValueError, match=r"cannot be fetched"):
        load_image("HTTP://127.0.0.1:9/a.png")
    with Image.open(tmp_path / "a b.png") as closed:
        pass
    with pytest.raises(ValueError, match=r"a b\.png' cannot be read: \w"):
        load_image(closed)
    with pytest.raises(ValueError, match=r"cannot be read|does not exist") as error:
        load_image("x" * 5000)
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match="is not base64 text"):
        load_image("data:image/png;base64,?")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    recwarn.clear()
    assert load_image(tmp_path / "p.png").getpixel((0, 0)) == (10, 20, 30)
    assert not recwarn.list
