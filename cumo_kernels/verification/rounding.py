"""The error of an unsplit sum: that of plain PyTorch if it added all terms in one chain.

How far a correct kernel is from fp64 depends on how it splits its sums. A BLAS adds K terms in many short
chains and has a small error. One chain is an equally plain way to add and equally correct, but its error is
several times larger. So the accuracy rule of accuracy.py uses an estimate of the error of one chain, derived
from the length of each sum and the size of its terms:

    terms t_1 ... t_n, added in a dtype with unit roundoff u = eps / 2     s_j = t_1 + ... + t_j
    addition j rounds s_j: error at most u |s_j|, uniform, so its variance is at most u^2 s_j^2 / 3
    rounding errors are independent: variance of the sum's error = u^2 / 3 * sum_j s_j^2

The partial sums depend on the order of the terms, but the mean of their squares over all n! orders does not.
A term is among the first j with probability j / n, two are with j (j - 1) / (n (n - 1)); summed over j:

    mean of sum_j s_j^2 = (n + 1) (2 s^2 + q) / 6            s = t_1 + ... + t_n      q = t_1^2 + ... + t_n^2
    standard deviation  = u sqrt((n + 1) (2 s^2 + q) / 18)

For terms of random signs, s^2 = q on average, so the standard deviation is u sqrt(n / 6) times the sum's root
mean square. If all terms have one sign, it is u n / 3 times the sum. q costs the same product once more, of
the squares. (The worst case over orders and roundings, n u sum |t|, is not allowed to any kernel.)
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cumo_kernels.tracing import run_inside

_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.mv, _ATEN.addmv, _ATEN.dot, _ATEN.vdot,
}  # fmt: skip
_SUMS = {_ATEN.sum, _ATEN.mean}


class UnsplitSums(TorchDispatchMode):
    """Inside, every matrix product, sum and mean gets a random error like one chain in a dtype of `eps`.

    For runs in fp64, forward and backward, whose own error is negligible. The difference from fp64 is then
    the effect of unsplit sums on the result, through everything that is computed from them. The length of a
    sum is that in the code under the mode. Other sums (softmax, norms, index_add) keep fp64 accuracy.
    """

    def __init__(self, eps: float, generator: torch.Generator):
        super().__init__()
        self.unit, self.generator = eps / 2, generator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "cumo":  # one of our ops: the sums are inside
            return run_inside(self, func, self.generator.device.type, args, kwargs)
        out = func(*args, **kwargs)
        op = func.overloadpacket
        if op not in _PRODUCTS | _SUMS or not out.is_floating_point() or out.numel() == 0:
            return out
        squared = [t.square() if isinstance(t, Tensor) else t for t in args]
        # alpha and beta scale terms; dtype converts the input; nothing is written to `out`
        others = {
            name: value**2 if name in ("alpha", "beta") else value
            for name, value in kwargs.items()
            if name != "out"
        }
        squares = op(*squared, **others)
        tensors = [t for t in args if isinstance(t, Tensor)]
        if op in _PRODUCTS:
            length = tensors[-2].shape[-1] + len(tensors) - 2  # the tensor that addmm adds is a term too
        else:
            length = tensors[0].numel() // out.numel()
            squares = squares / max(length, 1) if op is _ATEN.mean else squares
        deviation = (squares + 2 * out.square()).mul_((length + 1) / 18).sqrt_().mul_(self.unit)
        drawn = torch.randn(out.shape, generator=self.generator, dtype=out.dtype, device=out.device)
        return out.add_(drawn.mul_(deviation))
