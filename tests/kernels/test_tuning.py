"""tuning and hardware: every choice can run, the nearest shape wins, any tile gives the same result."""

import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from cumo_kernels import expert_mlp, grouped_gemm, routing_from_topk, use_backend
from cumo_kernels.__main__ import main
from cumo_kernels.backends import reference
from cumo_kernels.testing import assert_as_accurate_as_torch, make_routing
from cumo_kernels.tiles import problems, tune, tuning
from cumo_kernels.tiles.hardware import GPUS, INTERPRETER, KIB, assume, find, gpu_of, match
from cumo_kernels.tiles.tuning import Config, Entry, Problem

SOURCE = tuning.CONFIGS
SHIPPED = sorted(path.stem for path in SOURCE.glob("*.json"))
BF16 = torch.bfloat16
CARD = find("nvidia_h100")


@pytest.fixture(autouse=True)
def fresh_caches(monkeypatch):
    """Choices are cached; a test that changes their sources must neither see nor leave old ones."""
    tuning.forget()
    yield
    tuning.forget()


def all_problems():
    for shape in problems.SHAPES:
        for num_tokens in (0, 1, 16, 577, 4096, 100_000):
            for dtype in problems.DTYPES.values():
                yield from problems.layer_problems(shape, num_tokens, dtype)
    for rows, n, k, experts in ((7, 1, 1, 1), (300, 97, 33, 7), (1 << 20, 8, 100_000, 256)):
        yield Problem("gemm", BF16, rows, n, k, experts, can_split=True)
        yield Problem("weight_grad", torch.float32, rows, n, k, experts, can_split=True)


@pytest.mark.parametrize("gpu", [*GPUS, INTERPRETER], ids=lambda gpu: gpu.name)
def test_every_choice_can_run(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for problem in all_problems():
            assert tuning.refuse(tuning.get_config(problem, gpu), problem, gpu) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_entries_fit_their_gpu_and_are_found(name):
    gpu = find(name)
    assert len({entry.problem for entry in tuning.entries(name)}) == len(tuning.entries(name))
    for entry in tuning.entries(name):
        assert entry.problem.kind in tuning.KINDS
        assert tuning.refuse(entry.config, entry.problem, gpu) is None
        chosen = tuning.get_config(entry.problem, gpu)
        assert replace(chosen, SPLITS=1) == entry.config


@pytest.mark.parametrize("name", SHIPPED)
def test_entries_without_measurements_have_a_note(name):
    note = json.loads((tuning.CONFIGS / f"{name}.json").read_text())["note"]
    assert ("not measured" in note) == any(entry.ms is None for entry in tuning.entries(name))


def test_nearest_shape_wins():
    near, far = Config(64, 64, 32, 4, 3), Config(128, 128, 32, 4, 3)
    rows = [
        Entry(Problem("gemm", BF16, 128, 1024, 1024, 4), near),
        Entry(Problem("gemm", BF16, 8192, 1024, 1024, 4), far),
        Entry(Problem("gemm", torch.float32, 200, 1024, 1024, 4), far),
        Entry(Problem("grad_hidden", BF16, 200, 1024, 1024, 4), far),
        Entry(Problem("gemm", BF16, 200, 1024, 1024, 4, gated=True), far),
    ]
    asked = Problem("gemm", torch.float16, 200, 1000, 1024, 4)
    assert min(rows, key=lambda row: tuning.distance(asked, row.problem)).config == near


def test_a_card_without_a_file_uses_another_and_warns_once():
    unknown = match("NVIDIA H900 Imaginary", 90, 200, 227 * KIB)
    problem = Problem("gemm", BF16, 4096, 4096, 1024, 4)
    with pytest.warns(UserWarning, match="no tile sizes for nvidia_h900_imaginary, using those of nvidia_h"):
        config = tuning.get_config(problem, unknown)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.get_config(replace(problem, rows=8192), unknown).BLOCK_M
    assert tuning.refuse(config, problem, unknown) is None


@pytest.mark.parametrize(
    ("name", "sibling"),
    [
        ("nvidia_h200", "nvidia_h100"),
        ("nvidia_h100_pcie", "nvidia_h100"),
        ("nvidia_rtx_4090", "nvidia_l40s"),
        ("nvidia_rtx_5090", "nvidia_rtx_pro_6000"),
    ],
)
def test_a_card_with_the_same_multiprocessors_shares_a_file_without_warning(
    name, sibling, monkeypatch, tmp_path
):
    gpu, problem = find(name), Problem("gemm", BF16, 9216, 4096, 1024, 4, gathered=True)
    assert gpu.capability == find(sibling).capability
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = tuning.get_config(problem, gpu)
    nearest = min(tuning.entries(sibling), key=lambda entry: tuning.distance(problem, entry.problem))
    assert shared == tuning.fit(nearest.config, problem, gpu)

    # the card's own entries come first; other entries of its sibling remain
    (tmp_path / f"{sibling}.json").write_bytes((SOURCE / f"{sibling}.json").read_bytes())
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    own = Config(32, 32, 32, 4, 2)
    tuning.save(name, [Entry(problem, own, 0.5)], "a note")
    assert tuning.get_config(problem, gpu) == own
    other = replace(problem, dtype=torch.float32, gathered=False)
    assert other.dtype in {entry.problem.dtype for entry in tuning.entries(sibling)}
    assert tuning.get_config(other, gpu) != own


def test_fit_gives_up_stages_before_tiles():
    problem = Problem("gemm", BF16, 4096, 4096, 1024, 4)
    small = replace(CARD, shared_memory=100 * KIB)
    assert tuning.fit(Config(128, 128, 64, 8, 4), problem, small) == Config(128, 128, 64, 8, 3)
    tiny = replace(CARD, shared_memory=20 * KIB)
    assert tuning.refuse(tuning.fit(Config(128, 256, 64, 8, 4), problem, tiny), problem, tiny) is None


@pytest.mark.parametrize(
    "config, part",
    [
        (Config(96, 128, 64, 4, 3), "BLOCK_M must be a power of two, got 96"),
        (Config(8, 128, 64, 4, 3), "tiles of at least 16"),
        (Config(128, 512, 16, 16, 2), "boxes of at most 256"),
        (Config(128, 256, 64, 8, 8), "bytes of shared memory needed"),
        (Config(128, 256, 32, 4, 2), "do not fit into the registers of 4 warps"),
        (Config(128, 128, 32, 8, 2, PER_SM=4), "do not fit into the registers of one SM"),
        (Config(64, 64, 64, 4, 2, SPLITS=2), "needs the whole sum"),
    ],
)
def test_refusals_are_sentences(config, part):
    assert part in tuning.refuse(config, Problem("gemm", BF16, 4096, 4096, 1024, 4), CARD)


def test_splits_fill_the_chip_and_no_more():
    config = Config(128, 128, 64, 4, 3, PER_SM=2)
    one_image = Problem("gemm", BF16, 1154, 1024, 4096, 4, can_split=True)  # 96 tiles for 264 programs
    assert tuning.splits(one_image, config, CARD) == 2
    assert tuning.splits(replace(one_image, can_split=False), config, CARD) == 1
    assert tuning.splits(replace(one_image, rows=9232), config, CARD) == 1
    assert tuning.splits(replace(one_image, k=512), config, CARD) == 1  # too short to split
    few_tiles = Problem("weight_grad", BF16, 65536, 256, 1024, 4, can_split=True)
    assert tuning.splits(few_tiles, config, CARD) == 2  # 128 tiles of 128 x 64
    assert tuning.splits(replace(few_tiles, rows=0), config, CARD) == 1


DH = Problem("grad_hidden", BF16, 10240, 4096, 1024, 4)


def test_a_short_sum_of_dh_is_a_pair_of_blocks_and_a_long_one_is_not():
    chosen = [tuning.get_config(replace(DH, rows=36864, k=64 * steps), CARD) for steps in range(1, 128)]
    # by hand: 4608 wide tiles are 35 for one multiprocessor, 9216 narrow ones 70
    # the pair's epilogues: the mean of all but the last hidden, and none hidden
    pays = [35 * (steps * 1024 + 8800) > 70 * steps * 512 * 1.2 + 35.5 * 4400 for steps in range(1, 128)]
    assert pays == sorted(pays, reverse=True) and pays.count(True) == 21
    assert chosen == [tuning.PAIR if pay else tuning.WIDE for pay in pays]
    # CLIP with 1, 8 and 40 crops; the connector with 4 and 32 pictures
    sizes = [(1280, 1024), (10240, 1024), (49152, 1024), (4608, 4096), (36864, 4096)]
    pair = [tuning.get_config(replace(DH, rows=rows, k=k), CARD) == tuning.PAIR for rows, k in sizes]
    assert pair == [True, True, True, False, False]


@pytest.mark.parametrize("changed", [{"n": 4104}, {"n": 4100}, {"k": 1048}])
def test_dh_with_partial_tiles_has_one_block_per_multiprocessor(changed):
    many = tuning.WIDE if "k" in changed else tuning.SQUARE
    for rows, config in {1280: tuning.SQUARE, 10240: many}.items():
        assert tuning.get_config(replace(DH, rows=rows, **changed), CARD) == config


def test_dh_in_fp16_has_one_block_per_multiprocessor():
    sizes = {1280: tuning.SQUARE, 10240: tuning.WIDE}  # 3 * (16 * 614 + 4400) < 2 * (16 * 1024 + 8800)
    for rows, config in sizes.items():
        assert tuning.get_config(replace(DH, rows=rows, dtype=torch.float16), CARD) == config


def test_a_pair_of_dh_fits_one_multiprocessor():
    for gpu in (gpu for gpu in GPUS if gpu.capability == 90):
        needed = tuning.shared_memory(tuning.PAIR, DH) + KIB  # memory that each block reserves
        assert tuning.PAIR.PER_SM * needed <= gpu.shared_memory + KIB
        for config in (tuning.PAIR, tuning.WIDE, tuning.SQUARE):
            assert tuning.refuse(config, DH, gpu) is None


@pytest.mark.parametrize(
    ("changed", "gpu"),
    [
        ({"gated": True}, CARD),  # spills
        ({"kind": "gemm"}, CARD),
        ({"rows": 128}, CARD),  # small tiles are not changed
        ({}, find("nvidia_b200")),
        ({}, find("nvidia_a100")),
    ],
)
def test_other_gemms_have_the_tiles_of_their_file(changed, gpu):
    problem = replace(DH, **changed)
    known = tuning.entries(tuning.files_of(gpu)[0])
    nearest = min(known, key=lambda entry: tuning.distance(problem, entry.problem)).config
    assert tuning.get_config(problem, gpu) == tuning.fit(nearest, problem, gpu)


def test_dh_in_fp32_is_not_changed():
    assert tuning.hide_end(tuning.SQUARE, replace(DH, dtype=torch.float32), CARD) == tuning.SQUARE


def test_a_measured_choice_is_not_replaced_by_an_estimate(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    tuning.save("nvidia_h100", [Entry(DH, tuning.WIDE, 0.5)], "a note")
    assert tuning.get_config(DH, CARD) == tuning.WIDE


def test_bucket_is_near_and_monotone():
    buckets = [tuning.bucket(rows) for rows in range(5000)]
    assert buckets == sorted(buckets) and len(set(buckets)) < 90
    assert all(rows <= found <= rows * 1.13 for rows, found in enumerate(buckets))


def test_batch_invariant_mode_ignores_the_number_of_rows(monkeypatch):
    monkeypatch.setattr(tuning, "BATCH_INVARIANT", True)
    chosen = {
        tuning.get_config(Problem("gemm", BF16, rows, 1024, 4096, 4, can_split=True), CARD)
        for rows in (1, 64, 1154, 100_000)
    }
    assert len(chosen) == 1 and chosen.pop().SPLITS == 1


def test_the_choice_is_printed_once(monkeypatch, capsys):
    monkeypatch.setattr(tuning, "PRINT_CONFIG", True)
    problem = Problem("gemm", BF16, 1154, 4096, 1024, 4)
    for _ in range(3):
        tuning.get_config(problem, CARD)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "rows=1154" in printed and "configs/nvidia_h100" in printed


def test_search_walks_to_the_fastest_neighbour(monkeypatch):
    problem = Problem("gemm", BF16, 9216, 4096, 1024, 4, gathered=True)
    goal = Config(128, 128, 32, 4, 4, PER_SM=1)
    unlike = lambda config: sum(getattr(config, name) != getattr(goal, name) for name in tuning.STEPS)
    found = tuning.search(problem, CARD, lambda config: 1.0 + unlike(config), seconds=60)
    assert found.ms < 1.0 + unlike(tuning.get_config(problem, CARD)) and unlike(found.config) <= 2
    start = tuning.search(problem, CARD, lambda config: 1.0, seconds=0)
    assert start.config == replace(tuning.get_config(problem, CARD), SPLITS=1)


def test_search_compiles_all_neighbours_before_it_times_one():
    problem, prepared = Problem("gemm", BF16, 9216, 4096, 1024, 4, gathered=True), []

    def time_ms(config):
        assert config in prepared
        return 1.0

    tuning.search(problem, CARD, time_ms, seconds=60, prepare=prepared.extend)
    assert len(prepared) == len(set(prepared)) > 8


def test_a_workers_kernels_are_in_tritons_cache(monkeypatch, tmp_path):
    """As another process would leave them."""
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "gpu_of", lambda device: CARD)
    problem = Problem("grad_hidden", BF16, 64, 64, 64, 2, gated=True, gathered=True)
    tune.compile_for(CARD, problem, Config(32, 32, 32, 4, 2))
    assert list(tmp_path.rglob("grad_hidden_kernel.cubin"))


def test_save_replaces_entries_of_the_same_problem_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    first = Entry(Problem("gemm", BF16, 128, 64, 64, 4), Config(64, 64, 32, 4, 3), 0.5)
    other = Entry(Problem("weight_grad", BF16, 128, 64, 64, 4), Config(32, 64, 64, 4, 3))
    tuning.save("card", [first, other], "a note")
    better = replace(first, config=Config(128, 64, 32, 4, 3, FLATTEN=True), ms=0.25)
    tuning.save("card", [better], "a note")
    assert tuning.entries("card") == (better, other)
    with pytest.raises(TypeError):
        tuning.save("card", [replace(first, ms=object())], "cannot be written")
    assert tuning.entries("card") == (better, other)
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_hardware_rows():
    assert match("NVIDIA H100 80GB HBM3", 90, 132, 227 * KIB) == find("nvidia_h100")
    assert match("NVIDIA H100 PCIe", 90, 114, 227 * KIB).name == "nvidia_h100_pcie"
    assert match("NVIDIA A100-SXM4-80GB", 80, 108, 163 * KIB).tflops_16 == 312
    assert match("NVIDIA GeForce RTX 4090 D", 89, 114, 99 * KIB).sms == 114
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'abacus'"):
        find("abacus")
    assert gpu_of(torch.device("cpu")) == INTERPRETER
    with assume(CARD):
        assert gpu_of(torch.device("meta")) == CARD


def test_tune_declines_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--shape", "clip"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().out


def test_a_gemm_that_never_ran_is_not_saved(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    monkeypatch.setattr(tuning, "gpu_of", lambda device: CARD)
    monkeypatch.setattr(tune, "launcher", lambda problem, device: None)
    monkeypatch.setattr(tune, "compile_for", lambda *what: None)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))
    asked = iter(range(10**6))  # in the second run the first GEMM's configs run, the others' do not
    ran = lambda launch, config, device: 1.0 if next(asked) < 3 else math.inf
    before = (SOURCE / "nvidia_h100.json").read_text()
    (tmp_path / "nvidia_h100.json").write_text(before)
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    for time_ms, saved in ((lambda launch, config, device: math.inf, False), (ran, True)):
        monkeypatch.setattr(tune, "time_ms", time_ms)
        assert main(["tune", "--shape", "clip"]) == 1
        after = (tmp_path / "nvidia_h100.json").read_text()
        assert (after != before) == saved and "Infinity" not in after
        assert "no candidate ran" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not JSON compliant"):
        tuning.save(
            "nvidia_h100",
            [Entry(Problem("gemm", BF16, 1, 1, 1, 1), Config(32, 32, 32, 4, 2), math.inf)],
            "a note",
        )


TILES = [
    pytest.param(Config(16, 16, 16, 4, 2, GROUP_M=1), id="smallest-tile-decode"),
    pytest.param(Config(64, 32, 32, 4, 2, GROUP_M=4, FLATTEN=True), id="flattened"),
    pytest.param(Config(16, 64, 16, 1, 2, GROUP_M=2, SPLITS=2), id="two-partial-sums"),
    pytest.param(Config(32, 16, 32, 4, 1, GROUP_M=8, SPLITS=4), id="more-partial-sums-than-steps"),
    pytest.param(Config(64, 128, 64, 4, 2), id="one-tile-for-all-in-parts"),
]


@pytest.fixture
def with_tiles(monkeypatch, device, request):
    """Force one config on every GEMM, within the limits of its kind."""
    config = request.param

    def choose(problem, gpu):
        flatten = config.FLATTEN and problem.kind != "weight_grad"
        return replace(config, FLATTEN=flatten, SPLITS=config.SPLITS if problem.can_split else 1)

    monkeypatch.setattr(tuning, "get_config", choose)


@pytest.mark.parametrize("with_tiles", TILES, indirect=True)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_any_tile_gives_the_same_layer(backend, device, with_tiles, activation):
    routing = make_routing("skewed", 45, 5, 2, device)
    width = 80 if activation == "swiglu" else 40
    x, up, down = (torch.randn(s, device=device) / 4 for s in ((45, 48), (5, width, 48), (5, 24, 40)))
    biases = torch.randn(5, width, device=device), torch.randn(5, 24, device=device)
    plan = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)

    def op(x, weights, *parameters):
        chosen = routing_from_topk(weights, routing.topk_indices, routing.num_experts)
        return expert_mlp(x, chosen, *parameters, activation)

    def expected(x, weights, *parameters):
        return reference.expert_mlp(x, weights, *plan, *parameters, activation, "none")[0]

    with use_backend(backend):
        assert_as_accurate_as_torch(op, expected, x, routing.topk_weights, up, down, *biases)


@pytest.mark.parametrize("with_tiles", TILES, indirect=True)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_any_tile_gives_the_same_rows(backend, device, with_tiles):
    offsets = torch.tensor([0, 0, 33, 40], dtype=torch.int32, device=device)
    x, weight = torch.randn(44, 70, device=device), torch.randn(3, 50, 70, device=device) / 8
    bias = torch.randn(3, 50, device=device)
    with use_backend(backend):
        assert_as_accurate_as_torch(
            lambda x, w, b: grouped_gemm(x, w, offsets, bias=b),
            lambda x, w, b: reference.grouped_gemm(x, w, offsets, b, None, None, 1, None)[0],
            x,
            weight,
            bias,
        )
