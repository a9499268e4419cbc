"""All benchmarks, by name: those of the paper's table in its order, and those of hallucination."""

from cumo_model.evaluation.task import Task
from cumo_model.evaluation.tasks.gqa import Gqa
from cumo_model.evaluation.tasks.llava_bench import LlavaBench
from cumo_model.evaluation.tasks.mathvista import MathVista
from cumo_model.evaluation.tasks.mmbench import MmBench, MmBenchCn
from cumo_model.evaluation.tasks.mme import Mme
from cumo_model.evaluation.tasks.mmmu import Mmmu
from cumo_model.evaluation.tasks.mmvet import MmVet
from cumo_model.evaluation.tasks.objects import Chair, ObjectsPope
from cumo_model.evaluation.tasks.pope import Pope
from cumo_model.evaluation.tasks.scienceqa import ScienceQa
from cumo_model.evaluation.tasks.seed import Seed
from cumo_model.evaluation.tasks.textvqa import TextVqa
from cumo_model.evaluation.tasks.vqav2 import Vqav2

CLASSES = (ScienceQa, TextVqa, Gqa, Pope, Mme, MmBench, MmBenchCn, MmVet, Vqav2, LlavaBench, Seed, Mmmu,
           MathVista, ObjectsPope, Chair)  # fmt: skip
TASKS: dict[str, Task] = {kind.name: kind() for kind in CLASSES}
