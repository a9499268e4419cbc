"""`import cumo_model` imports neither torch nor transformers, and registers with both in any order."""

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import cumo_model
import cumo_model.data
import cumo_model.processing
from cumo_model.lazy import WATCHED

HEAVY = "{'torch', 'transformers', 'numpy', 'PIL', 'cumo_kernels'}"
REGISTERED = """
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert AutoConfig.for_model("cumo").model_type == "cumo"
from transformers.models.auto import CONFIG_MAPPING
assert {"cumo", "cumo_vision_model", "llava_mistral", "llava_mixtral"} <= set(CONFIG_MAPPING.keys())
assert cumo_model.CumoConfig in AutoModelForImageTextToText._model_mapping
assert "cumo" in ALL_EXPERTS_FUNCTIONS
import torch
assert torch.ops.cumo.route
"""
# what a program imports first; what follows must find everything registered
FIRST = {
    "ours": "import cumo_model",
    "one Auto class": "import cumo_model\nfrom transformers import AutoConfig\nAutoConfig.for_model('cumo')",
    "another model": "import cumo_model\nfrom transformers import LlavaConfig, MixtralForCausalLM",
    "a pipeline": "import cumo_model\nfrom transformers import pipeline",
    "theirs": "from transformers import AutoProcessor\nimport cumo_model",
    "theirs, hardly": "import transformers\nimport cumo_model",
    "a module of ours": "import cumo_model.model.cumo",
    "experts for transformers": "import cumo_model\nimport cumo_kernels.integrations.transformers",
    "an old path": "import cumo_model, cumo_model.moe\nassert callable(cumo_model.upcycle)",
    "all names": "from cumo_model import *\nimport cumo_model\nassert upcycle is cumo_model.upcycle",
    "a room": "import cumo_model\ncumo_model.model.config.CumoConfig",
    "peft": "import cumo_model\nimport peft, accelerate",
    "threads": """
import cumo_model, threading
def one(name, failed=[]):
    import transformers
    getattr(transformers, name)
names = ["AutoConfig", "AutoModel", "AutoProcessor", "MixtralForCausalLM", "CLIPVisionModel", "AutoTokenizer"]
threads = [threading.Thread(target=one, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
""",
}


def python(code: str, *arguments) -> str:
    done = subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_nothing_heavy_is_imported():
    python(
        "import sys, cumo_model, cumo_model.data, cumo_model.processing, cumo_model.__main__\n"
        "assert 'upcycle' in dir(cumo_model) and 'scan' in dir(cumo_model.data)\n"
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)"
    )


@pytest.mark.parametrize("first", FIRST)
def test_everything_is_registered_whatever_comes_first(first):
    python(FIRST[first] + REGISTERED, "-W", "ignore::DeprecationWarning")


WAITS = """
import importlib._bootstrap, sys, threading, cumo_model

class Waits:
    \"""Another thread waits for an import of this one: Python's import system raises this.\"""

    def find_spec(self, name, path=None, target=None):
        if name == "cumo_model.registered":
            raise importlib._bootstrap._DeadlockError(name)

waits = Waits()
sys.meta_path.insert(0, waits)
"""
ALIVE = "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"


def test_registration_is_left_to_the_next_import_that_ends():
    watched = f"for name in {WATCHED}: importlib.import_module(name)\n"
    then = "sys.meta_path.remove(waits)\nassert cumo_model.lazy.Hook.is_left\n"
    then += "import transformers.models.fuyu.modeling_fuyu\n"
    python(WAITS + ALIVE + watched + then + REGISTERED, "-W", "ignore::DeprecationWarning")
    with pytest.raises(AssertionError, match="cumo_model cannot register itself with transformers: _Dead"):
        python(WAITS + watched)  # there is no other thread


def test_the_ops_are_there_with_torch_alone():
    python(
        "import sys, cumo_model, torch\nassert torch.ops.cumo.route and 'transformers' not in sys.modules\n"
        "import torch.export"
    )
    python("import sys, torch, cumo_model\nassert torch.ops.cumo.route and 'transformers' not in sys.modules")


@pytest.mark.parametrize(
    "module, words", [("cumo_model.registered", "itself with transformers"), ("cumo_kernels", "the ops of")]
)
def test_a_registration_that_fails_says_so(module, words):
    code = (
        f"import sys, cumo_model\nsys.modules[{module!r}] = None\n"
        "try:\n    from transformers import AutoConfig\n    import torch\n"
        f"except ImportError as error:\n    assert 'cumo_model cannot register {words}' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    if module == "cumo_model.registered":
        code += "from transformers import AutoConfig, AutoModel  # which are fine"
    python(code)


def test_a_spawned_process_unpickles_what_it_is_given(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, pickle\n"
        "def kind(config):\n    return config.model_type\n"
        "if __name__ == '__main__':\n    import cumo_model\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(kind, [cumo_model.CumoVisionConfig()]))\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert done.stdout == "cumo_vision_model\n", done.stderr


@pytest.mark.parametrize("package", [cumo_model, cumo_model.data, cumo_model.processing])
def test_the_table_of_names_is_what_editors_and_documentation_see(package):
    tree = ast.parse(Path(package.__file__).read_text())
    seen = next(
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    shown = {node.module: " ".join(alias.name for alias in node.names) for node in seen.body}
    assert shown == package._MODULES
    assert sorted(" ".join(shown.values()).split()) == sorted(package.__all__)
    for module, names in shown.items():
        for name in names.split():
            assert getattr(package, name) is getattr(importlib.import_module(module), name)
    assert set(package.__all__) <= set(dir(package))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cumo_model' has no attribute 'nothing'"):
        _ = cumo_model.nothing
    with pytest.raises(ImportError):
        from cumo_model import nothing  # noqa: F401


def test_public_names_are_pickled():
    for name in cumo_model.__all__:
        assert pickle.loads(pickle.dumps(getattr(cumo_model, name))) is getattr(cumo_model, name)


def test_a_loader_is_its_own_again():
    """The hook leaves nothing in what it has watched."""
    import cumo_model.model.cumo as module

    assert "exec_module" not in vars(module.__spec__.loader)
