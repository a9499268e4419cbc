"""record_routing is per thread and per call: threads, nested blocks, checkpointing, compile, backward."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cumo_model import MoELayer, record_routing

THREADS = 4


def in_threads(run):
    """Run run(i) in several threads that start together."""
    together, failed = threading.Barrier(THREADS), []

    def begin(i):
        together.wait()
        try:
            run(i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=begin, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_models_trained_in_threads_have_the_losses_they_have_alone(tiny_model, tiny_batch):
    models, batch = [tiny_model(text="mixtral").train() for _ in range(THREADS)], tiny_batch()
    alone = [model(**batch).loss_parts for model in models]
    for _ in range(3):
        found = [None] * THREADS

        def run(i, found=found):
            found[i] = models[i](**batch).loss_parts

        in_threads(run)
        assert found == alone


def test_requests_to_one_model_in_threads_have_their_own_statistics(tiny_model, tiny_batch):
    model, batch = tiny_model(text="mixtral").eval(), tiny_batch()
    shapes = [None] * THREADS

    def run(i):
        stats = model(**batch, output_router_stats=True, output_router_logits=True)
        shapes[i] = stats.router_stats["llm"]["mean_probs"].shape[0], len(stats.router_logits)

    in_threads(run)
    assert shapes == [(2, 2)] * THREADS


def test_a_block_records_its_own_thread_only():
    layer, x = MoELayer(8, 6, 4, 2, "gelu"), torch.randn(5, 8)
    with record_routing() as records:
        thread = threading.Thread(target=lambda: layer(x))
        thread.start()
        thread.join()
        assert records == []
        layer(x)
    layer(x)
    assert len(records) == 1


def test_nested_blocks_each_get_all_records_and_only_those_who_ask_get_logits():
    layer, x = MoELayer(8, 6, 4, 2, "gelu"), torch.randn(5, 8)
    with record_routing() as outer:
        layer(x)
        with record_routing(logits=True) as inner:
            layer(x)
        layer(x)
    assert [len(outer), len(inner)] == [3, 1]
    assert all(record.logits is None for record in outer)
    assert torch.equal(inner[0].logits, layer.gate(x))
    with pytest.raises(RuntimeError, match="stop"), record_routing() as failed:
        raise RuntimeError("stop")
    layer(x)
    assert failed == []


def test_recomputation_is_not_recorded_but_a_call_inside_backward_is():
    layer, x = MoELayer(8, 6, 4, 2, "gelu"), torch.randn(5, 8, requires_grad=True)
    inside = []

    def call_again(grad):
        with record_routing() as records:
            layer(x)
        inside.append(len(records))

    with record_routing() as records:
        out = checkpoint(layer, x, use_reentrant=False)
        out.register_hook(call_again)
        out.sum().backward()
    assert len(records) == 1 and inside == [1]


@pytest.mark.parametrize("whole", [True, False])
def test_router_logits_under_activation_checkpointing(tiny_model, tiny_batch, whole):
    """Recomputation runs without the recorder that asked for them, and leaves the same padding out."""
    model, batch = tiny_model(text="mixtral").train(), tiny_batch()
    batch["attention_mask"][0, 16:] = 0
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        out = model(**batch, output_router_logits=True, use_cache=False)
        logits = (*out.router_logits, *out.vision_router_logits, *out.projector_router_logits)
        ((out.loss if whole else out.aux_loss) + sum(x.square().mean() for x in logits)).backward()
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert sum(grad is not None for grad in found[0]) > 60
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_compiled_calls_record_in_their_own_block_and_in_one_around_them():
    layer, x = MoELayer(8, 6, 4, 2, "gelu"), torch.randn(5, 8)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(x):
        with record_routing() as records:
            out = layer(x)
        return out, records[0].routing.stats.mean_probs

    out, probs = call(x)
    assert torch.equal(probs, layer.route(x).stats.mean_probs) and torch.equal(out, layer(x))
    with record_routing() as outer:
        call(x)
    assert len(outer) == 1
    counts = []

    def run(i):
        with record_routing() as records:
            call(x)
        counts.append(len(records))

    in_threads(run)
    assert counts == [1] * THREADS
    call(x)
    assert len(outer) == 1


def test_blocks_may_end_in_another_order_than_they_began():
    """As those of generators do."""
    layer, x = MoELayer(8, 6, 4, 2, "gelu"), torch.randn(5, 8)

    def steps():
        with record_routing() as records:
            layer(x)
            yield
            layer(x)
        yield records

    first, second = steps(), steps()
    next(first), next(second)
    assert [len(next(first)), len(next(second))] == [3, 3]
    layer(x)
    with record_routing() as records:
        layer(x)
    assert len(records) == 1


def test_only_the_layers_of_one_module_on_request():
    layers, x = [MoELayer(8, 6, 4, 2, "gelu") for _ in range(2)], torch.randn(5, 8)
    with record_routing(of=layers[1]) as records:
        for layer in layers:
            layer(x)
    assert len(records) == 1
    assert torch.equal(records[0].routing.topk_indices, layers[1].route(x).topk_indices)


def test_models_built_in_threads_have_initial_weights(tiny_config):
    """Looking at a decoder that is not known yet must not change how other threads initialise theirs."""
    from cumo_model import CumoForConditionalGeneration

    before, bad = torch.nn.init.normal_, []

    def build(i):
        for size in range(3):
            config = tiny_config(text_options={"vocab_size": 50 + 10 * i + size})
            for name, parameter in CumoForConditionalGeneration(config).named_parameters():
                if not parameter.isfinite().all() or parameter.abs().max() > 10:
                    bad.append(name)

    in_threads(build)
    assert bad == [] and torch.nn.init.normal_ is before
    assert torch.nn.Linear(8, 8).weight.abs().max() < 1
