"""MoELayer in your own model, with balance loss and z loss: a small language model of bytes.

    python examples/moe_layer.py                              # trains on the text of this file
    python examples/moe_layer.py --text book.txt --steps 2000 --width 512 --experts 16

`record_routing` records the routing of all layers in the `with` block, from which both losses are computed.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from cumo_model import MoELayer, load_balancing_loss, record_routing, router_z_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", type=Path, default=Path(__file__), help="any file (this one)")
for name, number in {"steps": 60, "width": 64, "experts": 4, "layers": 2, "tokens": 128, "batch": 8}.items():
    parser.add_argument(f"--{name}", type=int, default=number, help="(%(default)s)")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.moe = MoELayer(width, 2 * width, args.experts, top_k=2, activation="swiglu", bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


layers = [nn.Embedding(256, args.width), *(Block(args.width) for _ in range(args.layers))]
model = nn.Sequential(*layers, nn.RMSNorm(args.width), nn.Linear(args.width, 256)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).to(device, torch.long)
print("step  cross-entropy  balance (1=uniform)  z loss  largest load of an expert in each layer")
for number in range(args.steps + 1):
    starts = torch.randint(len(text) - args.tokens, (args.batch, 1), device=device)
    rows = text[starts + torch.arange(args.tokens + 1, device=device)]
    with record_routing() as records:
        logits = model(rows[:, :-1])
    balance = sum(load_balancing_loss(record.routing.stats) for record in records) / len(records)
    z = sum(router_z_loss(record.routing.stats) for record in records) / len(records)
    entropy = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    (entropy + 0.1 * balance + 0.01 * z).backward()  # CuMo's coefficients
    optimizer.step()
    optimizer.zero_grad()
    if number % max(1, args.steps // 6) == 0:
        loads = [record.routing.tokens_per_expert.float() for record in records]
        busiest = " ".join(f"{load.max() / load.sum():.0%}" for load in loads)
        print(f"{number:4}  {entropy:13.3f}  {balance:19.3f}  {z:6.3f}  {busiest}")
