"""The routing plan of one MoE layer, and the only definition of the shape letters.

T  num_tokens          rows after flattening batch and sequence
E  num_experts         experts in the layer
K  top_k               experts per token
S  num_slots           T * K; a slot is one (token, choice) pair, numbered token * K + choice
H  hidden_size         width of a token
I  intermediate_size   inner width of an expert
O  output_size         output width of an expert (H unless stated otherwise)
G  num_groups          sets of tokens over which router statistics are averaged (crop, image, batch)
N, K of a GEMM         rows and columns of one expert's (N, K) weight, as in torch.nn.Linear
R  rank                inner width of a low-rank addition to a weight (LoRA)
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterStats:
    """Inputs of the auxiliary losses, for each of G groups of tokens and each of E experts.

    A group without tokens has zeros. Gradients flow through `mean_probs` and `mean_squared_logsumexp`.
    """

    mean_probs: Tensor  # (G, E) fp32: mean softmax probability
    top1_density: Tensor  # (G, E) fp32: share of tokens whose first choice is the expert; no gradient
    mean_squared_logsumexp: Tensor  # (G,) fp32: mean of logsumexp(logits)^2


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert with which weight, and the sort that groups slots by expert.

    T tokens each choose K of E experts. Each of the S = T * K (token, choice) pairs is
    a slot, with the number token * K + choice.

    Sorted position p belongs to expert e when expert_offsets[e] <= p < expert_offsets[e + 1]; within an
    expert, slots keep their order. A slot whose expert index is E is dropped (expert parallelism makes such
    slots): it is sorted past expert_offsets[E], has inverse_permutation -1, and contributes nothing.
    """

    topk_weights: Tensor  # (T, K) fp32; rows sum to 1 when renormalised; carries gradient
    topk_indices: Tensor  # (T, K) int32
    tokens_per_expert: Tensor  # (E,) int32
    expert_offsets: Tensor  # (E + 1,) int32, starts with 0
    permutation: Tensor  # (S,) int32: sorted position -> slot
    inverse_permutation: Tensor  # (S,) int32: slot -> sorted position, -1 if dropped
    stats: RouterStats | None = None  # of `route`; None of `routing_from_topk`

    @property
    def num_tokens(self) -> int:
        return self.topk_indices.shape[0]

    @property
    def num_experts(self) -> int:
        return self.tokens_per_expert.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_indices.shape[1]

    @property
    def num_slots(self) -> int:
        return self.permutation.shape[0]

    @property
    def token_indices(self) -> Tensor:
        """(S,) int32: sorted position -> token."""
        return self.permutation // self.top_k


@dataclass(frozen=True)
class Adapter:
    """A low-rank addition to the weights of all experts (LoRA, arXiv 2106.09685): W + scaling * b @ a.

    W + scaling * b @ a is never formed: y = W x + scaling * b (a dropout(x)).
    """

    a: Tensor  # (E, R, K), float
    b: Tensor  # (E, N, R), float
    scaling: float = 1.0
    dropout: float = 0.0  # share of the elements of x that are set to 0 for this addition, in training only


SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2")
TINY = 1e-20  # keeps sums of scores that may all be zero from dividing by zero


@dataclass(frozen=True)
class Scoring:
    """How a router turns logits into scores, chooses by them and weighs; the defaults are a plain softmax.

    Ops take it as a string, since a custom op has no other argument for it.
    """

    score: str = "softmax"
    expert_groups: int = 1  # runs of consecutive experts of the same number
    top_groups: int = 1  # of these, so many may be chosen from
    group_score: str = "max"  # of a group's experts; "top2": the sum of the two largest
    scale: float = 1.0  # of the weights, after they were divided by their sum

    def __str__(self) -> str:
        return f"{self.score} {self.expert_groups} {self.top_groups} {self.group_score} {self.scale!r}"

    @staticmethod
    @cache
    def parse(text: str) -> "Scoring":
        score, groups, top_groups, group_score, scale = text.split()
        return Scoring(score, int(groups), int(top_groups), group_score, float(scale))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over `dtype` values are accumulated: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
