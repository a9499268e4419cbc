"""The experts of this project in transformers' Mixtral: errors, then times, compared with `grouped_mm`.

    python examples/mixtral_experts.py                        # a small Mixtral with random weights
    python examples/mixtral_experts.py --model checkpoints/mixtral --layers 2 --tokens 4096

Any Mixture-of-Experts model of transformers can be used. The reference for errors is the same model in fp64.
Times are measured only if the errors of "cumo" are at most twice those of "grouped_mm" plus one rounding.
"""

import argparse
import copy
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

import cumo_model  # noqa: F401  registers the experts implementation "cumo"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder of a checkpoint (random weights)")
parser.add_argument("--layers", type=int, default=2, help="only the first layers (%(default)s)")
parser.add_argument("--tokens", type=int, default=512, help="in one row (%(default)s)")
parser.add_argument("--runs", type=int, default=7, help="timed runs of each (%(default)s)")
args = parser.parse_args()
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
torch.manual_seed(0)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, num_hidden_layers=args.layers)
else:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "vocab_size": 1000}
    config = MixtralConfig(**sizes, num_hidden_layers=args.layers, num_local_experts=8)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
model = model.to(device).train()
ids = torch.randint(model.config.vocab_size, (1, args.tokens), device=device)


def step(model: PreTrainedModel, experts: str) -> tuple[float, list[torch.Tensor]]:
    """Return seconds of forward and backward; the logits and the gradients of all parameters."""
    model.set_experts_implementation(experts)
    model.zero_grad()
    begin = time.perf_counter()
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    torch.cuda.synchronize() if device == "cuda" else None
    return time.perf_counter() - begin, [out.logits.detach(), *(p.grad for p in model.parameters())]


exact, errors, names = step(copy.deepcopy(model).double(), "eager")[1], {}, ("cumo", "grouped_mm")
for name in names:
    off = [((a - b).norm() / b.norm()).item() for a, b in zip(step(model, name)[1], exact, strict=True)]
    errors[name] = (off[0], max(off[1:]))
    print(f"{name:10}  relative error of logits {off[0]:.1e}, of the worst gradient {max(off[1:]):.1e}")
if not all(a <= 2 * b + torch.finfo(dtype).eps for a, b in zip(*errors.values(), strict=True)):
    raise SystemExit("cumo is less exact than grouped_mm, so times are not measured")
turns = [[step(model, name)[0] for name in names] for _ in range(args.runs)]
ours, theirs = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
print(f"cumo {ours:.2f} ms, grouped_mm {theirs:.2f} ms: {theirs / ours:.2f}x, {args.tokens} tokens")
print("times on a CPU do not predict times on a GPU" if device == "cpu" else torch.cuda.get_device_name())
