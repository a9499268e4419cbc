"""This project's scorers give what the functions of lmms-eval give.

Where lmms-eval differs from the official scorer, the difference is tested, so that a release that lifts it is
noticed.
"""

import importlib.util
import os
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed: make lmms-test", allow_module_level=True)

os.environ.setdefault("OPENAI_API_KEY", "none")  # without one, its module of MathVista cannot be imported

import pandas
from lmms_eval.api.metrics import exact_match_hf_evaluate
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.mathvista.mathvista_evals import MathVistaEvaluator
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from lmms_eval.tasks.mme import utils as mme_of_lmms
from lmms_eval.tasks.mmmu import utils as mmmu_of_lmms
from lmms_eval.tasks.pope import utils as pope_of_lmms
from lmms_eval.tasks.scienceqa.utils import sqa_process_results
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results

from cumo_model.evaluation.scorers import circular, exact, letters, mathvista, mme, mmmu, vqa, yes_no

HOSTILE = (
    "", " ", "\n", "yes.", "Yes, there is", "NO!", "No\nyes", "A B", "(A) or (B)", "A\nB", "\u0663",
    "\uff11\uff12", "\u0661,\u0662\u0663\u0664", "\u0130s", "don't", "dont", "somebody'd", "1,000", "1 , 2",
    "two", "a an the", "it's", "x" * 10_000, "A " * 5_000, ". " * 40, "3.14.", "nan", "inf", "1e5", "-", "'",
    "The answer is B.", "is = 5", "so so so", "\x00", "\ud7ff",
)  # fmt: skip
PIECES = (
    "A", "B", "C", "D", "E", "(A)", "(B)", "B.", "C)", ":D", "yes", "no", "Yes", "No", "not", "red",
    "dog", "two", "the", "is ", "answer ", "so ", "=", "1,000", "3.14", "-7", "2e3", " ", "  ", ".", ",",
    "!", "?", "\n", "\t", "'s", "dont", ";", "\u0663",
)  # fmt: skip
ANSWERS = st.one_of(
    st.sampled_from(HOSTILE),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join),
    st.text(max_size=30),
)
CHOICES = ("a red dog", "two", "yes", "the answer")


@given(ANSWERS)
def test_vqa_normalisation(answer):
    assert vqa.normalised(answer) == EvalAIAnswerProcessor()(answer)


@given(ANSWERS, st.lists(ANSWERS, min_size=2, max_size=10))
def test_accuracy_of_textvqa(answer, references):
    references = [*references, answer]
    theirs = textvqa_process_results({"answers": [*references], "question_id": 0}, [answer])["exact_match"]
    # matches are whole numbers: both are counts of thirds over the number of references
    thirds = 3 * len(references)
    assert round(vqa.vqa_accuracy(answer, references) * thirds) == round(theirs * thirds)


def accuracy_of_vqav2(answer: str, references: list[str]) -> float:
    """By lmms-eval. The number of the reference keeps two equal ones apart, as in the official files."""
    answers = [{"answer": text, "answer_id": i} for i, text in enumerate(references)]
    return vqav2_process_results({"answers": answers, "question_id": 0}, [answer])["exact_match"]


@given(ANSWERS, st.lists(ANSWERS, min_size=2, max_size=10, unique=True))
def test_accuracy_of_vqav2(answer, references):
    """lmms-eval scores the answer as it is; a submission has answers that were normalised before."""
    given_answer = vqa.normalised(answer)
    references = [*references, answer, given_answer, given_answer]
    if len({reference.replace("\n", " ").replace("\t", " ").strip() for reference in references}) > 1:
        thirds = 3 * len(references)
        theirs = accuracy_of_vqav2(given_answer, references)
        assert round(vqa.vqa_accuracy_of_server(answer, references) * thirds) == round(theirs * thirds)


def test_differences_of_vqav2():
    same = ["two"] * 10
    # the official evaluation normalises nothing where all people agree
    assert accuracy_of_vqav2("2", same) == 1 and vqa.vqa_accuracy_of_server("2", same) == 0


@given(st.text("abcdefgh XYZ", max_size=20).map(str.strip), st.text("abcdefgh ", max_size=3).map(str.strip))
@example("Red", "red")
def test_exact_match_of_gqa(answer, reference):
    theirs = lambda text: exact_match_hf_evaluate(
        predictions=[text], references=[reference], ignore_case=True, ignore_punctuation=True
    )["exact_match"]
    for text in (answer, f"{answer}.", reference, f"{reference}."):
        assert exact.exact_match(text, reference) == bool(theirs(text))


def test_differences_of_gqa():
    """lmms-eval takes all punctuation away, the original the periods at the end."""
    theirs = exact_match_hf_evaluate(
        predictions=["t-shirt"], references=["tshirt"], ignore_case=True, ignore_punctuation=True
    )
    assert theirs["exact_match"] == 1 and not exact.exact_match("t-shirt", "tshirt")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_figures_of_pope(pairs):
    words = {True: "yes", False: "no"}
    results = [
        pope_of_lmms.pope_process_results(
            {"answer": words[label], "question_id": 0}, [words[said].title()]
        )["pope_f1_score"]
        for said, label in pairs
    ]  # fmt: skip
    said = [yes_no.pope_says_yes(words[one].title()) for one, _ in pairs]
    assert said == [one for one, _ in pairs]
    found = yes_no.five_figures(said, [label for _, label in pairs])
    for name in ("accuracy", "precision", "recall"):  # one division each
        assert found[name] == getattr(pope_of_lmms, f"pope_aggregate_{name}")(results)
    precision, recall = found["precision"], found["recall"]
    both = sum(one and label for one, label in pairs)
    assert (pope_of_lmms.pope_aggregate_f1_score(results) == 0) == (both == 0) == (found["f1"] == 0)
    if both:  # the harmonic mean, in whole numbers: 2 / (1 / precision + 1 / recall)
        yes, present = round(both / precision), round(both / recall)
        assert found["f1"] == 2 * both / (yes + present)
    # theirs is the share of yes among the labels, the official one that among the answers
    labels = [label for _, label in pairs]
    assert pope_of_lmms.pope_aggregate_yes_ratio(results) == sum(labels) / len(labels)
    assert found["yes ratio"] == sum(said) / len(said)


def test_differences_of_pope():
    """lmms-eval wants the bare word; the official script searches a sentence for words of denial."""
    for text in ("No, there is no dog.", "There is not."):
        theirs = pope_of_lmms.pope_process_results({"answer": "no", "question_id": 0}, [text])
        assert theirs["pope_accuracy"]["score"] == 0 and not yes_no.pope_says_yes(text)


@given(ANSWERS)
def test_verdict_of_mme(answer):
    """Only lmms-eval takes periods out of the answer, and knows the letters y and n."""
    if "." not in answer and answer.strip().lower() not in ("y", "n"):
        assert mme.mme_verdict(answer) == mme_of_lmms.parse_pred_ans(answer)


def test_differences_of_mme():
    for answer, theirs in (("n", "no"), ("y", "yes"), ("a.no", "no"), ("....yes", "yes")):
        assert mme_of_lmms.parse_pred_ans(answer) == theirs
    assert [mme.mme_verdict(answer) for answer in ("n", "y", "....yes")] == ["other"] * 3


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=32))
def test_points_of_mme(pictures):
    results = [
        {"category": "OCR", "question_id": i, "score": float(right)}
        for i, pair in enumerate(pictures)
        for right in pair
    ]
    # half points of whole pictures
    found = sum(mme.mme_points(pictures)) * len(pictures)
    assert round(found) == round(mme_of_lmms.mme_aggregate_results(results) * len(pictures))


@given(ANSWERS)
def test_letter_of_mmbench(answer):
    judge = MMBench_Evaluator(API_KEY="", API_URL="http://127.0.0.1:9")
    choices = dict(zip("ABCD", CHOICES, strict=True))
    assert circular.letter_of(answer, choices) == (judge.can_infer(answer, dict(choices)) or "")


@given(st.lists(st.tuples(st.sampled_from("ABCD"), st.sampled_from("ABCD")), min_size=1, max_size=4))
def test_circles_of_mmbench(pairs):
    judge = MMBench_Evaluator(API_KEY="", API_URL="http://127.0.0.1:9")
    columns = {letter: [text] * len(pairs) for letter, text in zip("ABCD", CHOICES, strict=True)}
    rows = pandas.DataFrame(
        {"index": range(len(pairs)), "prediction": [said for said, _ in pairs], **columns}
    )
    theirs = judge.eval_sub_data(rows, {i: right for i, (_, right) in enumerate(pairs)}, static_only=True)
    said, right = zip(*pairs, strict=True)
    assert circular.is_right_in_all(said, right) == bool(theirs)


LOWER = tuple(piece for piece in PIECES if not set(piece) & set("ABCDE"))


@given(st.lists(st.sampled_from((*LOWER, "(A)", "(B)", " A ", " C ")), max_size=12).map(" ".join))
def test_letter_of_mmmu(answer):
    """Where letters stand between spaces; one at the end of another word is a difference."""
    index = dict(zip("ABCD", CHOICES, strict=True))
    found = mmmu.letter_of(answer, CHOICES)
    random.seed(0)
    theirs = {mmmu_of_lmms.parse_multi_choice_response(answer, list(index), index) for _ in range(24)}
    assert theirs == {found} if found else len(theirs) > 1  # without a letter theirs is drawn at random


def test_differences_of_mmmu():
    """lmms-eval takes a letter before a space or a period, also that of a longer word."""
    index = dict(zip("ABCD", CHOICES, strict=True))
    for answer, theirs in (("vitamin DNA is", "A"), ("it is B. of course", "B")):
        assert mmmu_of_lmms.parse_multi_choice_response(answer, list(index), index) == theirs
        assert mmmu.letter_of(answer, CHOICES) == ""


@given(ANSWERS)
def test_open_answers_of_mmmu(answer):
    words = lambda values: sorted(map(repr, values))  # nan is not equal to itself
    assert words(set(mmmu.candidates(answer))) == words(set(mmmu_of_lmms.parse_open_response(answer)))


@given(ANSWERS, st.one_of(ANSWERS, st.lists(ANSWERS, min_size=1, max_size=3)))
def test_right_open_answers_of_mmmu(answer, reference):
    theirs = mmmu_of_lmms.eval_open(reference, mmmu_of_lmms.parse_open_response(answer))
    assert mmmu.is_open_right(answer, reference) == theirs


class NoJudge(MathVistaEvaluator):
    """Tells where a judge would be asked."""

    def get_chat_response(self, prompt, **options):
        return None


FREE = [("free_form", kind) for kind in ("integer", "float", "text")]
KINDS = st.sampled_from([("multi_choice", "text"), *FREE])


@given(ANSWERS, KINDS)
def test_rules_of_mathvista(answer, kinds):
    problem = {"question_type": kinds[0], "answer_type": kinds[1], "choices": list(CHOICES), "query": ""}
    theirs = NoJudge().extract_answer(answer, problem)
    found = mathvista.by_rules(answer, *kinds, CHOICES)
    if theirs is None and found is not None:  # this project takes a letter alone without asking
        assert kinds[0] == "multi_choice" and found in "ABCD" and answer.strip(" \t\n.:()") == found
    else:
        assert found == theirs


@given(ANSWERS.filter(lambda answer: len(answer) < 500), KINDS, st.integers(0, 3))
def test_normal_form_of_mathvista(value, kinds, precision):
    theirs = NoJudge().normalize_extracted_answer(value, list(CHOICES), *kinds, precision)
    assert mathvista.normalised(value, *kinds, CHOICES, precision) == theirs


def test_differences_of_mathvista():
    """lmms-eval drops blanks before it compares; the official script does not."""
    assert NoJudge().safe_equal("red ", "red")
    assert not mathvista.is_right("red ", "red", "free_form", "text")


@given(
    st.sampled_from("ABCDE"),
    st.sampled_from(("", ". ", ". the dog", ". The answer is B.")),
    st.integers(0, 4),
)
def test_letter_of_scienceqa(letter, more, right):
    theirs = sqa_process_results({"choices": list("vwxyz"), "answer": right}, [letter + more])["exact_match"]
    assert (letters.scienceqa_letter(letter + more) == "ABCDE"[right]) == bool(theirs)


def test_differences_of_scienceqa():
    """lmms-eval takes a small letter and "B.x", and does not know "The answer is B."."""
    theirs = lambda text: sqa_process_results({"choices": list("vwxyz"), "answer": 1}, [text])["exact_match"]
    assert [theirs(text) for text in ("b", "B.x", "The answer is B.")] == [1, 1, 0]
    assert [letters.scienceqa_letter(text) for text in ("b", "B.x", "The answer is B.")] == [None, None, "B"]
