"""Large data sets: streamed files, shards, damaged records, packing, sampling."""

import io
import json
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from cumo_model.__main__ import main
from cumo_model.data import (
    Collator,
    ConversationDataset,
    StepSampler,
    StreamedConversations,
    Units,
    check,
    collate,
    collate_packed,
    plan_packs,
    scan,
)
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.processor import build_processor
from tests.model.gradients import gradients
from tests.rounding import assert_same_formula

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "purple"]


def _record(colour, words=1):
    turns = [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": " ".join([colour] * words)},
    ]
    return {"id": colour, "image": f"{colour}.png", "conversations": turns}


def _text(number):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red " * number}]
    return {"id": number, "conversations": turns}


RECORDS = [_record(colour, 1 + i % 3) for i, colour in enumerate(COLOURS)] + [_text(n) for n in range(1, 6)]


@pytest.fixture(scope="module")
def processor():
    return build_processor(train_tokenizer([f"what? {' '.join(COLOURS)}"] * 5, 300), 12, 4)


@pytest.fixture
def pictures(tmp_path):
    for colour in COLOURS:
        Image.new("RGB", (12, 12), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def _jsonl(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def _same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value is None and other[name] is None) or torch.equal(value, other[name])


def _shard(path, records, folder):
    """Write a webdataset shard: N.json and, for records with an image, N.png."""
    with tarfile.open(path, "w") as tar:
        for number, record in enumerate(records):
            content = {key: value for key, value in record.items() if key != "image"}
            members = {f"{number:04}.json": json.dumps(content).encode()}
            if "image" in record:
                members[f"{number:04}.png"] = (folder / record["image"]).read_bytes()
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("indent", [None, 2])
def test_every_form_of_file_gives_the_same_samples(pictures, processor, indent):
    whole = pictures / "all.json"
    whole.write_text(json.dumps(RECORDS, indent=indent))
    wanted = ConversationDataset(whole, pictures, processor)
    with tarfile.open(pictures / "images.tar", "w") as tar:
        for colour in COLOURS:
            tar.add(pictures / f"{colour}.png", f"{colour}.png")
    _jsonl(pictures / "part-0.jsonl", RECORDS[:5])
    _jsonl(pictures / "part-1.jsonl", RECORDS[5:])
    _shard(pictures / "web.tar", RECORDS, pictures)
    sources = {
        "list": (whole, pictures),
        "lines in two shards": (pictures / "part-*.jsonl", pictures),
        "pictures in a tar": (whole, pictures / "images.tar"),
        "webdataset": (pictures / "web.tar", None),
    }
    for name, (files, root) in sources.items():
        for _ in range(2):  # the second time with the index from disk
            found = StreamedConversations(
                files, root, processor, "mistral_instruct", cache_dir=pictures / "c"
            )
            assert len(found) == len(wanted), name
            for i in range(len(found)):
                _same(found[i], wanted[i])
                assert found.lengths[i] == len(wanted[i]["input_ids"])
                assert found.has_image[i] == (wanted[i]["pixel_values"] is not None)
    assert len(list((pictures / "c").glob("index-*"))) == 4


def _several(names):
    turns = [
        {"from": "human", "value": "<image> or <image>?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "what?\n<image>"},
        {"from": "gpt", "value": "blue"},
    ]
    return {"id": "several", "image": names, "conversations": turns}


def test_several_pictures_of_a_record_in_every_form(pictures, processor, tiny_model):
    """JSON list, JSON lines, and shards with picture members; more than ten pictures, in order."""
    names = ["red.png", "blue.png", "green.png"]
    many = {
        "id": "many",
        "image": [f"{COLOURS[i % 7]}.png" for i in range(12)],
        "conversations": [{"from": "human", "value": "<image>" * 12}, {"from": "gpt", "value": "red"}],
    }
    records = [_several(names), many, _record("white"), _text(2)]
    whole = pictures / "several.json"
    whole.write_text(json.dumps(records))
    shard = pictures / "several.tar"
    with tarfile.open(shard, "w") as tar:
        for key, record in zip(("a", "a.b", "c", "d"), records, strict=True):
            content = {field: value for field, value in record.items() if field != "image"}
            beside = record.get("image", [])
            members = {f"{key}.json": json.dumps(content).encode()}
            if isinstance(beside, str):
                members[f"{key}.png"] = (pictures / beside).read_bytes()
            else:
                members |= {f"{key}.{i}.png": (pictures / name).read_bytes() for i, name in enumerate(beside)}
            for name, data in sorted(members.items()):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    in_memory = ConversationDataset(whole, pictures, processor)
    streamed = StreamedConversations(whole, pictures, processor, "mistral_instruct")
    web = StreamedConversations(shard, None, processor, "mistral_instruct", cache_dir=pictures / "c")
    again = StreamedConversations(shard, None, processor, "mistral_instruct", cache_dir=pictures / "c")
    for i, pictured in enumerate([3, 12, 1, 0]):
        for found in (streamed, web, again):
            _same(found[i], in_memory[i])
        pixels = in_memory[i]["pixel_values"]
        assert pictured == (0 if pixels is None else len(pixels))
        markers = (in_memory[i]["input_ids"] == processor.image_token_id).sum()
        assert (
            markers
            == 9 * pictured
            == 9 * sum(t["value"].count("<image>") for t in records[i]["conversations"])
        )
    assert list(check(whole, pictures, decode=True)) == list(check(shard, shard, decode=True)) == []
    order = [in_memory.reader.normalise(in_memory.reader.pixels(in_memory.pictures.load(n))) for n in names]
    assert torch.equal(in_memory[0]["pixel_values"], torch.stack(order))
    assert torch.equal(in_memory.batch([0, 2])["pixel_values"][:3], torch.stack(order))


@pytest.mark.usefixtures("fp64")
def test_packs_of_several_pictures_compute_what_padded_rows_do(pictures, processor, tiny_config):
    from cumo_model import CumoForConditionalGeneration

    path = _jsonl(pictures / "x.jsonl", [_several(["red.png", "blue.png", "green.png"]), _record("white")])
    data = StreamedConversations(path, pictures, processor, "vicuna_v1")
    config = tiny_config(
        text_options={"vocab_size": len(processor.tokenizer), "max_position_embeddings": 512},
        image_token_index=processor.image_token_id,
    )
    model = CumoForConditionalGeneration(config).train()
    samples = [data[0], data[1]]
    padded, packed = collate(samples, data.pad_id), collate_packed([samples], data.pad_id)
    assert packed["pixel_values"].shape[0] == padded["pixel_values"].shape[0] == 4
    assert_same_formula(*(model(**batch, use_cache=False).loss_parts for batch in (packed, padded)))


BROKEN = """[
 {"id": 0, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
 {"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt" "value": "b"}]},
 {"id": 2, "conversations": [{"from": "human", "value": "a}, {"from": "gpt", "value": "b"}]},
 {"id": 3, "conversations": [{"from": "human", "value": "a [INST] {x"}, {"from": "gpt", "value": "b"}]},
 {"id": 4, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
 {"id": 5, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
 {"id": 6, "conversations": []},
 {"id": 7, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "\\ud83d"}]},
 {"id": 8, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
"""


def test_a_broken_list_is_read_to_its_end(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(BROKEN)
    good = [row.value["id"] for row in scan(path) if row.reason is None]
    assert good == [0, 3, 5, 6, 7, 8]
    lines = {problem.line: problem.reason for problem in check(path)}
    assert set(lines) == {3, 4, 6, 8, 9, 11}
    assert "is not JSON" in lines[3] and "non-empty list" in lines[8] and "file ends" in lines[11]


def test_a_bracket_too_many_is_said_and_passed(tmp_path):
    """Manual edits cause these. No record before or after one is lost without a message, and reading ends."""
    path, (one, two) = tmp_path / "odd.json", (json.dumps(_text(n)) for n in (1, 2))
    for content, said, read in (
        (f"[{one}}}, {two}]", ["unmatched }"], [_text(1), _text(2)]),
        (f"[}}}}{one}]", ["unmatched }"] * 2, [_text(1)]),
        (f"[{one}], {two}]", ["the file has more data after the end of the list"], [_text(1)]),
        (f"[{one}]\n \n", [], [_text(1)]),
    ):
        path.write_text(content)
        rows = list(islice(scan(path), 10))
        assert [row.reason for row in rows if row.reason] == said, content
        assert [row.value for row in rows if not row.reason] == read, content


def test_torn_archives_byte_order_marks_and_long_numbers(tmp_path, pictures, capsys):
    """Each is reported as one problem of one record or file; everything else is read."""
    good = json.dumps(_text(1))
    (tmp_path / "long.jsonl").write_text(f'{good}\n{{"id": {"9" * 6000}}}\n{good}\n')
    assert [problem.line for problem in check(tmp_path / "long.jsonl")] == [2]
    (tmp_path / "mark.json").write_text(f"[{good}]", encoding="utf-8-sig")
    (tmp_path / "mark.jsonl").write_text(good, encoding="utf-8-sig")
    for name in ("mark.json", "mark.jsonl"):
        assert list(check(tmp_path / name)) == []
        assert [row.value for row in scan(tmp_path / name)] == [_text(1)]
    whole = _shard(tmp_path / "whole.tar", [_text(1), _text(2)], pictures).read_bytes()
    assert list(check(tmp_path / "whole.tar")) == []
    for cut in (1024 + 100, 1024 + 512 + 10):  # within the second header, and within the second record
        (tmp_path / "torn.tar").write_bytes(whole[:cut])
        reasons = [problem.reason for problem in check(tmp_path / "torn.tar")]
        assert any("archive is truncated" in r or "unexpected end of data" in r for r in reasons)
    (tmp_path / "noise.tar").write_bytes(b"\x01" * 700)
    files = [str(tmp_path / name) for name in ("gone.json", "noise.tar", "whole.tar")]
    assert main(["data", "check", *files]) == 1
    out = capsys.readouterr().out
    assert "gone.json: the file does not exist" in out and "is not an uncompressed tar file" in out
    assert "whole.tar: 2 records, 0 cannot be used" in out


@pytest.mark.parametrize(
    "content", ["[" * 3000, '[{"a": ', '[{"id": 1,]', "[1, [2", '["', b'[{"id": "\xff"}]']
)
def test_nothing_kills_the_validator(tmp_path, content):
    path = tmp_path / "odd.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert list(check(path))
    assert main(["data", "check", str(path)]) == 1


def test_check_command_names_lines_and_counts(pictures, capsys):
    path = _jsonl(pictures / "x.jsonl", [RECORDS[0], {"id": "odd"}, _record("pink")])
    assert main(["data", "check", str(path), "--images", str(pictures), "--decode"]) == 1
    out = capsys.readouterr().out
    assert f"{path}:2: record 1 (id 'odd'): has no conversations" in out
    assert f"{path}:3: record 2 (id 'pink'): image 'pink.png' does not exist" in out
    assert "3 records, 2 cannot be used" in out
    assert main(["data", "check", str(_jsonl(pictures / "y.jsonl", RECORDS))]) == 0


def test_bad_records_stop_a_run_or_are_left_out(pictures, processor):
    path = _jsonl(pictures / "x.jsonl", [RECORDS[0], {"id": "odd"}, RECORDS[1]])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: record 1 \(id 'odd'\): has no conversations"):
        StreamedConversations(path, pictures, processor)
    with pytest.warns(UserWarning, match="has no conversations"):
        found = StreamedConversations(path, pictures, processor, skip_bad=True)
    assert [found.record(i)["id"] for i in range(len(found))] == ["red", "green"]
    for said in ("such records\\)$", "such records\\); found when .*index-.*, delete it to check again"):
        with pytest.warns(UserWarning, match=said):  # every run warns about skipped records
            StreamedConversations(path, pictures, processor, skip_bad=True, cache_dir=pictures / "index")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: record 0 .* max_length 5 cuts through"):
        StreamedConversations(_jsonl(path, RECORDS), pictures, processor, max_length=5)
    with pytest.raises(ValueError, match="template plain must have"):
        StreamedConversations(_jsonl(path, RECORDS), pictures, processor, "plain")


LENGTHS = np.random.default_rng(0).integers(1, 100, 237)
PICTURED = np.random.default_rng(1).random(237) < 0.6


@pytest.mark.parametrize("grouping", ["modality_length", "length", "none"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_has_every_unit_and_ranks_share_the_work(grouping, world):
    def batches(rank, epoch=0):
        sampler = StepSampler(LENGTHS, PICTURED, 4, 2, rank, world, seed=5, grouping=grouping)
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler) and len(sampler) % 2 == 0
        return found

    ranks = [batches(rank) for rank in range(world)]
    assert ranks == [batches(rank) for rank in range(world)]
    seen = [unit for rank in ranks for batch in rank for unit in batch if unit >= 0]
    assert set(seen) == set(range(237)) and len(seen) - 237 < 8 * world
    assert [batches(0, 1) != ranks[0], len({len(rank) for rank in ranks})] == [True, 1]
    mixed = 0
    for together in zip(*ranks, strict=True):
        real = [unit for batch in together for unit in batch if unit >= 0]
        assert all(sum(unit >= 0 for unit in batch) == 4 for batch in together)
        # if one rank runs the tower, all ranks do
        assert len({any(unit < 0 or PICTURED[unit] for unit in batch) for batch in together}) == 1
        mixed += len(set(PICTURED[real].tolist())) > 1
    assert grouping != "modality_length" or mixed <= 4
    if grouping != "none":
        spread = [np.ptp(LENGTHS[[u for u in batch if u >= 0]]) for batch in ranks[0]]
        assert np.mean(spread) < np.ptp(LENGTHS) / 3


def test_packs_hold_everything_once_and_waste_little():
    packs = plan_packs(LENGTHS, PICTURED, 100, seed=3)
    assert sorted(i for pack in packs for i in pack) == list(range(237))
    assert max(LENGTHS[pack].sum() for pack in packs) <= 100
    assert all(len(set(PICTURED[pack].tolist())) == 1 for pack in packs)
    assert len(packs) < 1.1 * LENGTHS.sum() / 100 + 2
    assert packs == plan_packs(LENGTHS, PICTURED, 100, seed=3) != plan_packs(LENGTHS, PICTURED, 100, seed=4)
    with pytest.raises(ValueError, match="max_length must be at least the longest sample's 99, got 50"):
        plan_packs(LENGTHS, PICTURED, 50)


@pytest.fixture
def small(pictures, processor):
    return StreamedConversations(
        _jsonl(pictures / "a.jsonl", RECORDS), pictures, processor, "mistral_instruct"
    )


def test_a_batch_asked_for_at_once_has_the_items_of_single_asks(small):
    """Packs, order and what a rank without pictures gets included; as the Trainer's loader asks."""
    units = Units(small, [[4, 0], [2], [1, 3]])
    for found, unit in zip(units.__getitems__([2, -1, 0]), (2, -1, 0), strict=True):
        if unit == -1:
            assert found is None and units[unit] is None
            continue
        for sample, number, again in zip(found, units.units[unit], units[unit], strict=True):
            _same(sample, small[number])
            _same(sample, again)
    plain = Units([{"number": number} for number in range(5)], [[4, 0], [2]])  # a data set of single asks
    assert plain.__getitems__([1, 0]) == [[{"number": 2}], [{"number": 4}, {"number": 0}]]


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_a_packed_batch_computes_what_the_padded_one_does(tiny_config, small, processor, attention, text):
    """Loss, its terms, and all gradients, in fp64."""
    from cumo_model import CumoForConditionalGeneration

    tokenizer = processor.tokenizer
    config = tiny_config(
        text,
        text_options={"vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        balance_loss_coef=0.1,
        router_z_loss_coef=0.01,
        scales=(1,),
    )
    config._attn_implementation = attention
    model = CumoForConditionalGeneration(config).train()
    samples = [small[i] for i in (0, 9, 1, 2, 10)]
    padded = collate(samples, small.pad_id)
    packed = collate_packed([samples[:3], samples[3:]], small.pad_id)
    assert packed["input_ids"].shape[0] == 2
    results = []
    for batch in (padded, packed):
        model.zero_grad()
        output = model(**batch, use_cache=False, skip_logits=True)
        output.loss.backward()
        results.append(output.loss_parts | gradients(model))
    assert_same_formula(*reversed(results))


def test_text_costs_no_picture_unless_it_must(small, tiny_model, tiny_batch):
    units = Units(small, [[i] for i in range(len(small))])
    collator = Collator(small.pad_id, 12)
    assert "pixel_values" not in collator([units[8], units[9]])
    other_rank_has_one = collator([units[8], units[-1]])
    assert other_rank_has_one["pixel_values"].shape[0] == other_rank_has_one["num_dummy_images"] == 1
    compat = Collator(small.pad_id, 12, dummy_images=True)([units[0], units[8], units[9]])
    assert compat["pixel_values"].shape[0] == 3 and compat["num_dummy_images"] == 2
    assert compat["pixel_values"][1:].abs().max() == 0 < compat["pixel_values"][0].abs().max()

    model, batch = tiny_model().train(), tiny_batch(images=0)
    plain = model(**batch)
    grey = model(**batch, pixel_values=torch.zeros(1, 3, 12, 12), num_dummy_images=1)
    assert torch.equal(plain.logits, grey.logits)
    assert "clip_z" in grey.loss_parts and "clip_z" not in plain.loss_parts
    grey.loss.backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
