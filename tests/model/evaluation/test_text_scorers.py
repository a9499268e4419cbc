"""Scorers of short answers: hand-computed scores, the odd corners of official scorers, hostile answers."""

from fractions import Fraction

import pytest

from cumo_model.evaluation.scorers.chair import Vocabulary, chair_counts, chair_figures
from cumo_model.evaluation.scorers.exact import exact_match
from cumo_model.evaluation.scorers.letters import letter_by_pattern, scienceqa_letter
from cumo_model.evaluation.scorers.mme import COGNITION, PERCEPTION, mme_points, mme_sum, mme_verdict
from cumo_model.evaluation.scorers.vqa import normalised, vqa_accuracy, vqa_accuracy_of_server
from cumo_model.evaluation.scorers.yes_no import five_figures, pope_says_yes
from tests.model.evaluation.official_data import HOSTILE


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("The Dog", "dog"),
        ("a an the", ""),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("ow'sat", "ow 'sat"),
        ("somebody'd", "somebodyd"),
        ("it's", "it 's"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dog.", "dog"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red- blue", "red blue"),
        ("x-y z- w", "xy z w"),
        ("what?", "what"),
        ("a\nb\tc", "b c"),
        ("٣", "٣"),
        ("." * 33, "."),
        ("", ""),
    ],
)
def test_normalised(answer, expected):
    assert normalised(answer) == expected


@pytest.mark.parametrize("matches, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten(matches, expected):
    references = ["yes"] * matches + ["no"] * (10 - matches)
    assert vqa_accuracy("Yes.", references) == expected


@pytest.mark.parametrize("count", [1, 3, 10])
def test_vqa_accuracy_leaves_each_reference_out_once(count):
    for matches in range(count + 1):
        references = ["yes"] * matches + ["no"] * (count - matches)
        by_hand = [
            min(Fraction(1), Fraction(sum(one == "yes" for one in references[:i] + references[i + 1 :]), 3))
            for i in range(count)
        ]
        assert vqa_accuracy("yes", references) == float(sum(by_hand) / count)


def test_vqa_accuracy_needs_references():
    with pytest.raises(ValueError, match="references must hold at least one answer, got none"):
        vqa_accuracy("yes", [])


@pytest.mark.parametrize(
    "answer, references, expected",
    [
        ("two", ["two"] * 10, 0.0),  # the submission says 2, and equal references are not normalised
        ("two", ["two"] * 9 + ["2 of them"], 1.0),
        ("two", ["two\n"] * 10, 0.0),
        ("Red.", ["red"] * 10, 1.0),
        ("1,000", ["1,000"] * 9 + ["many"], 1.0),
        ("1,000", ["1,000"] * 10, 0.0),
        ("1000", ["1,,000"] * 9 + ["many"], 0.0),  # only a single comma is part of a number
        ("", [""] * 3 + ["x"] * 7, 0.9),
    ],
)
def test_vqa_accuracy_of_server(answer, references, expected):
    assert vqa_accuracy_of_server(answer, references) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Woman.", True),
        ("woman...", True),
        ("woman ", False),
        ("woman.\n", False),
        ("a woman", False),
        ("", False),
    ],
)
def test_exact_match(answer, expected):
    assert exact_match(answer, "woman") is expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("yes.", True),
        ("Yes, there is", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not a dog. Yes", False),
        ("Yes. No dog is there", True),
        ("NO", True),
        ("No!", True),
        ("No\nthere", True),
        ("no\n", True),
        ("nothing", True),
        ("", True),
        ("yes no", False),
    ],
)
def test_pope_says_yes(answer, expected):
    assert pope_says_yes(answer) is expected


def test_five_figures():
    said = [True, True, True, False, False]
    labels = [True, True, False, True, False]
    assert five_figures(said, labels) == {
        "accuracy": 3 / 5,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": 2 / 3,
        "yes ratio": 3 / 5,
    }
    one_sided = five_figures([True, True, True, True], [True, True, False, True])
    assert (one_sided["precision"], one_sided["recall"], one_sided["f1"]) == (3 / 4, 1.0, 6 / 7)


def test_five_figures_without_a_denominator():
    assert five_figures([False], [False]) == {
        "accuracy": 1.0,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "yes ratio": 0.0,
    }


@pytest.mark.parametrize("said, labels", [([], []), ([True], [True, False])])
def test_five_figures_need_answers(said, labels):
    with pytest.raises(ValueError, match=f"said must hold an answer for each of {len(labels)} labels"):
        five_figures(said, labels)


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("yes", "yes"),
        ("Yes, there is", "yes"),
        (" yes.", "yes"),
        ("No.", "no"),
        ("Nobody", "no"),
        ("Snow", "no"),
        ("eyes", "yes"),
        ("I know", "other"),
        ("It is not", "other"),
        ("yno", "no"),
        ("y", "other"),
        ("", "other"),
    ],
)
def test_mme_verdict(answer, expected):
    assert mme_verdict(answer) == expected


def test_mme_points_and_sums():
    assert mme_points([(True, True), (True, False), (False, False), (True, True)]) == (62.5, 50.0)
    with pytest.raises(ValueError, match="pictures must hold at least one picture"):
        mme_points([])
    assert (len(PERCEPTION), len(COGNITION)) == (10, 4)
    assert mme_sum(dict.fromkeys(PERCEPTION, 150.0), PERCEPTION) == 1500.0
    assert mme_sum({"OCR": 100.0, "count": 200.0, "code_reasoning": 7.0}, PERCEPTION) == 1500.0
    assert mme_sum({}, COGNITION) != mme_sum({}, COGNITION)  # nan


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("B", "B"),
        ("B. the dog", "B"),
        ("E", "E"),
        ("F", None),
        ("F. the dog", None),
        ("B.", None),
        ("B) the dog", None),
        ("b", None),
        ("The answer is F.", "F"),
        ("The answer is B!", "B"),
        ("The answer is B", None),
        ("the answer is B.", None),
        ("The answer is A. The answer is B.", None),
        ("", None),
        ("AB", None),
    ],
)
def test_scienceqa_letter(answer, expected):
    assert scienceqa_letter(answer) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("**B**", "B"),
        ("\nB\n", "B"),
        ("B. Vitamin C.", "B"),
        ("(B) the dog", "B"),
        ("B: the dog", "B"),
        ("The answer is B because of A.", "B"),
        ("Answer: (C)", "C"),
        ("B and B", "B"),
        ("A, B", None),
        ("A or B", None),
        ("A\nB", None),
        ("answer is A, or the answer is B", None),
        ("E", None),
        ("A dog", None),
        ("the answer is a dog", None),
        ("Because", None),
        ("BUS", None),
        ("", None),
        ("٣", None),
        ("Ａ", None),
    ],
)
def test_letter_by_pattern(answer, expected):
    assert letter_by_pattern(answer, 4) == expected


def test_letter_by_pattern_knows_its_choices():
    assert letter_by_pattern("E", 5) == "E"
    for choices in (0, 27):
        with pytest.raises(ValueError, match=f"choices must be from 1 to 26, got {choices}"):
            letter_by_pattern("A", choices)


WORDS = {
    "dog": ["dogs", "puppy"],
    "hot dog": ["hot dogs"],
    "traffic light": [],
    "cup": ["Cups"],
    "dog bowl": [],
}


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("Dogs and a puppy.", ["dog", "dog"]),
        ("A hot  dog, two hot\ndogs, a dog", ["hot dog", "hot dog", "dog"]),
        ("a hot puppy", ["dog"]),
        ("a dog bowl, a dog", ["dog bowl", "dog"]),
        ("doghouse, underdog, dog_1", []),
        ("dog-house (cups)", ["dog", "cup"]),
        ("traffic lights", []),
        ("TRAFFIC LIGHT", ["traffic light"]),
        ("", []),
    ],
)
def test_mentions(caption, expected):
    assert Vocabulary(WORDS).mentions(caption) == expected


def test_chair_by_hand():
    vocabulary = Vocabulary(WORDS)
    counts = [
        chair_counts("A dog, a puppy and a cup.", ["dog", "hot dog"], vocabulary),
        chair_counts("A cup", ["cup", "cup"], vocabulary),
        chair_counts("Nothing", [], vocabulary),
        chair_counts("dog dog", ["cup"], vocabulary),
    ]
    assert counts[0] == {"mentions": 3, "absent": 1, "objects": 2, "named": 1}
    assert chair_figures(counts) == {"CHAIR_s": 50.0, "CHAIR_i": 50.0, "recall": 50.0}
    assert chair_figures([counts[2]]) == {"CHAIR_s": 0.0, "CHAIR_i": 0.0, "recall": 0.0}
    assert all(value != value for value in chair_figures([]).values())


def test_a_vocabulary_has_one_object_for_a_name():
    vocabulary = Vocabulary(WORDS)
    assert [vocabulary.object_of(name) for name in ("dog", " Dogs", "cat")] == ["dog", "dog", None]
    with pytest.raises(ValueError, match="'Dog' must name one object, got 'dog' and 'hot dog'"):
        Vocabulary({"dog": [], "hot dog": ["Dog"]})
    with pytest.raises(ValueError, match="names of 'dog' must have letters, got ' '"):
        Vocabulary({"dog": [" "]})
    with pytest.raises(ValueError, match="must hold at least one object"):
        Vocabulary({})


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: repr(answer)[:12])
def test_hostile_answers_are_scored(answer):
    assert vqa_accuracy(answer, ["yes", "a b"] * 5) in (0.0, 1.0)
    assert vqa_accuracy_of_server(answer, ["yes"] * 10) in (0.0, 1.0)
    assert not exact_match(answer, "woman")
    assert pope_says_yes(answer) is True
    assert mme_verdict(answer) == ("yes" if "yes" in answer.lower() else "no" if "No" in answer else "other")
    assert scienceqa_letter(answer) is None
    assert letter_by_pattern(answer, 4) is None
    assert chair_counts(answer, ["dog"], Vocabulary(WORDS))["mentions"] == 0


def test_mentions_in_scripts_without_spaces_and_in_other_forms_of_letters():
    vocabulary = Vocabulary({"狗": [], "caf\u00e9": [], "แมว": []})
    assert vocabulary.mentions("图中有一只狗和一只猫。") == ["狗"]
    assert vocabulary.mentions("a Cafe\u0301, not a cafe\u0301s") == ["caf\u00e9"]
    assert vocabulary.mentions("มีแมวอยู่") == ["แมว"]
