"""`python -m lmms_eval --model cumo` on local tasks, and the model class on single requests."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed: make lmms-test", allow_module_level=True)

from lmms_eval.utils import eval_logger

from cumo_model.evaluation.lmms.model import CumoMessages, CumoSimple
from tests.lmms.tasks import NEW_TOKENS, record, run, write_talker, write_task
from tests.serve.questions import Right, image

# text, pictures, and the same as a conversation of tests.serve.questions
QUESTIONS = (
    ("what is in the picture", (0,), ((0, "what is in the picture"),)),
    ("what is in the picture", (1,), ((1, "what is in the picture"),)),
    ("which of them is larger", (0, 1), ((0, 1, "which of them is larger"),)),
    ("the first <image> the second <image>", (2, 0), (("the first ", 2, " the second ", 0),)),
    ("how many dots are there", (), (("how many dots are there",),)),
)
TURNS = ((0, "what is in the picture"), ("a red square",), ("how many dots are there",))
KNOWN = 3  # questions whose answer the task knows; the others expect another


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, its right answers, and tasks."""
    folder = tmp_path_factory.mktemp("lmms")
    checkpoint = write_talker(folder / "model")
    right = Right(checkpoint)
    said = lambda talk: right.processor.decode(
        right.answer(talk, NEW_TOKENS)[1], skip_special_tokens=True
    ).strip()
    answers = [said(talk) for *_, talk in QUESTIONS]
    assert len(set(answers)) == len(answers) and all(answers)
    tasks = folder / "tasks"
    records = [
        record(folder, text, pictures, answer=answers[i] if i < KNOWN else "something else")
        for i, (text, pictures, _) in enumerate(QUESTIONS)
    ]
    write_task(tasks, "local_pictures", records)
    middle = answers[0].split()[3]
    write_task(tasks, "local_cut", records[:1], until=f"['no such text', {middle!r}]")
    turns = records[0] | {"answer": said(TURNS)}
    write_task(tasks, "local_turns", [turns], doc_to_messages="!function helpers.turns")
    first = [" ".join(answer.split()[:2]) for answer in answers]
    choices = [[first[i], "three of", "red"] for i in range(len(QUESTIONS))]
    chosen = [
        record(folder, text, pictures, choices=choices[i], answer=int(i >= KNOWN))
        for i, (text, pictures, _) in enumerate(QUESTIONS)
    ]
    write_task(tasks, "local_choices", chosen)
    return SimpleNamespace(
        checkpoint=checkpoint, tasks=tasks, answers=answers, cut=answers[0].split(middle)[0].strip(),
        choices=choices, right=right,
    )  # fmt: skip


def said(samples: list[dict]) -> list[str]:
    return [sample["filtered_resps"] for sample in samples]


@pytest.mark.timeout(300)
def test_tasks_with_messages(made):
    names = "local_pictures,local_cut,local_turns"
    found, log = run(made.checkpoint, made.tasks, names, "--batch_size", "2")
    assert set(found) == set(names.split(",")), log[-3000:]
    results, samples = found["local_pictures"]
    assert said(samples) == made.answers
    assert results["exact_match,none"] == KNOWN / len(QUESTIONS)
    assert said(found["local_cut"][1]) == [made.cut] and made.cut != made.answers[0]
    assert found["local_turns"][0]["exact_match,none"] == 1
    counts = samples[0]["token_counts"][0]
    prompt, answer = made.right.answer(QUESTIONS[0][2], NEW_TOKENS)
    assert counts == {"input_tokens": len(prompt), "output_tokens": len(answer)}
    assert log.count("image_aspect_ratio has no effect") == 1


@torch.no_grad()
def log_probability(made, talk, choice: str) -> float:
    """In fp64, one token after the other."""
    inputs = made.right.inputs(talk)
    model, tokenizer = made.right.precise, made.right.processor.tokenizer
    total = 0.0
    for token in tokenizer(f"[/INST] {choice}", add_special_tokens=False)["input_ids"][
        len(tokenizer("[/INST]", add_special_tokens=False)["input_ids"]) :
    ]:
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        scores = model(**inputs).logits[0, -1]
        scores[made.right.processor.image_token_id] = -torch.inf
        total += scores.log_softmax(-1)[token].item()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return total


@pytest.mark.timeout(300)
def test_tasks_without_messages_in_two_processes(made):
    options = ("--force_simple", "--batch_size", "4")
    found, log = run(made.checkpoint, made.tasks, "local_pictures,local_choices", *options, processes=2)
    assert set(found) == {"local_pictures", "local_choices"}, log[-3000:]
    results, samples = found["local_pictures"]
    assert said(samples) == made.answers
    assert results["exact_match,none"] == KNOWN / len(QUESTIONS)
    results, samples = found["local_choices"]
    for i, (sample, (*_, talk)) in enumerate(zip(samples, QUESTIONS, strict=True)):
        wanted = [log_probability(made, talk, choice) for choice in made.choices[i]]
        order = sorted(range(3), key=wanted.__getitem__)
        assert order[-1] == 0, "the answer of the model is the best one"
        found = [-float(value) for value, _ in sample["filtered_resps"]]
        assert sorted(range(3), key=found.__getitem__) == order, (wanted, found)
        assert [is_greedy for _, is_greedy in sample["filtered_resps"]] == ["True", "False", "False"]
    assert results["acc,none"] == KNOWN / len(QUESTIONS)


def asked(model, requests: list[tuple], kind: str = "generate_until"):
    """Answers to requests of a task with these records, one for each request."""
    records = [record for record, _ in requests]
    model.task_dict = {"local": {"test": records}}
    return getattr(model, kind)([
        SimpleNamespace(args=(*args, i, "local", "test"), task_name="local", doc_id=i)
        for i, (_, args) in enumerate(requests)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def simple(made):
    return CumoSimple(str(made.checkpoint), batch_size="3", device="cpu")


@pytest.fixture
def warned():
    lines: list[str] = []
    handler = eval_logger.add(lambda line: lines.append(str(line)), level="WARNING", format="{message}")
    yield lines
    eval_logger.remove(handler)


SHORT = {"max_new_tokens": NEW_TOKENS}


def test_a_question_without_an_answer_is_named(simple, made, warned):
    shown = lambda doc: [image(number) for number in doc]
    good, long, broken = (
        ("what is in the picture", SHORT, shown),
        ("one " * 600, SHORT, shown),
        ("<image>", SHORT, shown),
    )
    found = asked(simple, [((0,), good), ((1,), long), ((1,), good), ((0, 1), broken)])
    assert [answer.text for answer in found] == [made.answers[0], "", made.answers[1], ""]
    assert len(warned) == 3 and warned[0].startswith(
        "task local, question 1 has no answer: the conversation must"
    )
    assert (
        "question 3 has no answer: the question must have one <image> for each of its 2 pictures" in warned[1]
    )
    assert warned[2].strip() == "2 of 4 questions have no answer, they are scored as ''"
    with pytest.raises(
        ValueError, match="none of 1 questions has an answer: the conversation must have fewer"
    ):
        asked(simple, [((0,), long)])


@pytest.mark.parametrize("visual", ["film.mp4", {"array": [0.0], "sampling_rate": 16000}, [[0]]])
def test_only_pictures_are_taken(simple, visual):
    with pytest.raises(ValueError, match=r"^task local: pictures are what CuMo takes, got "):
        asked(simple, [((), ("what", SHORT, lambda doc: [visual]))])
    with pytest.raises(ValueError, match=r"^task local: pictures are what CuMo takes, got "):
        asked(simple, [((), ("what", "no", lambda doc: [visual]))], "loglikelihood")


def test_only_pictures_are_taken_in_messages(made):
    model = CumoMessages(str(made.checkpoint), device="cpu")
    film = [
        {"role": "user", "content": [{"type": "video", "url": "film.mp4"}, {"type": "text", "text": "a"}]}
    ]
    with pytest.raises(ValueError, match=r"^task local: pictures are what CuMo takes, got video"):
        asked(model, [((), ("a", lambda doc: film, SHORT))])


def test_other_requests_are_refused(simple):
    with pytest.raises(ValueError, match=r"^task local: num_beams must be 1 with the model cumo, got 4"):
        asked(simple, [((), ("what", {"num_beams": 4}, None))])
    with pytest.raises(ValueError, match=r"^task local, question 0: the answer must not be empty"):
        asked(simple, [((), ("what", " ", None))], "loglikelihood")
    with pytest.raises(ValueError, match="acc_mutual_info"):
        simple.loglikelihood([SimpleNamespace(args=("", "no"), task_name="local", doc_id=0)])
    with pytest.raises(NotImplementedError, match="no rounds"):
        simple.generate_until_multi_round([])


def test_signs_are_those_that_lmms_eval_expects(simple):
    """The smallest value of a multiple choice is chosen; a perplexity is made of the log-probability."""
    record, shown = (0,), lambda doc: [image(number) for number in doc]
    question = "what is in the picture"
    (choice,) = asked(simple, [(record, (question, " no", shown))], "loglikelihood")
    (target,) = asked(simple, [(record, (question, lambda doc: "no", shown))], "loglikelihood")
    assert choice.text[0] == -target.text[0] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"colour": "red"}, "model_args must be of pretrained, device, dtype, .*, got colour"),
        ({"pretrained": None}, "pretrained=DIR"),
        ({"pretrained": "nowhere"}, "'nowhere'"),
        ({"batch_size": "auto"}, "batch_size must be an int of at least 1, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"max_batch_size": 8}, "give --batch_size"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"template": "plain"}, "template must be an instruct template"),
        ({"device": "cuda:99"}, "device must be one of this machine"),
    ],
)
def test_bad_arguments_are_named(made, arguments, message):
    with pytest.raises(ValueError, match=message):
        CumoSimple(**{"pretrained": str(made.checkpoint), "device": "cpu"} | arguments)


def test_each_process_has_a_device_of_its_own(made, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device must be cuda or cpu with 2 processes, got 'cuda:1'"):
        CumoSimple(str(made.checkpoint), device="cuda:1")


def test_a_system_prompt_and_a_template(made):
    model = CumoSimple(str(made.checkpoint), device="cpu", template="vicuna_v1", system_prompt="be brief")
    assert model.engine.template == "vicuna_v1"
    request = SimpleNamespace(args=("what", SHORT, None, 0, "local", "test"), task_name="local", doc_id=0)
    model.task_dict = {"local": {"test": [()]}}
    assert model._talk(request)[0] == {"role": "system", "content": "be brief"}
