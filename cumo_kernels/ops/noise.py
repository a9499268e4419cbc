"""Random numbers for routers: a function of seed, token and column, the same on every device.

A counter goes through the finaliser of SplitMix64 (Steele, Lea, Flood 2014), once for each of its parts.
"""

import math
import numbers

import torch
from torch import Tensor

from cumo_kernels.ops.checks import check_device, check_int, shown

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64
_FIRST = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_BITS = 23  # of a number: (k + 1/2) / 2**23 is exact in fp32
# normal numbers are multiples of 1 / _STEP, so that the last digits of a device are rounded off
_STEP = 2.0**20
_ANGLE = 1 << 32  # added to the stream of the second number of `normal`


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift right of int64."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    for by, factor in ((30, _FIRST), (27, _SECOND)):  # in place: these tensors are as large as the noise
        x.bitwise_xor_(_shifted(x, by)).mul_(factor)
    return x.bitwise_xor_(_shifted(x, 31))


def check_seed(seed: int | Tensor | None) -> int | Tensor:
    if isinstance(seed, Tensor):
        if seed.ndim or seed.dtype != torch.int64:
            raise ValueError(
                f"seed must be an int or a () int64 tensor, got {tuple(seed.shape)} {seed.dtype}"
            )
        return seed
    seed = check_int("seed", seed, also=" or a () int64 tensor")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return seed


def check_share(name: str, value: float) -> float:
    """The value, if it is a number from 0 to below 1."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    return value


def _integers(seed: int | Tensor, like: Tensor, stream: int) -> Tensor:
    """(T, N) int64 in [0, 2**23) for `like` (T, N)."""
    count = lambda n: torch.arange(n, dtype=torch.int64, device=like.device)
    if isinstance(seed, Tensor):
        check_device("seed", seed, "the tokens", like)
    else:  # no copy from the host
        seed = torch.full((), seed, dtype=torch.int64, device=like.device)
    key = _mixed(_mixed(seed) + stream)
    rows = _mixed(count(like.shape[0]) ^ key)
    return _shifted(_mixed(rows[:, None] ^ count(like.shape[1])), 64 - _BITS)


def uniform(seed: int | Tensor, like: Tensor, stream: int = 0) -> Tensor:
    """(T, N) fp32 in (0, 1), for the shape and device of `like`: one of 2**23 numbers for each (row, column).

    `stream`: another number gives independent noise of the same seed.
    """
    return (_integers(seed, like, stream).float() + 0.5) * 2.0**-_BITS


def normal(seed: int | Tensor, like: Tensor, stream: int = 0) -> Tensor:
    """(T, N) fp32, standard normal, as `uniform`; a multiple of 2**-20.

    By the formula of Box and Muller (1958), whose functions torch has compiled, so that a graph may capture
    them.
    """
    radius, angle = (_integers(seed, like, part).double() for part in (stream, stream + _ANGLE))
    radius, angle = ((part + 0.5) * 2.0**-_BITS for part in (radius, angle))
    found = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
    return ((found * _STEP).round() / _STEP).float()


def jittered(x: Tensor, jitter: float, seed: int | Tensor) -> Tensor:
    """`x` (T, N) with each element times a number in (1 - jitter, 1 + jitter) (arXiv 2101.03961, 2.4)."""
    factor = 1 + jitter * (2 * uniform(seed, x) - 1)
    return (x * factor).to(x.dtype)
