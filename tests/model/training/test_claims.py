"""Identities of runs: what differs is named with both values, and records of earlier versions are read."""

import json

import pytest

from cumo_model.training.claims import claim, claim_recipe
from cumo_model.training.recipe import DataSection, LoraSection, ModelSection, Recipe, StageSection
from tests.model.training.small_runs import write_model

PARTS = ModelSection(vision="a", language="b")


def recipe(model=PARTS, stage=None, trainer=None, **data):
    return Recipe("out", model, DataSection(files=("x",), **data), stage or StageSection(), trainer or {})


def begin(folder):
    """Make a checkpoint, from which on the identity of a run counts."""
    (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint-1" / "trainer_state.json").write_text("{}")


def record(path, made, **changes):
    """The identity of a recipe as an earlier version wrote it."""
    begin(path.parent)
    values = made.identity()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    path.write_text(json.dumps(values))


OLD = {"data__template": "mistral_instruct_system", "data__aspect": "pad", "model__top_k": 2}


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    path = tmp_path / "recipe.json"
    record(path, recipe(), **OLD, data__skip_bad=True, stage__expert_exchange="padded")
    claim_recipe(path, recipe())
    claim_recipe(path, recipe(skip_bad=True))
    claim_recipe(path, recipe(template="mistral_instruct_system", aspect="pad"))
    record(path, recipe())
    claim_recipe(path, recipe(template="mistral_instruct_system", aspect="pad"))
    values = json.loads(path.read_text())
    del values["data"]["dummy_images"], values["stage"]["average_loss_over"]  # keys that were added later
    path.write_text(json.dumps(values))
    claim_recipe(path, recipe())
    with pytest.raises(ValueError, match=r"another data\.dummy_images \(was False, is True\): choose"):
        claim_recipe(path, recipe(dummy_images=True))


def test_what_is_left_out_is_that_of_the_start_model(tmp_path, tiny_config):
    """The model of small_runs has the template mistral_instruct and pads; then it crops."""
    path, start = tmp_path / "recipe.json", ModelSection(start=str(write_model(tmp_path, tiny_config)))
    record(path, recipe(start), **OLD)
    with pytest.raises(
        ValueError, match=r"template \(was 'mistral_instruct_system', is 'mistral_instruct'\)"
    ):
        claim_recipe(path, recipe(start))
    record(path, recipe(start), **{**OLD, "data__template": "mistral_instruct"})
    claim_recipe(path, recipe(start))
    settings = start.start + "/processor_config.json"
    text = open(settings).read()
    assert '"pad"' in text
    with open(settings, "w") as file:
        file.write(text.replace('"pad"', '"square"'))
    with pytest.raises(ValueError, match=r"another data\.aspect \(was 'pad', is 'square'\): choose"):
        claim_recipe(path, recipe(start))
    claim_recipe(path, recipe(start, aspect="pad"))


@pytest.mark.parametrize(
    "other, message",
    [
        (recipe(max_length=256), r"another data\.max_length \(was None, is 256\)"),
        (recipe(template="plain"), r"another data\.template \(was 'mistral_instruct_system', is 'plain'\)"),
        (recipe(trainer={"data_seed": 5}), r"another trainer\.data_seed \(was None, is 5\)"),
        (
            recipe(ModelSection(vision="c", language="b", top_k=3)),
            r"another model\.top_k \(was 2, is 3\), another model\.vision \(was 'a', is 'c'\)",
        ),
        (
            recipe(stage=StageSection(lora=LoraSection())),
            r"another stage\.lora\.alpha \(was None, is 16\), .*",
        ),
    ],
)
def test_another_recipe_is_named_with_both_values(tmp_path, other, message):
    path = tmp_path / "recipe.json"
    claim_recipe(path, other)
    claim_recipe(path, recipe())  # nothing was trained yet
    begin(tmp_path)
    claim_recipe(path, recipe())
    with pytest.raises(ValueError, match=f"is a run with {message}: choose another output_dir$"):
        claim_recipe(path, other)


def test_only_the_first_process_records(tmp_path, monkeypatch):
    """Only it knows whether it holds the lock: another run may train here, and have no checkpoint yet."""
    path = tmp_path / "run" / "recipe.json"
    claim_recipe(path, recipe())
    before = path.read_text()
    monkeypatch.setenv("RANK", "1")
    claim_recipe(path, recipe(max_length=256))
    assert path.read_text() == before
    claim(tmp_path / "run" / "data.json", {"number of records": 3})
    assert not (tmp_path / "run" / "data.json").exists()


def test_records_of_data(tmp_path):
    path, wanted = tmp_path / "run" / "data.json", {"content of data": "0f", "number of records": 3}
    claim(path, {**wanted, "number of records": 5})
    claim(path, wanted)  # nothing was trained yet
    begin(path.parent)
    claim(path, wanted)
    with pytest.raises(ValueError, match=r"another number of records \(was 3, is 4\): choose .*, or so$"):
        claim(path, {**wanted, "number of records": 4}, ", or so")
    with pytest.raises(ValueError, match="is a run with another content of data: choose"):
        claim(path, {**wanted, "content of data": "1e"})
    path.write_text(json.dumps({"content of data": "0f", "records": 3}))  # by an earlier version
    claim(path, wanted)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"data\.json is damaged"):
        claim(path, wanted)
