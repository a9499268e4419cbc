"""LoRA on the stacked experts of a Mixture-of-Experts model with peft, using the kernels of this project.

    python examples/lora_experts.py                           # a small Mixtral with random weights
    python examples/lora_experts.py --model checkpoints/mixtral --text notes.txt --out runs/adapter

`target_parameters` names the weights of experts, stacked parameters of shape (experts, out, in). The kernels
compute W x + B (A dropout(x)), without the sum of W and B A that peft itself builds in every step.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

import cumo_model  # noqa: F401  registers the experts implementation "cumo"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder of a checkpoint with its tokenizer (random weights)")
parser.add_argument("--text", type=Path, default=Path(__file__), help="text to train on (this file)")
parser.add_argument("--out", type=Path, help="folder of the adapter (a temporary one)")
parser.add_argument("--rank", type=int, default=8, help="(%(default)s)")
parser.add_argument("--steps", type=int, default=30, help="(%(default)s)")
args = parser.parse_args()
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
torch.manual_seed(0)
scratch = tempfile.TemporaryDirectory()
base, out = args.model or f"{scratch.name}/mixtral", args.out or f"{scratch.name}/adapter"
if not args.model:  # a checkpoint to start from; its tokens are bytes
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    sizes |= {"num_hidden_layers": 2, "num_local_experts": 4, "initializer_range": 0.1}
    config = MixtralConfig(**sizes, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
options = {"dtype": dtype, "experts_implementation": "cumo"}
load = lambda: AutoModelForCausalLM.from_pretrained(base, **options).to(device)
text = args.text.read_text()
ids = AutoTokenizer.from_pretrained(base)(text)["input_ids"] if args.model else list(text.encode())
ids = torch.tensor(ids, device=device)[:512][None]

linear, experts = ["q_proj", "v_proj"], ["experts.gate_up_proj", "experts.down_proj"]
lora = LoraConfig(r=args.rank, lora_dropout=0.05, target_modules=linear, target_parameters=experts)
model = get_peft_model(load(), lora)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(args.steps + 1):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % max(1, args.steps // 5) == 0:
        print(f"step {step:3}  loss {loss.item():.3f}")
model.save_pretrained(out)
with torch.no_grad():
    learned = model.eval()(ids).logits
    again = PeftModel.from_pretrained(load(), out).eval()
    print(f"adapter loaded again: same logits {torch.equal(again(ids).logits, learned)}")
    off = (again.merge_and_unload()(ids).logits - learned).abs().max() / learned.abs().max()
print(f"merged into the experts: relative difference {off:.1e}")
