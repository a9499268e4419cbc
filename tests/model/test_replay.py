"""replay_routing: the same bits, the same experts after a change, recomputation, compile, named errors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cumo_model import MoELayer, record_routing, replay_routing
from cumo_model.model import replay

H, E, K, T = 8, 6, 2, 12
ROUTERS = {
    "plain": None,
    "bias": {"score": "sigmoid", "selection_bias": True, "expert_groups": 2, "top_groups": 1, "scale": 2.5},
    "noisy": {"noisy": True},
    "jitter": {"jitter": 0.3},
    "limited": {"capacity_factor": 0.5, "drop": "weight"},
}


def make(router=None, layer=0, place="llm", dtype=torch.float32):
    made = MoELayer(H, 5, E, K, "gelu", router=router, place=place, layer=layer)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    if made.selection_bias is not None:
        made.selection_bias.normal_()
    return made.to(dtype)


def change(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))


def chosen(records):
    return [record.topk_indices for record in records]


def trained(layer, x, run=None):
    """Output, record, and all gradients of one training step with a random upstream gradient."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with record_routing() as records:
        out = (run or layer)(x)
    stats = records[0].routing.stats
    loss = (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum() + stats.mean_probs[:, 0].sum()
    loss = (
        loss + stats.mean_squared_logsumexp.sum() + (0 if records[0].balance is None else records[0].balance)
    )
    loss.backward()
    return [out, x.grad, *(p.grad for p in layer.parameters())], records


def equal(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_replayed_step_has_the_same_bits_and_the_same_records(router, dtype):
    layer, x = make(router, dtype=dtype), torch.randn(T, H, dtype=dtype)
    first, records = trained(layer, x)
    with replay_routing(records):
        second, again = trained(layer, x)
    equal(second, first)
    for name in ("topk_indices", "chosen", "seed", "balance"):
        equal([getattr(again[0], name)], [getattr(records[0], name)])
    for name in ("topk_weights", "topk_indices", "permutation", "tokens_per_expert"):
        assert torch.equal(getattr(again[0].routing, name), getattr(records[0].routing, name))
    with replay_routing(again):
        equal(trained(layer, x)[0], first)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_after_a_change_of_the_parameters_the_experts_are_those_of_the_records(router):
    layer, x = make(router), torch.randn(T, H)
    records = trained(layer, x)[1]
    change(layer)
    own = trained(layer, x)[1]
    with replay_routing(records):
        found = trained(layer, x)[1]
    assert torch.equal(found[0].topk_indices, records[0].topk_indices)
    assert not torch.equal(own[0].topk_indices, records[0].topk_indices)
    assert not torch.equal(found[0].routing.topk_weights, records[0].routing.topk_weights)


def test_a_whole_model_has_the_same_bits(tiny_model, tiny_batch):
    model, batch = tiny_model(text="mixtral").train(), tiny_batch()
    batch["attention_mask"][0, 16:] = 0
    found = []
    records = None
    for blocks in (0, 1):
        model.zero_grad()
        if blocks:
            with record_routing() as again, replay_routing(records):
                loss = model(**batch).loss
            equal(chosen(again), chosen(records))
        else:
            with record_routing() as records:
                loss = model(**batch).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    equal(found[1], found[0])
    assert len(records) == 3 + 1 + 2


def test_the_choices_of_another_engine(tiny_model, tiny_batch):
    """They name their layers, in any order, and have none of the layer of which only the router runs."""
    model, batch = tiny_model(text="mixtral").train(), tiny_batch()
    with record_routing() as records:
        model(**batch)
    made = [
        {"place": r.place, "layer": r.layer, "topk_indices": (r.topk_indices.long() + 1) % 4}
        for r in reversed(records)
        if (r.place, r.layer) != ("clip", 2)
    ]
    with replay_routing(made), record_routing() as found:
        model(**batch)
    assert len(found) == len(made) + 1
    for one, other in zip(found, records, strict=True):
        if (one.place, one.layer) != ("clip", 2):
            assert torch.equal(one.topk_indices, (other.topk_indices + 1) % 4)


def test_the_records_of_generate_joined_are_those_of_one_pass(tiny_model, tiny_batch):
    model, batch, parts = tiny_model(text="mixtral").eval(), tiny_batch(), {}
    row = {"input_ids": batch["input_ids"][:1], "pixel_values": batch["pixel_values"][:1]}
    with record_routing() as records:
        ids = model.generate(**row, max_new_tokens=4, min_new_tokens=4, do_sample=True)
    for record in records:
        parts.setdefault((record.place, record.layer), []).append(record.topk_indices)
    assert [len(calls) for (place, _), calls in parts.items() if place == "llm"] == [4, 4]
    joined = [
        {"place": place, "layer": layer, "topk_indices": torch.cat(calls)}
        for (place, layer), calls in parts.items()
    ]
    change(model)
    with replay_routing(joined), record_routing() as again:
        model.train()(input_ids=ids[:, :-1], pixel_values=row["pixel_values"])
    found = {(record.place, record.layer): record.topk_indices for record in again}
    assert all(torch.equal(found[one["place"], one["layer"]], one["topk_indices"]) for one in joined)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.int8, torch.uint8, torch.int16])
def test_tensors_are_taken_in_the_order_of_the_calls(kind):
    layers, x = [make(layer=i) for i in range(2)], torch.randn(3, H)
    given = [torch.tensor([[0, 1], [2, 3], [4, E]], dtype=kind), torch.tensor([[5, 4]] * 3, dtype=kind)]
    with replay_routing(given), record_routing() as records:
        for layer in layers:
            layer(x)
    assert torch.equal(records[0].topk_indices, given[0].int())
    assert torch.equal(records[1].topk_indices, given[1].int())
    assert records[0].routing.topk_weights[2, 1] == 0  # a dropped slot


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    layer, x = make(), torch.randn(num_tokens, H)
    with record_routing() as records:
        out = layer(x)
    with replay_routing(records):
        assert torch.equal(layer(x), out)


def test_calls_of_one_layer_take_their_records_in_turn():
    layer, inputs = make(), [torch.randn(T, H) for _ in range(3)]
    with record_routing() as records:
        for x in inputs:
            layer(x)
    change(layer)
    with replay_routing(records), record_routing() as again:
        for x in inputs:
            layer(x)
    equal(chosen(again), chosen(records))


def test_the_innermost_block_counts_and_afterwards_routers_choose_again():
    layer, x = make(), torch.randn(3, H)
    outer, inner = torch.tensor([[0, 1]] * 3), torch.tensor([[2, 3]] * 3)
    with record_routing() as records:
        with replay_routing([outer]):
            with replay_routing([inner]):
                layer(x)
            layer(x)
        layer(x)
    assert torch.equal(records[0].topk_indices, inner.int()) and torch.equal(
        records[1].topk_indices, outer.int()
    )
    assert torch.equal(records[2].topk_indices, layer.route(x).topk_indices)


# recomputation


def rematerialised(layer):
    return lambda x: checkpoint(layer, x, use_reentrant=False)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_recomputation_takes_the_record_of_its_call_also_after_the_block(router):
    """Other parameters than those of the records, so that the router would choose other experts."""
    layer, x = make(router), torch.randn(T, H)
    records = trained(layer, x)[1]
    change(layer)
    with replay_routing(records):
        wanted, _ = trained(layer, x)
    with replay_routing(records):
        equal(trained(layer, x, rematerialised(layer))[0], wanted)

    layer.zero_grad()
    y = x.clone().requires_grad_()
    with replay_routing(records), record_routing() as again:
        out = rematerialised(layer)(y)
    stats = again[0].routing.stats
    loss = (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum() + stats.mean_probs[:, 0].sum()
    loss = loss + stats.mean_squared_logsumexp.sum() + (0 if again[0].balance is None else again[0].balance)
    with replay_routing([]):  # another block has no part in it
        loss.backward()
    equal([out, y.grad, *(p.grad for p in layer.parameters())], wanted)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_recomputations_of_several_calls_take_each_their_own(order):
    layer, inputs = make(), [torch.randn(T, H) for _ in range(2)]
    given = [torch.stack([torch.randperm(E)[:K] for _ in range(T)]) for _ in range(2)]

    def gradients(run):
        layer.zero_grad()
        with replay_routing(given):
            outs = [run(x.clone().requires_grad_()) for x in inputs]
        for number in order:
            outs[number].square().sum().backward()
        return [p.grad for p in layer.parameters()]

    equal(gradients(rematerialised(layer)), gradients(layer))


def test_two_calls_in_one_frame_and_two_backward_passes():
    layer, x = make(), torch.randn(T, H)
    given = [torch.stack([torch.randperm(E)[:K] for _ in range(T)]) for _ in range(2)]
    twice = lambda x: layer(layer(x))

    def gradients(run):
        layer.zero_grad()
        with replay_routing(given):
            out = run(x.clone().requires_grad_()).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        return [p.grad for p in layer.parameters()]

    equal(gradients(lambda x: checkpoint(twice, x, use_reentrant=False)), gradients(twice))


def test_a_block_inside_a_frame_is_made_again():
    layer, x = make(), torch.randn(T, H)
    given = [torch.stack([torch.randperm(E)[:K] for _ in range(T)])]

    def inside(x):
        with replay_routing(given):
            return layer(x)

    wanted, found = (
        trained(layer, x, inside)[0],
        trained(layer, x, lambda x: checkpoint(inside, x, use_reentrant=False)),
    )
    equal(found[0], wanted)


def test_a_pass_that_was_not_replayed_is_recomputed_as_it_was():
    layer, x = make(), torch.randn(T, H)
    with replay_routing([torch.tensor([[0, 1]] * T)]):
        layer(x)
    out = rematerialised(layer)(y := x.clone().requires_grad_())
    layer.zero_grad()
    with replay_routing([torch.tensor([[0, 1]] * T)]):
        out.sum().backward()
        layer(x)
    found = [y.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    layer(z := x.clone().requires_grad_()).sum().backward()
    equal(found, [z.grad, *(p.grad for p in layer.parameters())])


def test_a_checkpointed_model_replays(tiny_model, tiny_batch):
    model, batch = tiny_model(text="mixtral").train(), tiny_batch()
    with record_routing() as records:
        model(**batch)
    change(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        with replay_routing(records):
            loss = model(**batch).loss
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    equal(found[1], found[0])


@pytest.mark.parametrize("way", ["reentrant", "nested"])
def test_recomputation_whose_record_is_unknown_is_refused(way):
    layer, x = make(), torch.randn(T, H, requires_grad=True)
    again = rematerialised(layer)
    with replay_routing([torch.tensor([[0, 1]] * T)] * (1 if way == "reentrant" else 2)):
        if way == "reentrant":
            out = checkpoint(layer, x, use_reentrant=True)
        else:
            out = checkpoint(lambda x: again(again(x)), x, use_reentrant=False)
    with pytest.raises(ValueError, match=r"use_reentrant must be False, .* layer 0 of 'llm' runs again"):
        out.sum().backward()


def test_hooks_of_saved_tensors_without_recomputation_do_no_harm():
    layer, x = make(), torch.randn(T, H)
    given = [torch.stack([torch.randperm(E)[:K] for _ in range(T)])]

    def run(x):
        with torch.autograd.graph.save_on_cpu():
            return layer(x)

    with replay_routing(given):
        wanted, _ = trained(layer, x)
    with replay_routing(given):
        equal(trained(layer, x, run)[0], wanted)


def test_nothing_of_a_graph_is_kept():
    layer, x = make(), torch.randn(T, H, requires_grad=True)
    before = len(replay._memos)
    with replay_routing([torch.tensor([[0, 1]] * T)]):
        out = rematerialised(layer)(x)
    assert len(replay._memos) == before + 1
    out.sum().backward()
    del out
    assert len(replay._memos) == before


# torch.compile


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_compiled_layer_replays_in_one_graph(router):
    layer, x = make(router), torch.randn(T, H)
    records = trained(layer, x)[1]
    change(layer)
    with replay_routing(records):
        wanted = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with replay_routing(records), record_routing() as again:
            found = compiled(x)
        equal(chosen(again), chosen(records))
        assert torch.equal(found, wanted)
    found = compiled(x)
    if router is None:
        assert torch.equal(found, layer(x))
    others = [torch.stack([torch.randperm(E)[:K] for _ in range(T)])]
    with replay_routing(others), record_routing() as again:
        compiled(x)
    assert torch.equal(again[0].topk_indices, others[0].int())


def test_checkpointing_inside_a_compiled_function_replays_also_after_the_block():
    layers, x = torch.nn.ModuleList([make(layer=i) for i in range(2)]), torch.randn(T, H)
    given = [torch.stack([torch.randperm(E)[:K] for _ in range(T)]) for _ in layers]

    def whole(x, run):
        for layer in layers:
            x = run(layer)(x)
        return x

    def gradients(run):
        layers.zero_grad()
        with replay_routing(given):
            out = run(y := x.clone().requires_grad_())
        out.square().sum().backward()
        return [out, y.grad, *(p.grad for p in layers.parameters())]

    wanted = gradients(lambda x: whole(x, lambda layer: layer))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: whole(x, rematerialised), backend="aot_eager")
    for _ in range(2):
        equal(gradients(compiled), wanted)


@pytest.mark.parametrize("way", [True, False], ids=["reentrant", "frame"])
@pytest.mark.parametrize("was_compiled_before", [False, True])
def test_a_compiled_layer_inside_checkpointing_is_refused(way, was_compiled_before):
    """Its recomputation would choose experts by itself, without an error."""
    layer, x = make(layer=3), torch.randn(T, H, requires_grad=True)
    torch._dynamo.reset()
    compiled, given = torch.compile(layer, backend="aot_eager"), [torch.tensor([[0, 1]] * T)]
    if was_compiled_before:
        with replay_routing(given):
            compiled(x).sum().backward()
    message = r"torch.compile must be around activation checkpointing.*: got a compiled layer 3 of 'llm' that"
    with pytest.raises(ValueError, match=message), replay_routing(given):
        checkpoint(compiled, x, use_reentrant=way)
    checkpoint(compiled, x, use_reentrant=way).sum().backward()  # without a replay there is nothing to lose


# errors


def test_a_call_without_a_record_is_named():
    layer, x = make(layer=3), torch.randn(T, H)
    with record_routing() as records:
        layer(x)
    message = r"records must have one for each call of a layer, got 1 of layer 3 of 'llm', which runs again"
    with pytest.raises(ValueError, match=message), replay_routing(records):
        layer(x)
        layer(x)
    with pytest.raises(ValueError, match=r"got 0 of layer 1 of 'mlp', which"), replay_routing(records):
        make(layer=1, place="mlp")(x)
    with pytest.raises(ValueError, match=r"got 1, which runs again"), replay_routing(chosen(records)):
        layer(x), layer(x)


def test_a_record_that_is_left_is_named():
    layer, x = make(layer=3), torch.randn(T, H)
    with record_routing() as records:
        layer(x), layer(x)
    message = (
        r"records must have one for each call of a layer, got 2 of layer 3 of 'llm', of which 1 were used"
    )
    with pytest.raises(ValueError, match=message), replay_routing(records):
        layer(x)
    with pytest.raises(ValueError, match=r"got 2, of which 0 were used"), replay_routing(chosen(records)):
        pass
    with pytest.raises(RuntimeError, match=r"stop"), replay_routing(records):
        raise RuntimeError("stop")
    assert torch.equal(layer.route(x).topk_indices, records[0].topk_indices)


def test_records_of_other_sizes_are_named():
    layer, x = make(), torch.randn(T, H)
    with record_routing() as records:
        layer(x)
        MoELayer(H, 5, E + 1, K, "gelu", place="llm")(x)
    for call, message in (
        (lambda: layer(x[:5]), r"topk_indices of \(5, 2\) for layer 0 of 'llm', got \(12, 2\)"),
        (
            lambda: MoELayer(H, 5, E, 1, "gelu", place="llm")(x),
            r"topk_indices of \(12, 1\) for layer 0 of 'llm', got \(12, 2\)",
        ),
        (
            lambda: MoELayer(H, 5, E + 1, K, "gelu", place="llm")(x),
            r"records must be of 7 experts for layer 0 of 'llm', got 6",
        ),
    ):
        with pytest.raises(ValueError, match=message), replay_routing(records):
            call()
    for wrong, message in (
        (torch.full((T, K), E + 1), r"lie in \[0, 6\] in records\[1\], of layer 0 of 'llm', got .* 7 to 7"),
        (torch.full((T, K), -1), r"lie in \[0, 6\] in records\[1\], of layer 0 of 'llm', got .* -1 to -1"),
        (torch.tensor([[0, 1]] * 3 + [[2, 2]] * (T - 3)),
         r"once in a row in records\[1\], of layer 0 of 'llm', got \[2, 2\] for token 3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"topk_indices must .*{message}"):
            with replay_routing([torch.full((T, K), E), wrong]):  # all slots of the first are dropped
                layer(x), layer(x)
    with pytest.raises(ValueError, match=r"compat must be None"), replay_routing([records[0].topk_indices]):
        MoELayer(H, 5, E, K, "gelu", compat="cumo", place="llm")(x)


NAMED = {"place": "llm", "layer": 0, "topk_indices": torch.zeros(2, 2).int()}


@pytest.mark.parametrize(
    "records, message",
    [
        (torch.zeros(2, 2), r"records must be a list of records, got Tensor"),
        (None, r"records must be a list of records, got NoneType"),
        ([[0, 1]], r"records must be RoutingRecords, dicts or tensors of expert indices, got list"),
        (
            [torch.zeros(2, 2)],
            r"must have \(T, K\) int32 or int64 topk_indices, got \(2, 2\) torch.float32",
        ),
        ([torch.zeros(2, dtype=torch.int32)], r"records must have \(T, K\) int32 or int64 .*, got \(2,\)"),
        ([{"place": "llm", "layer": 0}], r"records must be dicts with place, layer, topk_indices, got keys"),
        ([{"place": "llm", 0: 0}], r"records must be dicts with .*, got keys \['place', 0\]"),
        ([{**NAMED, "place": ["llm"]}], r"records\[0\] must have a string as place, got list"),
        ([NAMED, {**NAMED, "layer": 0.0}], r"layer of records\[1\] must be an int, got 0.0"),
        (
            [torch.zeros(2, 2).int(), {"place": "llm", "layer": 0, "topk_indices": torch.zeros(2, 2).int()}],
            r"records must all name their layers or none of them, got both",
        ),
    ],
)
def test_wrong_records_are_named(records, message):
    with pytest.raises(ValueError, match=message), replay_routing(records):
        pass
