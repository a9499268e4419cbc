"""Upcycle a dense CLIP and a dense Mistral to a CuMo with experts, and train it on two processes (torchrun).

    python examples/upcycle_and_train.py                      # small parts with random weights, on a CPU
    python examples/upcycle_and_train.py --vision checkpoints/clip --text checkpoints/mistral \\
        --data train.json --images pictures --processes 8 trainer.fsdp_config=engines/fsdp2.json

Each command is printed before it runs. The recipe is `mistral-7b/sft`; `key=value` overrides one of its keys.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("vision", "text", "data", "images"):
    parser.add_argument(f"--{name}", type=Path, help="give all four or none")
parser.add_argument("--out", type=Path, help="a new folder (a temporary one)")
parser.add_argument("--processes", type=int, default=2, help="one per GPU (%(default)s)")
parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides a key of the recipe")
args = parser.parse_args()
out, records, settings = args.out or Path(tempfile.mkdtemp(), "cumo"), [], []


def run(*words: str) -> None:
    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *words], check=True)


if args.vision is None:  # small models and data, in the same formats as real ones
    args.vision, args.text, args.data, args.images = out / "clip", out / "mistral", out / "train.json", out
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    bpe, names = ByteLevelBPETokenizer(), {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    bpe.train_from_iterator([], 300, special_tokens=list(names.values()))
    Tokenizer(tokenizer_object=bpe._tokenizer, **names).save_pretrained(args.text)
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(args.vision)
    MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, vocab_size=300)).save_pretrained(
        args.text
    )
    for colour in ("red", "green", "blue", "yellow", "black", "white", "purple", "orange"):
        Image.new("RGB", (16, 16), colour).save(out / f"{colour}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": colour}]
        records.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
    args.data.write_text(json.dumps(records))
    settings = ["bf16=false", "tf32=", "use_cpu=true", "dataloader_num_workers=0", "num_train_epochs=8"]
    settings = [f"trainer.{line}" for line in settings] + ["stage.batch_size=8", "stage.learning_rate=0.003"]
run("-m", "cumo_model", "upcycle", f"--vision={args.vision}", f"--text={args.text}", f"--out={out}/moe")
recipe = [f"model.start={out}/moe", f"data.files={args.data}", f"data.images={args.images}", *settings]
torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
train = ["-m", "cumo_model", "train", "--config=mistral-7b/sft", f"output_dir={out}/run"]
run(*torchrun, *train, *recipe, *args.overrides)
history = json.loads((out / "run/model/trainer_state.json").read_text())["log_history"]
print("language loss:", *(f"{entry['language']:.3f}" for entry in history if "language" in entry))
