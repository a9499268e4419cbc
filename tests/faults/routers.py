"""Faults in the routers other than a plain softmax: `tests` are the stems whose tests run."""

from tests.faults import Fault

REFERENCE, TRITON = "cumo_kernels/backends/reference/scores.py", "cumo_kernels/backends/triton/"
OPS = "cumo_kernels/ops/"

FAULTS = (
    Fault("the bias weighs too", REFERENCE,
          "weights = _scores_at(indices, scores)",
          "weights = _scores_at(indices, scores if bias is None else scores + bias)", "scoring"),
    Fault("gradient without the scale", REFERENCE,
          "grad_values = grad_weights.to(wide) * how.scale", "grad_values = grad_weights.to(wide)", "scoring"),
    Fault("groups by their largest only", REFERENCE,
          "rank.topk(2).values.sum(-1)", "rank.topk(1).values.sum(-1)", "scoring"),
    Fault("slope of the sigmoid without its factor", REFERENCE,
          "return scores * (1 - scores)", "return 1 - scores", "scoring"),
    Fault("softplus series one term short", TRITON + "logits.py",
          "series = u * (1.0 / 17) + 1.0 / 15\n    series = series * u + 1.0 / 13",
          "series = u * (1.0 / 13)", "scoring", "saturated"),
    Fault("the second of a group is its first", TRITON + "logits.py",
          "rest = tl.where(experts[None, :] == first[:, None], LOWEST, own)", "rest = own", "scoring"),
    Fault("one expert too many", OPS + "capacity.py",
          "places - begins < capacity", "places - begins <= capacity", "router_noise"),
    Fault("load by the wrong threshold", OPS + "noisy.py",
          "torch.where(is_chosen, largest[:, top_k:], largest[:, top_k - 1 : top_k])",
          "torch.where(is_chosen, largest[:, top_k - 1 : top_k], largest[:, top_k:])", "router_noise"),
    Fault("columns share their noise", OPS + "noise.py",
          "rows[:, None] ^ count(like.shape[1])", "rows[:, None] ^ 0 * count(like.shape[1])", "router_noise"),
    Fault("Llama-4 renormalised", "cumo_kernels/integrations/routers.py",
          'score="sigmoid", renormalize=False', 'score="sigmoid", renormalize=True', "routers"),
)  # fmt: skip
