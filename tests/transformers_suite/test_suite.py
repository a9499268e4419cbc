"""The common tests of transformers on CuMo, where a checkout is named, and the program that runs them."""

import os
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.transformers_suite import run, stand_ins
from tests.transformers_suite.exceptions import EXCEPTIONS
from tests.transformers_suite.run import Outcome

CHECKOUT = os.environ.get("TRANSFORMERS_TESTS")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not CHECKOUT, reason="TRANSFORMERS_TESTS does not name a checkout of transformers")
@pytest.mark.parametrize("variant", run.CLASSES)
def test_the_common_tests_of_transformers(variant):
    verdicts, _ = run.run_suite(CHECKOUT, [variant])
    assert not run.is_bad(verdicts[variant]), run.report(verdicts, {})
    assert verdicts[variant].counts["passed"] > 20


def test_a_failure_counts_unless_it_is_listed_or_its_peers():
    found = {
        "test_a": Outcome("failed", "boom"),
        "test_b": Outcome("failed", "listed"),
        "test_c": Outcome("failed", "old"),
        "test_d": Outcome("passed"),
        "test_e": Outcome("passed"),
        "test_f": Outcome("skipped"),
        "test_g": Outcome("failed", "only here"),
        "test_h": Outcome("skipped", "not supported"),
        "test_i": Outcome("skipped", "not supported"),
    }
    peer = {"test_c": Outcome("xfailed"), "test_g": Outcome("passed"), "test_b": Outcome("failed")}
    peer |= {"test_f": Outcome("passed"), "test_h": Outcome("passed"), "test_i": Outcome("skipped")}
    listed = {"Dense::test_[bf]": "refused", "*::test_e": "does not apply", "MoE::test_a": "other variant"}
    verdict = run.judge("Dense", found, peer, listed)
    assert verdict.unexpected == {"test_a": "boom", "test_g": "only here"}
    assert verdict.of_peer == {"test_c": "old"} and verdict.skipped == {"test_h": "not supported"}
    assert verdict.listed == {"test_b": "refused", "test_f": "refused"}
    assert verdict.now_passing == ["test_e"]
    assert verdict.counts == Counter(failed=4, passed=2, skipped=3)
    assert run.is_bad(verdict) and not run.is_bad(run.judge("Dense", {"test_b": found["test_b"]}, {}, listed))
    text = run.report({"Dense": verdict}, {})
    assert "FAILED: test_g: only here" in text and "LISTED, BUT PASSES: test_e" in text


def test_every_exception_names_a_variant_and_has_a_reason():
    for key, reason in EXCEPTIONS.items():
        variant, separator, test = key.partition("::")
        assert separator and test.startswith("test_") and len(reason) > 20, key
        assert any(fnmatchcase(name, variant) for name in run.CLASSES), key


def test_without_a_checkout_one_line_says_what_to_set(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TRANSFORMERS_TESTS", raising=False)
    assert run.main([]) == 2
    assert capsys.readouterr().out == "set TRANSFORMERS_TESTS to a checkout of transformers\n"
    with pytest.raises(ValueError, match=r"TRANSFORMERS_TESTS must be a checkout .* got .*nowhere"):
        run.main([str(tmp_path / "nowhere")])


def test_the_stand_in_of_parameterized_names_tests_like_the_package():
    expand = stand_ins.parameterized.expand

    class Case:
        @expand([("greedy", 1), ("beam search", 2)])
        def test_words(self, word, number):
            return word, number

        @expand([True, [3]], name_func=lambda f, n, p: f"{f.__name__}_{p.args[0]}")
        def test_named(self, value):
            return value

        @expand([(1, "pt"), None])
        def test_numbers(self, number, kind="none"):
            return number, kind

    case = Case()
    names = [name for name in vars(Case) if name.startswith("test_") and getattr(Case, name)]
    assert names == [
        *("test_words_0_greedy", "test_words_1_beam_search", "test_named_True", "test_named_3"),
        *("test_numbers_0", "test_numbers_1"),
    ]
    assert case.test_words_1_beam_search() == ("beam search", 2) and case.test_named_3() == 3
    assert case.test_numbers_0() == (1, "pt") and case.test_numbers_1() == (None, "none")


FAKE = {
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    "test_configuration_common.py": "class ConfigTester:\n    def __init__(self, *_, **__): pass",
    "test_modeling_common.py": """
from transformers import no_such_name
from transformers.testing_utils import require_something_new
from transformers.no_such_module import thing
def floats_tensor(*_): pass
def ids_tensor(*_): pass
class ModelTesterMixin:
    def test_same(self): pass
    def test_worse(self): assert "Llava" in type(self).__name__, "bad"
    def test_old(self): assert False
    def test_new_name(self): no_such_name()
    @require_something_new
    def test_new_mark(self): assert False
    def test_parts(self):
        for part in (1, 2, 3):
            with self.subTest(part=part):
                assert part != 2 or "Llava" in type(self).__name__
""",
    "test_processing_common.py": "MODALITY_INPUT_DATA = {}\nclass ProcessorTesterMixin: pass",
    "models/clip/test_modeling_clip.py": """
import unittest
import requests
class CLIPVisionModelTester: pass
class CLIPVisionModelTest(unittest.TestCase): pass
""",
    "models/llava/test_modeling_llava.py": """
import unittest
from ...test_modeling_common import ModelTesterMixin
from ...test_pipeline_mixin import PipelineTesterMixin
class LlavaForConditionalGenerationModelTest(ModelTesterMixin, PipelineTesterMixin, unittest.TestCase): pass
""",
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_checkout_of_another_release_runs(tmp_path):
    """Names that the installed transformers lacks, a subtest that fails, a test that the peer fails."""
    for name, text in FAKE.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
    before = {path: path.read_bytes() for path in Path(tmp_path).rglob("*.py")}
    verdicts, counts = run.run_suite(tmp_path, ["Dense"], ["-k", "same or worse or old or new or parts"])
    (verdict,) = verdicts.values()
    assert counts == {} and isinstance(verdict.counts, Counter)
    assert set(verdict.unexpected) == {"test_worse", "test_parts"}
    assert "bad" in verdict.unexpected["test_worse"] and set(verdict.of_peer) == {"test_old"}
    assert verdict.counts == Counter(failed=3, passed=1, skipped=2)
    assert {path: path.read_bytes() for path in Path(tmp_path).rglob("*.py")} == before
