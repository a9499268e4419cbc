"""Answers of a model in this process: greedy, sampled, streamed and in batches; errors of conversations."""

import itertools
import threading

import pytest
import torch
from PIL import Image

from cumo_model import CumoForConditionalGeneration
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.processor import build_processor
from cumo_model.serving.local import Local, load
from cumo_model.serving.messages import check_conversation, user_message
from cumo_model.serving.replies import CONTEXT, LENGTH, STOP
from cumo_model.serving.sampling import Sampling
from tests.model.serving.conftest import write_checkpoint

RED, BLUE = Image.new("RGB", (20, 14), "red"), Image.new("RGB", (9, 30), "blue")
SAID = {"role": "assistant", "content": "a red apple"}
TALKS = {
    "a picture": [user_message("what is it?", [RED])],
    "text only": [user_message("a red apple or two green pears?")],
    "two pictures": [user_message("which is it?", [RED, BLUE])],
    "two turns": [user_message("what is it?", [BLUE]), SAID, user_message("near the old house?", [RED])],
    "a system text": [{"role": "system", "content": "the blue door"}, user_message("what?", [RED])],
}


def by_hand(engine, messages, tokens):
    """Greedy tokens of an engine's model, one whole forward pass for each, and their text."""
    processor, model = engine.processor, engine.model
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids, found = inputs.pop("input_ids"), []
    del inputs["attention_mask"]
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, **inputs, use_cache=False).logits[0, -1]
        found.append(int(logits.argmax()))
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
        if found[-1] == 2:
            break
    return processor.tokenizer.decode(found, skip_special_tokens=True).strip(), len(found)


@pytest.mark.parametrize("kind", TALKS)
def test_an_answer_is_greedy_and_of_the_length_asked_for(talker, kind):
    """Whatever the generation config says; the tokens are those of the largest logits."""
    talker.model.double()
    talker.model.generation_config.update(do_sample=True, temperature=5.0, max_new_tokens=2, top_k=3)
    wanted, tokens = by_hand(talker, TALKS[kind], 7)
    reply = talker.stream(TALKS[kind], Sampling(7)).read()
    assert (reply.text, reply.tokens) == (wanted, tokens)
    assert reply.finish == (LENGTH if tokens == 7 else STOP)


def test_answers_of_a_batch_are_those_of_each_alone(talker):
    talker.model.double()
    talks = list(TALKS.values())
    alone = [talker.stream(talk, Sampling(9)).read() for talk in talks]
    assert talker.answers(talks, Sampling(9)) == alone
    assert len({reply.text for reply in alone}) == len(alone)  # the pictures and turns matter
    assert talker.answers([], Sampling(9)) == []


def test_a_batch_whose_answers_reach_the_end_of_the_context_is_answered_row_by_row(talker):
    talker.model.double().generation_config.eos_token_id = None
    talks = [TALKS["text only"], [user_message("a red apple " * 130)], TALKS["a picture"]]
    replies = talker.answers(talks, Sampling(150))
    room = 512 - replies[1].prompt_tokens
    assert [(r.finish, r.tokens) for r in replies] == [(LENGTH, 150), (CONTEXT, room), (LENGTH, 150)]
    assert replies == [talker.stream(talk, Sampling(150)).read() for talk in talks]


def test_the_end_of_the_context_ends_an_answer_and_is_said(talker):
    talker.model.generation_config.eos_token_id = None
    reply = talker.stream(TALKS["a picture"], Sampling(5000)).read()
    assert reply.finish == CONTEXT and reply.tokens == 512 - reply.prompt_tokens
    assert f"cut after {reply.tokens} tokens" in reply.note


def test_a_conversation_longer_than_the_context_is_refused_before_it_is_generated(talker):
    talk = [user_message("a red apple " * 400)]
    for ask in (talker.check, talker.stream, lambda talk: talker.answers([TALKS["text only"], talk])):
        with pytest.raises(ValueError, match="must have fewer than 512 tokens, the model's context, got "):
            ask(talk)
    with pytest.raises(ValueError, match="conversation 2: "):
        talker.answers([TALKS["text only"], talk])


def test_samples_repeat_with_their_seed_and_come_from_all_words(talker):
    """transformers' own default would sample from 50 words."""
    said = [talker.stream(TALKS["a picture"], Sampling(20, 2.0, seed=s)).read().text for s in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    options = Sampling(20, 2.0, 0.5).for_generate()
    assert options == {"do_sample": True, "temperature": 2.0, "top_p": 0.5, "top_k": 0}
    likeliest = talker.stream(TALKS["a picture"], Sampling(7)).read().text
    assert talker.stream(TALKS["a picture"], Sampling(7, 1e-4, seed=5)).read().text == likeliest


def writing(engine, text):
    """Make the model write `text` again and again; the hook, and a list that grows with each token."""
    ids = itertools.cycle(engine.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = []

    def scores(module, args, output):
        tokens.append(next(ids))
        forced = torch.full_like(output, -100.0)
        forced[:, -1, tokens[-1]] = 100.0
        return forced

    return engine.model.lm_head.register_forward_hook(scores), tokens


def test_a_reader_who_leaves_ends_the_generation_and_the_next_is_right(talker):
    wanted = talker.stream(TALKS["two turns"], Sampling(5)).read()
    hook, tokens = writing(talker, "a red apple ")
    for _ in range(3):
        with talker.stream(TALKS["a picture"], Sampling(450)) as pieces:
            assert next(iter(pieces)) in ("a", "a red")
        assert not any(thread.name == "cumo-generate" for thread in threading.enumerate())
    hook.remove()
    assert len(tokens) < 3 * 450
    assert talker.stream(TALKS["two turns"], Sampling(5)).read() == wanted


def test_two_readers_take_turns(talker):
    wanted = [talker.stream(talk, Sampling(12)).read() for talk in TALKS.values()]
    found = {}

    def read(number, talk):
        found[number] = talker.stream(talk, Sampling(12)).read()

    threads = [threading.Thread(target=read, args=pair) for pair in enumerate(TALKS.values())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(wanted))] == wanted


@pytest.mark.parametrize("template", ["vicuna_v0", "chatml_direct"])
def test_the_mark_of_a_template_ends_an_answer(tiny_config, tmp_path, template):
    """A model that writes the mark, made by its output embedding."""
    folder = write_checkpoint(tmp_path / "model", tiny_config, template, 512, 0.3)
    engine = Local(*load(folder))
    end = engine._end
    tokenizer = engine.processor.tokenizer
    ids = tokenizer(f"apple{end}", add_special_tokens=False)["input_ids"]
    hook, _ = writing(engine, f"apple{end}")
    stream = engine.stream([user_message("what is it?", [RED])], Sampling(30))
    pieces = list(stream)
    hook.remove()
    assert "".join(pieces) == stream.reply.text == "apple"
    assert (stream.reply.finish, stream.reply.tokens) == (STOP, len(ids))
    hook, _ = writing(engine, f"apple{end}")
    (reply,) = engine.answers([[user_message("what is it?")]], Sampling(30))
    hook.remove()
    assert (reply.text, reply.finish, reply.tokens) == ("apple", STOP, len(ids))


def test_a_picture_of_several_tiles_is_talked_about(tiny_config):
    tokenizer = train_tokenizer(["what is it? a red apple"] * 4, 300)
    tiles = {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[12, 24], [24, 12]]}
    config = tiny_config(
        text_options={"vocab_size": len(tokenizer), "eos_token_id": None, "max_position_embeddings": 256},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **tiles,
    )
    processor = build_processor(tokenizer, 12, 4, image_aspect_ratio="anyres", **tiles)
    engine = Local(CumoForConditionalGeneration(config).double().eval(), processor)
    talks = [[user_message("what is it?", pictures)] for pictures in ([RED], [BLUE], [RED, BLUE])]
    assert engine.answers(talks, Sampling(3)) == [engine.stream(t, Sampling(3)).read() for t in talks]


def test_pixels_are_in_the_dtype_of_the_model(talker):
    seen = []
    talker.model.bfloat16()
    hook = talker.model.model.vision_tower.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].dtype)
    )
    assert talker.stream(TALKS["a picture"], Sampling(2)).read().tokens
    hook.remove()
    assert seen == [torch.bfloat16]


USER = user_message("what?")
BAD = {
    "no messages": ([], "must be a non-empty list of messages"),
    "unknown role": ([{"role": "robot", "content": "hm"}], "message 1 must be of role .*, got 'robot'"),
    "no question": ([USER, SAID], "the last message must be of role user, got 'assistant'"),
    "two questions": ([USER, USER], "message 2 must be of role assistant, got 'user'"),
    "late system": ([USER, SAID, {"role": "system", "content": "x"}], "message 3 must be of role user"),
    "answer first": ([SAID, USER], "message 1 must be of role user, got 'assistant'"),
    "empty": ([user_message(" ")], "the question must not be empty"),
    "marker": ([user_message("<image> what?")], "the question must not hold <image>"),
    "mark of the template": ([user_message("a [/INST] b")], r"the question must not hold \[/INST\]"),
    "mark in system": ([{"role": "system", "content": "</s>"}, USER], "the system text must not hold </s>"),
    "bytes": ([user_message("what \udcff")], "must be text in UTF-8"),
    "a video": ([{"role": "user", "content": [{"type": "video"}]}], "type text or image, got 'video'"),
    "no picture": ([{"role": "user", "content": [{"type": "image"}]}], "one of image, url, path, base64"),
    "its picture": ([USER, {"role": "assistant", "content": [{"type": "image", "image": RED}]}, USER],
                    "message 2 must have no pictures"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_conversation_that_is_none_is_named(talker, kind):
    messages, told = BAD[kind]
    for ask in (talker.check, talker.stream, lambda talk: check_conversation(talk, "mistral_instruct")):
        with pytest.raises(ValueError, match=told):
            ask(messages)


def test_a_picture_that_is_none_is_named(talker, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"note.png' is not a picture"):
        talker.stream([user_message("what?", [str(tmp_path / "note.png")])])


def test_a_device_that_is_not_there_is_named(checkpoint):
    for device in ("cuda:99", "toaster"):
        with pytest.raises(ValueError, match=f"device must be one of this machine, got '{device}'"):
            load(checkpoint, device)
    assert load(checkpoint, "cpu", torch.bfloat16)[0].dtype == torch.bfloat16


def test_an_error_in_the_model_is_told_in_one_line(talker, monkeypatch):
    monkeypatch.setattr(talker.model, "generate", lambda **inputs: {}["nothing"])
    with pytest.raises(ValueError, match=r"talker cannot answer: KeyError: 'nothing'"):
        talker.stream([USER]).read()
