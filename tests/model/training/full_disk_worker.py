"""One process of test_resume.py: python full_disk_worker.py RECIPE STEP, one of several ranks.

While the checkpoint of STEP is written, the size of files is limited for the first process only.
"""

import os
import resource
import sys

import torch.distributed as dist

from cumo_model.training.recipe import load_recipe
from cumo_model.training.recover import AtomicCheckpoints
from cumo_model.training.trainer import run_recipe


def main() -> None:
    real, before = AtomicCheckpoints._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, model, trial):
        if self.state.global_step == int(sys.argv[2]) and os.environ["RANK"] == "0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            real(self, model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    AtomicCheckpoints._save_checkpoint = save
    run_recipe(load_recipe(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
