"""Code shared by the Triton kernels: dot, rounding, and activations as device functions.

The same code is compiled for a GPU or run by Triton's interpreter on CPU tensors (TRITON_INTERPRET=1), with
two differences: the interpreter multiplies bf16 tiles wrongly, so there `dot` widens its operands first; and
it truncates fp32 to bf16, so there `narrow` rounds explicitly.
"""

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda, libdevice
from triton.language.target_info import cuda_capability_geq

INTERPRETING: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
# CUMO_PDL=1: a kernel starts while its predecessor still runs, and waits; off until measured on a GPU
PDL: tl.constexpr = tl.constexpr(os.environ.get("CUMO_PDL") == "1" and not triton.knobs.runtime.interpret)

QUICK_GELU_ALPHA: tl.constexpr = tl.constexpr(1.702)
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)
SQRT_8_OVER_PI: tl.constexpr = tl.constexpr(1.5957691216057308)
GELU_CUBIC: tl.constexpr = tl.constexpr(0.044715)


def input_precision(dtype: torch.dtype) -> str:
    """Precision of `dot`: "tf32" for fp32 operands when torch's own matmul may use it, else "ieee"."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def tile_of_rows(width: int, element_size: int, rows: int | None = None) -> tuple[int, int]:
    """Rows x columns that a 4-warp program moves: four 16-byte pieces per thread.

    The number of columns is a power of two: a divisor of `width` if there is one of at least a KiB, else the
    next power above `width`, within the limit.
    """
    elements = 4 * 128 * 16 // element_size
    if rows == 1:
        return 1, elements
    divisor = width & -width
    columns = divisor if divisor * element_size >= 1024 else 1 << (width - 1).bit_length()
    columns = min(columns, elements)
    return elements // columns, columns


@triton.jit
def wait_for_earlier():
    """First in every kernel: under CUMO_PDL wait for all earlier kernels, then let the next one start.

    A kernel that has waited has seen the end of all kernels before it. So waiting for that kernel is enough.
    """
    if PDL:
        if cuda_capability_geq(9, 0):
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()


@triton.jit
def precise_exp(x):
    """exp, accurate to one or two bits; the error of tl.exp grows with its argument."""
    if INTERPRETING:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b, with acc fp32; a (M, K), b (K, N) share one of fp32, bf16, fp16."""
    if INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x (fp32) rounded to the nearest DTYPE, ties to even."""
    if INTERPRETING:
        if DTYPE == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            # add half of the truncated part, minus one if the last kept bit is even; -65536 is 0xFFFF0000
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def only_if(condition, mask):
    """mask where the scalar `condition` holds, else all False.

    Equals `mask & condition`, which Triton's interpreter turns into int32; 3.9 rejects that.
    """
    return tl.where(condition, mask, False)


@triton.jit
def sigmoid_and_grad(z):
    """-> s = sigmoid(z), s * (1 - s), both accurate where the other is close to its limit."""
    t = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + t)
    return tl.where(z >= 0.0, 1.0, t) * inverse, t * inverse * inverse


@triton.constexpr_function
def parameter(NAME, KEY):
    """The number after `KEY=` in an activation's name as `Activation.spelled` writes it."""
    return float(NAME.partition("(")[2].partition(KEY + "=")[2].split(",")[0].split(")")[0])


@triton.constexpr_function
def kind_of(NAME):
    """An activation's name without its parameters."""
    return NAME.split("(")[0]


@triton.constexpr_function
def is_interleaved(NAME):
    """Whether gate and up alternate in memory: [g0, u0, g1, u1, ...]."""
    return "interleaved" in NAME


@triton.jit
def gate_offset(i, NAME: tl.constexpr):
    """Where column i of the gate is in a row of a gated z."""
    return i * 2 if is_interleaved(NAME) else i


@triton.jit
def up_offset(N, NAME: tl.constexpr):
    """How far column i of the up half is behind column i of the gate, of N."""
    return 1 if is_interleaved(NAME) else N


@triton.jit
def linear(u, NAME: tl.constexpr):
    """g(u) of a gated activation act(gate) * g(up): u itself, or clamped; u is fp32."""
    KIND: tl.constexpr = kind_of(NAME)
    if KIND == "swiglu_clamped" or KIND == "swiglu_oai" or KIND == "clamped_swiglu":
        LIMIT: tl.constexpr = parameter(NAME, "limit")
        u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))  # NaN stays NaN
        if KIND == "swiglu_oai":
            u += 1.0
    return u


@triton.jit
def linear_backward(grad, u, NAME: tl.constexpr):
    """grad * g'(u); the slope is 1 at the bounds."""
    KIND: tl.constexpr = kind_of(NAME)
    if KIND == "swiglu_clamped" or KIND == "swiglu_oai" or KIND == "clamped_swiglu":
        LIMIT: tl.constexpr = parameter(NAME, "limit")
        grad = tl.where((u >= -LIMIT) & (u <= LIMIT), grad, 0.0)
    return grad


@triton.jit
def act_and_grad(z, NAME: tl.constexpr):
    """-> act(z), act'(z) of the elementwise part of activation NAME (of the gate if gated); z is fp32.

    Tensors are the left operands of constants: Triton 3.9's interpreter makes constexpr * tensor a constexpr.
    """
    KIND: tl.constexpr = kind_of(NAME)
    if KIND == "quick_gelu":
        s, ds = sigmoid_and_grad(z * QUICK_GELU_ALPHA)
        return z * s, s + z * QUICK_GELU_ALPHA * ds
    elif KIND == "gelu" or KIND == "geglu":
        cdf = 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
        return z * cdf, cdf + z * INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    elif KIND == "gelu_tanh" or KIND == "geglu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u)
        s, ds = sigmoid_and_grad((z + z * GELU_CUBIC * z * z) * SQRT_8_OVER_PI)
        return z * s, s + z * ds * SQRT_8_OVER_PI * (1.0 + z * (3.0 * GELU_CUBIC) * z)
    elif KIND == "relu" or KIND == "reglu":
        # not max(z, 0), which would turn NaN into 0
        value = tl.where(z <= 0.0, 0.0, z)
        return value, tl.where(value > 0.0, 1.0, 0.0)
    elif KIND == "relu2":
        r = tl.where(z <= 0.0, 0.0, z)
        return r * r, r * 2.0
    elif KIND == "swiglu_clamped" or KIND == "swiglu_oai":
        LIMIT: tl.constexpr = parameter(NAME, "limit")
        below = tl.where(z > LIMIT, LIMIT, z)  # NaN stays NaN
        if KIND == "swiglu_oai":
            ALPHA: tl.constexpr = parameter(NAME, "alpha")
            s, ds = sigmoid_and_grad(below * ALPHA)
            slope = s + below * ALPHA * ds
        else:
            s, ds = sigmoid_and_grad(below)
            slope = s + below * ds
        return below * s, tl.where(z <= LIMIT, slope, 0.0)
    elif KIND == "clamped_swiglu":
        LIMIT: tl.constexpr = parameter(NAME, "limit")
        s, ds = sigmoid_and_grad(z)
        value = z * s
        return tl.where(value > LIMIT, LIMIT, value), tl.where(value <= LIMIT, s + z * ds, 0.0)
    else:
        tl.static_assert(KIND == "silu" or KIND == "swiglu", "unknown activation")
        s, ds = sigmoid_and_grad(z)
        return z * s, s + z * ds


@triton.jit
def act(z, NAME: tl.constexpr):
    """act(z) only; bit-identical to that of `act_and_grad`."""
    value, _ = act_and_grad(z, NAME)
    return value
