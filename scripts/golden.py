#!/usr/bin/env python3
"""Write tests/golden: clipping cases with answers from oracles that are not this crate.

Three oracles: PyTorch's `clip_grad_norm_`, `get_total_norm`, `clip_grads_with_norm_`, `clip_grad_value_` and
`torch.amp.GradScaler`, `torch.linalg.vector_norm` and `torch.renorm` on the CPU; optax's
`clip_by_global_norm`, `clip` and `tree.norm`; and exact arithmetic: Python integers, rounded once at the end.
Exact arithmetic says what is true, the peers say what their users are used to. Where a peer is not within a few
units in the last place of the truth, its case says so in words.

    python scripts/golden.py            write tests/golden/*.json and tests/golden/README.md
    python scripts/golden.py --check    write nothing; fail if a file would change

Set up once, with Python 3.11, in a virtual environment outside the repository:

    pip install torch==2.11.0 optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6

Everything runs on the CPU; the GPU libraries that torch depends on must be there to import it, and are not used.

The same versions give the same bytes: every random number comes from a seed that is the name of its case, and the
peers are held to one core (on Linux) and, on x86-64, to AVX2. The versions are written into the header of each file.

# Format

Each file is `{"generator": {...versions}, "cases": [...]}`, one case per line. Every case has every key; a key that
does not apply is null. (Those of the table from `loss_scale` on are in the cases of `loss_scale.json`, `given_norm.json`
and `scopes.json` only.)

| key | meaning |
|---|---|
| `name` | unique within all files: `case/norm/peer`, or `case/value/peer` |
| `source` | where the case comes from |
| `peer` | `torch`, `optax` or `exact` (no peer was asked) |
| `op` | `clip_grad_norm`, `clip_grad_value`, `total_norm` or `clip_with_norm` |
| `max_norm` | the threshold of `clip_grad_norm` |
| `norm_type` | `1`, `2` or `inf`; in `other_orders.json` any other order, as the f64 nearest to it; null for `clip_grad_value` |
| `eps` | added to the norm in the denominator: 1e-6 for torch, 0 for optax and exact; `clip_grad_norm` only |
| `lo`, `hi` | the bounds of `clip_grad_value` |
| `grads` | the input list, in order: `{"dtype": "f32" or "f64" or "f16" or "bf16", "bits": values}` |
| `exact_norm` | the true norm, rounded once to f64; NaN or inf as below; null for `clip_grad_value` |
| `peer_norm` | the norm the peer returned, converted to f64 (exact); null if it returned none |
| `peer_grads` | the peer's output: one string of values per tensor; null if it raised or returned none |
| `exact_grads` | the true output, laid out the same; see below |
| `peer_differs` | null, or a sentence: which peer differs from the exact truth, and how |
| `loss_scale` | S: `grads` are gradients times S, and `clip_grad_norm` also divides by it |
| `peer_found_inf` | what `GradScaler` found while it unscaled `grads` |
| `total_norm` | the norm that `clip_with_norm` is given |
| `scope` | `tensor`, `group` or `row`: what has a norm of its own. `exact_norm` and `peer_norm` are null then |
| `groups` | the group of each tensor |
| `max_norms` | the threshold of each group; null in it: only measured |
| `rows` | how many rows each tensor has |
| `exact_norms`, `peer_norms` | the norm of each tensor, group or row, in the order of the list |
| `nonfinite` | the policy of the case: `propagate` |

A single number (`max_norm`, `eps`, `lo`, `hi`, the norms) is the bits of an f64 as 16 hex digits, NaN always
7ff8000000000000. Values of a tensor are the raw bits of its elements one after the other, big-endian hex, 8 digits
each for f32, 16 for f64, 4 for f16 and bf16. NaN payloads in `peer_grads` are the peer's own: compare them as NaN.

A long tensor may be a table: `{"dtype", "bits", "numel", "stride"}`, whose element i is value (i * stride) mod m of
the m values in `bits`. Its strings in `peer_grads` and `exact_grads` are tables too, read with the same numel and
stride (equal inputs give equal outputs: clipping is element by element once the norm is known, and the script
checks it). With numel = m and stride = 1, the defaults, a table is just the list of its values.

`exact_norm` is NaN if any element is NaN, else inf if any is infinite. It is also inf where all elements are finite
but the norm is beyond the largest f64.

`exact_grads`, from the f64 N in `exact_norm`, rounding to nearest, ties to even, each time:

- `clip_grad_norm`: if N + eps > max_norm (as real numbers), each element is x * c rounded to its dtype, where c is
  max_norm / (N + eps) rounded to f64 (once: the sum is not rounded first). A zero keeps its sign. Otherwise every
  element keeps its bits. Null when N is not finite, and when the threshold is negative or NaN.
- `clip_grad_norm` with a `loss_scale` S: `exact_norm` is N, the true norm over S, rounded to f64 before and after the
  division. With c as above, or 1 if nothing is clipped, each element is x * m rounded to its dtype, where m is c / S
  rounded to f64. Torch is `GradScaler.unscale_`, then `clip_grad_norm_`.
- `clip_with_norm`: as `clip_grad_norm`, N being the `total_norm` that is given. An element that is not finite is
  multiplied too. Torch is `clip_grads_with_norm_`.
- `clip_grad_value`: the bounds are first rounded to the dtype; a finite bound beyond the dtype's largest finite
  value becomes that value. Then an element below lo becomes lo, one above hi becomes hi, and any other, NaN
  included, keeps its bits. Null when a bound is NaN or lo > hi.
- `total_norm`: null.
- with a `scope`: the same for each part that has a norm of its own. Where that is not finite, `exact_grads` is what
  `nonfinite` makes of the part: x * 0 for an infinite norm, NaN for a norm that is NaN.

Torch is asked for tensors and groups by one `clip_grad_norm_` for each; for rows by `torch.linalg.vector_norm(dim=1)`,
and by `torch.renorm(dim=0)`, whose eps is 1e-7 and which leaves a row whose norm is NaN as it is.

`peer_norm` of optax is `optax.tree.norm`, which its clipping uses and does not return.
"""

import argparse
import decimal
import json
import math
import os
import platform
import random
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from pathlib import Path

# Set before the peers are imported. A different vector width or number of threads adds in a different order, and
# would change the last bits of their answers from machine to machine.
os.environ.update(
    ATEN_CPU_CAPABILITY="avx2",
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
    JAX_PLATFORMS="cpu",
    JAX_ENABLE_X64="1",  # else jax turns every f64 gradient into f32
    XLA_FLAGS="--xla_cpu_max_isa=AVX2 --xla_cpu_multi_thread_eigen=false",
)
# XLA still splits a long sum by the number of cores it may use, and only the affinity of the process tells it one.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import torch

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"

# A peer may differ from the exact answer by this many units in the last place of its own arithmetic: the narrowest
# dtype of the list, since torch and optax both keep norms or coefficients in the dtype of the gradients.
TOLERANCE_ULPS = 4

TORCH_EPS = 1e-6  # the constant inside clip_grad_norm_

SIZE_LIMIT = 2_050_000  # bytes, all files together


# ---------------------------------------------------------------------------------------------------------------
# Floating-point formats, exactly
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """An IEEE 754 binary format, by its width, its precision (hidden bit included) and its largest exponent."""

    name: str
    width: int
    precision: int
    emax: int

    @property
    def min_unit(self):
        """Exponent of the smallest subnormal: the unit in the last place of everything near zero."""
        return 2 - self.emax - self.precision

    @property
    def sign_bit(self):
        return 1 << (self.width - 1)

    @property
    def inf(self):
        return (2 * self.emax + 1) << (self.precision - 1)

    @property
    def epsilon(self):
        return 2.0 ** (1 - self.precision)

    @property
    def digits(self):
        return self.width // 4


F16 = Format("f16", 16, 11, 15)
BF16 = Format("bf16", 16, 8, 127)
F32 = Format("f32", 32, 24, 127)
F64 = Format("f64", 64, 53, 1023)
FORMATS = {f.name: f for f in (F32, F64, F16, BF16)}

NAN64 = 0x7FF8_0000_0000_0000


def is_nan(fmt, bits):
    return bits & (fmt.sign_bit - 1) > fmt.inf


def is_inf(fmt, bits):
    return bits & (fmt.sign_bit - 1) == fmt.inf


def decode(fmt, bits):
    """A finite value as (negative, m, e): (-1)^negative * m * 2^e."""
    magnitude = bits & (fmt.sign_bit - 1)
    field = magnitude >> (fmt.precision - 1)
    mantissa = magnitude & ((1 << (fmt.precision - 1)) - 1)
    if field:
        mantissa |= 1 << (fmt.precision - 1)
    return bool(bits & fmt.sign_bit), mantissa, fmt.min_unit + max(field - 1, 0)


def round_ratio(fmt, negative, num, den=1, exp2=0):
    """Bits of num / den * 2^exp2 rounded to nearest, ties to even; beyond the largest finite value, infinity."""
    sign = fmt.sign_bit if negative else 0
    if num == 0:
        return sign
    top = num.bit_length() - den.bit_length()
    if num << max(-top, 0) < den << max(top, 0):
        top -= 1  # now 2^top <= num / den < 2^(top + 1)
    unit = max(top + exp2 - (fmt.precision - 1), fmt.min_unit)
    shift = exp2 - unit
    num, den = num << max(shift, 0), den << max(-shift, 0)
    quotient, remainder = divmod(num, den)
    if 2 * remainder > den or (2 * remainder == den and quotient & 1):
        quotient += 1
    # The hidden bit of the quotient adds one to the exponent field, and so does a carry out of the mantissa.
    bits = ((unit - fmt.min_unit) << (fmt.precision - 1)) + quotient
    return sign | min(bits, fmt.inf)


def round_sqrt(num, exp2):
    """Bits of the f64 nearest to sqrt(num * 2^exp2)."""
    shift = max(0, 2 * 64 - num.bit_length())
    shift += (exp2 - shift) & 1  # the exponent that is left must be even
    root = math.isqrt(num << shift)
    # One more bit below says "and a little more": enough, since the root has more bits than any f64 mantissa.
    sticky = int(root * root != num << shift)
    return round_ratio(F64, False, 2 * root + sticky, 1, (exp2 - shift) // 2 - 1)


def from_float(fmt, value):
    """The bits of a Python float (or a Fraction) rounded to the format; NaN is the plain quiet one."""
    if isinstance(value, float):
        if math.isnan(value):
            return fmt.inf | 1 << (fmt.precision - 2)
        if math.isinf(value):
            return fmt.inf | (fmt.sign_bit if value < 0 else 0)
    negative = math.copysign(1, value) < 0 if isinstance(value, float) else value < 0
    exact = abs(Fraction(value))
    return round_ratio(fmt, negative, exact.numerator, exact.denominator)


def to_float(fmt, bits):
    """The value as a Python float, which holds every value of the four formats."""
    if is_nan(fmt, bits):
        return math.nan
    negative, m, e = decode(fmt, bits)
    value = math.inf if is_inf(fmt, bits) else math.ldexp(m, e)
    return -value if negative else value


def bits64(value):
    return NAN64 if math.isnan(value) else struct.unpack(">Q", struct.pack(">d", value))[0]


def float64(bits):
    return struct.unpack(">d", struct.pack(">Q", bits))[0]


# ---------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grad:
    """A tensor, as a table of raw bits: element i is bits[i * stride % len(bits)]."""

    fmt: Format
    bits: tuple
    numel: int
    stride: int = 1

    def __post_init__(self):
        assert self.numel >= len(self.bits), "a table longer than the tensor"
        # Otherwise some of the table is never read, and no output can be given for it.
        assert self.numel == 0 or math.gcd(self.stride, len(self.bits)) == 1, "stride and table share a factor"

    def index(self):
        """For every element, its place in the table."""
        return np.arange(self.numel, dtype=np.int64) * self.stride % max(len(self.bits), 1)

    def counts(self):
        """For every value of the table, how many elements have it."""
        return np.bincount(self.index(), minlength=len(self.bits)).tolist()

    def json(self):
        entry = {"dtype": self.fmt.name, "bits": hex_values(self.fmt, self.bits)}
        if self.numel != len(self.bits) or self.stride != 1:
            entry |= {"numel": self.numel, "stride": self.stride}
        return entry


def hex_values(fmt, bits):
    return "".join(f"{b:0{fmt.digits}x}" for b in bits)


def raw(dtype, bits):
    return Grad(FORMATS[dtype], tuple(bits), len(bits))


def grad(dtype, values):
    """Values are rounded to the dtype: floats, integers or Fractions."""
    return raw(dtype, [from_float(FORMATS[dtype], v) for v in values])


def table(dtype, values, numel, stride=1):
    return Grad(FORMATS[dtype], grad(dtype, values).bits, numel, stride)


def constant(dtype, value, numel):
    return table(dtype, [value], numel)


# ---------------------------------------------------------------------------------------------------------------
# Oracle 1: exact arithmetic
# ---------------------------------------------------------------------------------------------------------------


def elements(grads):
    """Every (negative, m, e, count) of a finite list; a value of a table once, with the number of its elements."""
    for g in grads:
        for bits, count in zip(g.bits, g.counts()):
            yield *decode(g.fmt, bits), count


def exact_norm(grads, norm_type):
    """Bits of the f64 nearest to the norm of all the gradients together."""
    if any(is_nan(g.fmt, b) for g in grads for b in g.bits):
        return NAN64
    if any(is_inf(g.fmt, b) for g in grads for b in g.bits):
        return F64.inf
    if norm_type == "inf":
        return max((bits64(abs(to_float(g.fmt, b))) for g in grads for b in g.bits), default=0)
    if norm_type == "rms":
        numel = sum(g.numel for g in grads)
        return root_of_power_sum(grads, 2, numel) if numel else 0
    if norm_type not in ("1", "2", "4"):
        return fractional_norm(grads, Decimal(float(norm_type)))  # with every bit of the f64
    return root_of_power_sum(grads, int(norm_type))


def root_of_power_sum(grads, p, divisor=1):
    """(sum of |x|^p / divisor)^(1/p) for p = 1, 2, 4: the sum is exact, and only the root is rounded."""
    by_exponent = Counter()
    for _, m, e, count in elements(grads):
        by_exponent[p * e] += m**p * count
    if not by_exponent:
        return 0
    low = min(by_exponent)
    total = sum(m << (e - low) for e, m in by_exponent.items())
    if p == 1:
        return round_ratio(F64, False, total, 1, low)
    if p == 2:
        # 300 bits of the quotient, and one below for what is left: enough, as for the root.
        shift = 300 if divisor > 1 else 0
        quotient, rest = divmod(total << shift, divisor)
        return round_sqrt(2 * quotient + (rest > 0), low - shift - 1) if rest else round_sqrt(quotient, low - shift)
    # floor(sqrt(floor(sqrt(n)))) is floor(n^(1/4)); the last bit added is again "and a little more".
    shift = max(0, 4 * 80 - total.bit_length())
    shift += (low - shift) % 4
    root = math.isqrt(math.isqrt(total << shift))
    sticky = int(root**4 != total << shift)
    return round_ratio(F64, False, 2 * root + sticky, 1, (low - shift) // 4 - 1)


def fractional_norm(grads, p):
    """The norm of any order, to 120 decimal digits, then rounded.

    The sum can be irrational, so it cannot be exact; instead the digits are shown to decide the rounding."""
    with localcontext(Context(prec=120, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)):
        values = [(Decimal(m) * Decimal(2) ** e, count) for _, m, e, count in elements(grads)]
        largest = max((value for value, _ in values), default=Decimal(0))
        if not largest:
            return 0
        # Relative to the largest, so that an order of 1e300 leaves something.
        total = sum(count * (value / largest) ** p for value, count in values if value)
        norm = largest * total ** (1 / p)
        if norm.adjusted() > 400:
            return F64.inf
    slack = Fraction(1, 10**100)
    low, middle, high = (from_float(F64, Fraction(norm) * (1 + d)) for d in (-slack, 0, slack))
    assert low == middle == high, "too close to a rounding boundary for the digits that were carried"
    return middle


def exact_clip_norm(grads, norm_bits, max_norm, eps):
    """The table values after clipping; None where there is no right answer."""
    norm = float64(norm_bits)
    if not math.isfinite(norm) or not max_norm >= 0:
        return None
    if max_norm == math.inf or Fraction(norm) + Fraction(eps) <= Fraction(max_norm):
        return [list(g.bits) for g in grads]
    c = Fraction(max_norm) / (Fraction(norm) + Fraction(eps))
    _, c_m, c_e = decode(F64, from_float(F64, c))
    return [[scaled(g.fmt, b, c_m, c_e) for b in g.bits] for g in grads]


def exact_unscale_and_clip_norm(grads, norm_bits, max_norm, eps, loss_scale):
    """The unscaled norm as bits, and the table values; None where there is no right answer."""
    if not math.isfinite(float64(norm_bits)):
        return norm_bits, None
    norm_bits = from_float(F64, Fraction(float64(norm_bits)) / Fraction(loss_scale))
    norm, c = Fraction(float64(norm_bits)), Fraction(1)
    if max_norm != math.inf and norm + Fraction(eps) > Fraction(max_norm):
        c = Fraction(float64(from_float(F64, Fraction(max_norm) / (norm + Fraction(eps)))))
    _, m, e = decode(F64, from_float(F64, c / Fraction(loss_scale)))
    return norm_bits, [[scaled(g.fmt, b, m, e) for b in g.bits] for g in grads]


def exact_clip_with_norm(grads, total_norm, max_norm, eps):
    if not math.isfinite(total_norm) or not max_norm >= 0:
        return None
    if max_norm == math.inf or Fraction(total_norm) + Fraction(eps) <= Fraction(max_norm):
        return [list(g.bits) for g in grads]
    c = from_float(F64, Fraction(max_norm) / (Fraction(total_norm) + Fraction(eps)))
    _, m, e = decode(F64, c)
    any_scaled = lambda fmt, b: scaled(fmt, b, m, e) if is_finite(fmt, b) else nonfinite_times(fmt, b, float64(c))
    return [[any_scaled(g.fmt, b) for b in g.bits] for g in grads]


def is_finite(fmt, bits):
    return bits & (fmt.sign_bit - 1) < fmt.inf


def nonfinite_times(fmt, bits, c):
    return bits if is_inf(fmt, bits) and c > 0 else from_float(fmt, math.nan)


def scaled(fmt, bits, c_m, c_e):
    negative, m, e = decode(fmt, bits)
    return round_ratio(fmt, negative, m * c_m, 1, e + c_e)


def propagated(grads, norm):
    """x * max_norm / norm for a norm that is NaN or infinite, and a finite threshold."""

    def product(fmt, bits):
        if math.isnan(norm) or not is_finite(fmt, bits):
            return from_float(fmt, math.nan)
        return bits & fmt.sign_bit

    return [[product(g.fmt, bits) for bits in g.bits] for g in grads]


def exact_clip_value(grads, lo, hi):
    if not lo <= hi:
        return None
    return [clamped(g, bound(g.fmt, lo), bound(g.fmt, hi)) for g in grads]


def clamped(g, lo, hi):
    low, high = to_float(g.fmt, lo), to_float(g.fmt, hi)
    values = [to_float(g.fmt, b) for b in g.bits]  # NaN compares false with both bounds, and stays
    return [lo if v < low else hi if v > high else b for v, b in zip(values, g.bits)]


def bound(fmt, value):
    """A bound in the dtype of the gradient. A finite one stays finite, so that it also limits an infinity."""
    bits = from_float(fmt, value)
    return bits - 1 if is_inf(fmt, bits) and math.isfinite(value) else bits


# ---------------------------------------------------------------------------------------------------------------
# Oracles 2 and 3: torch and optax. Bits go in and come out as integers, so no conversion can touch a NaN.
# ---------------------------------------------------------------------------------------------------------------

TORCH_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
TORCH_INTS = {16: torch.int16, 32: torch.int32, 64: torch.int64}
NUMPY_DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}


def as_integers(g):
    return np.array(g.bits, dtype=f"u{g.fmt.width // 8}")[g.index()]


def as_table(g, integers):
    """The output of a peer, back as one value per table entry."""
    values = np.zeros(len(g.bits), dtype=integers.dtype)
    values[g.index()] = integers
    assert (values[g.index()] == integers).all(), "equal inputs, unequal outputs"
    return values.tolist()


def to_torch(g):
    integers = as_integers(g).view(f"i{g.fmt.width // 8}")
    return torch.from_numpy(integers).view(TORCH_DTYPES[g.fmt.name])


def from_torch(g, tensor):
    integers = tensor.detach().view(TORCH_INTS[g.fmt.width]).numpy().view(f"u{g.fmt.width // 8}")
    return as_table(g, integers)


def torch_parameters(grads):
    parameters = []
    for g in grads:
        parameter = torch.zeros(g.numel, dtype=TORCH_DTYPES[g.fmt.name], requires_grad=True)
        parameter.grad = to_torch(g)
        parameters.append(parameter)
    return parameters


def torch_clip_norm(grads, max_norm, norm_type):
    parameters = torch_parameters(grads)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, float(norm_type))
    return norm.item(), [from_torch(g, p.grad) for g, p in zip(grads, parameters)]


def torch_unscale_and_clip_norm(grads, max_norm, norm_type, loss_scale):
    parameters = torch_parameters(grads)
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    scaler.scale(torch.zeros(1))  # makes the scale tensor
    optimizer = torch.optim.SGD(parameters)
    # As unscale_ does, which refuses f16 gradients; sharded training calls this with f16 allowed.
    inv_scale, found_inf = scaler._scale.double().reciprocal().float(), torch.zeros(())
    found = scaler._unscale_grads_(optimizer, inv_scale, found_inf, True)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, float(norm_type))
    out = [from_torch(g, p.grad) for g, p in zip(grads, parameters)]
    return norm.item(), out, any(bool(f) for f in found.values())


def torch_clip_with_norm(grads, max_norm, total_norm):
    parameters = torch_parameters(grads)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(total_norm, dtype=torch.float64))
    return None, [from_torch(g, p.grad) for g, p in zip(grads, parameters)]


def torch_clip_value(grads, lo, hi):
    assert lo == -hi or math.isnan(hi), "torch takes one value for both bounds"
    parameters = torch_parameters(grads)
    torch.nn.utils.clip_grad_value_(parameters, hi)
    return None, [from_torch(g, p.grad) for g, p in zip(grads, parameters)]


def torch_total_norm(grads, norm_type):
    return torch.nn.utils.get_total_norm([to_torch(g) for g in grads], float(norm_type)).item(), None


def torch_clip_each(grads, parts, max_norms, norm_type):
    """One call for each part, which is the indices of its tensors."""
    parameters = torch_parameters(grads)
    clip = torch.nn.utils.clip_grad_norm_
    norms = [clip([parameters[i] for i in part], m, float(norm_type)).item() for part, m in zip(parts, max_norms)]
    return norms, [from_torch(g, p.grad) for g, p in zip(grads, parameters)]


def torch_rows(grads, rows):
    return [to_torch(g).reshape(count, g.numel // count) for g, count in zip(grads, rows)]


def torch_renorm(grads, rows, max_norm, norm_type):
    tensors = [torch.renorm(t, float(norm_type), 0, max_norm) for t in torch_rows(grads, rows)]
    return None, [from_torch(g, t.reshape(-1)) for g, t in zip(grads, tensors)]


def torch_row_norms(grads, rows, norm_type):
    norms = [torch.linalg.vector_norm(t, float(norm_type), dim=1) for t in torch_rows(grads, rows)]
    return [n for of_tensor in norms for n in of_tensor.double().tolist()], None


def to_jax(g):
    return jnp.asarray(as_integers(g).view(NUMPY_DTYPES[g.fmt.name]))


def from_jax(g, array):
    assert array.dtype == NUMPY_DTYPES[g.fmt.name]
    return as_table(g, np.asarray(array).view(f"u{g.fmt.width // 8}"))


def optax_clip_norm(grads, max_norm, norm_type):
    assert norm_type == "2", "optax clips by the Euclidean norm only"
    updates = [to_jax(g) for g in grads]
    clipped, _ = optax.clip_by_global_norm(max_norm).update(updates, None)
    return float(optax.tree.norm(updates)), [from_jax(g, a) for g, a in zip(grads, clipped)]


def optax_clip_value(grads, lo, hi):
    assert lo == -hi or math.isnan(hi), "optax takes one value for both bounds"
    clipped, _ = optax.clip(hi).update([to_jax(g) for g in grads], None)
    return None, [from_jax(g, a) for g, a in zip(grads, clipped)]


def optax_total_norm(grads, norm_type):
    return float(optax.tree.norm([to_jax(g) for g in grads], ord=float(norm_type))), None


ORACLES = {
    ("torch", "clip_grad_norm"): torch_clip_norm,
    ("torch", "clip_with_norm"): torch_clip_with_norm,
    ("torch", "clip_grad_value"): torch_clip_value,
    ("torch", "total_norm"): torch_total_norm,
    ("torch", "clip each"): torch_clip_each,
    ("torch", "renorm"): torch_renorm,
    ("torch", "row norms"): torch_row_norms,
    ("optax", "clip_grad_norm"): optax_clip_norm,
    ("optax", "clip_grad_value"): optax_clip_value,
    ("optax", "total_norm"): optax_total_norm,
}


def ask(peer, op, *args):
    """(norm, grads, error) of a peer, each None if it gave none."""
    if peer == "exact":
        return None, None, None
    try:
        return *ORACLES[peer, op](*args), None
    except Exception as error:  # whatever it raises is its answer
        return None, None, f"raises {type(error).__name__}: {str(error).splitlines()[0]}"


# ---------------------------------------------------------------------------------------------------------------
# Where a peer differs, in words
# ---------------------------------------------------------------------------------------------------------------


def ulp(fmt, value):
    exponent = math.frexp(value)[1] - fmt.precision if value else fmt.min_unit
    return math.ldexp(1.0, max(exponent, fmt.min_unit))


def narrowest_epsilon(grads):
    return max((g.fmt.epsilon for g in grads), default=F64.epsilon)


def close(peer, exact, tolerance):
    if math.isnan(exact) or math.isinf(exact):
        return peer == exact or (math.isnan(peer) and math.isnan(exact))
    return abs(peer - exact) <= tolerance


def norm_difference(peer, exact, epsilon):
    """How the norm differs, or None. Not compared with tolerance where the truth is no number."""
    if close(peer, exact, TOLERANCE_ULPS * max(epsilon * abs(exact), ulp(F64, exact))):
        return None
    if not math.isfinite(peer) or not math.isfinite(exact) or peer == 0 or exact == 0:
        return f"norm is {peer:.6g} (true {exact:.6g})"
    return f"norm is off by {(peer - exact) / exact:+.1e} (relative)"


def grads_difference(grads, peer, exact, epsilon, tolerance_ulps):
    """How the clipped gradients differ, or None. Zeros of either sign are equal, and so are all NaN."""
    wrong, values = [], []
    for g, peer_bits, exact_bits in zip(grads, peer, exact):
        for p, x in zip(peer_bits, exact_bits):
            p, x = to_float(g.fmt, p), to_float(g.fmt, x)
            values.append(p)
            if not close(p, x, tolerance_ulps * (ulp(g.fmt, x) + epsilon * abs(x)) if tolerance_ulps else 0.0):
                wrong.append((p, x))
    if not wrong:
        return None
    if not any(values):
        return "all gradients silently 0"
    if peer == [list(g.bits) for g in grads]:
        return "clips nothing"
    return kinds_of_difference(wrong, len(values))


def kinds_of_difference(wrong, total):
    """How many of the (peer, exact) values went which way."""
    kinds = {"become NaN": 0, "become infinite": 0, "become 0": 0, "do not become NaN": 0, "are off": 0}
    worst = 0.0
    for p, x in wrong:
        kind = "NaN" if math.isnan(p) else "infinite" if math.isinf(p) else "0" if p == 0 else None
        kind = f"become {kind}" if kind else "do not become NaN" if math.isnan(x) else None
        kinds[kind or "are off"] += 1
        if not kind:
            worst = max(worst, abs(p - x) / abs(x) if x else math.inf)
    said = [f"{'all' if n == total else f'{n} of {total}'} {kind}" for kind, n in kinds.items() if n]
    if kinds["are off"]:
        said[-1] += f" by up to {worst:.1e} (relative)"
    return "gradients: " + ", ".join(said)


def threshold_difference(grads, peer):
    """What a peer does with a threshold that is no threshold; the right answer is an error and untouched gradients."""
    before = [to_float(g.fmt, b) for g in grads for b in g.bits]
    after = [to_float(g.fmt, b) for g, bits in zip(grads, peer) for b in bits]
    if before == after:
        return "accepts the threshold and changes nothing"
    if all(math.isnan(a) for a in after):
        return "accepts the threshold and all gradients become NaN"
    if all(a * b < 0 for a, b in zip(after, before) if b):
        return "accepts the threshold and flips the signs"
    if len(set(after)) == 1:
        return f"accepts the threshold and all gradients become {after[0]:g}"
    return "accepts the threshold and changes the gradients"


def differences(peer, op, grads, answer, truth, legal):
    """The sentence for `peer_differs`, or None."""
    (norm, out, error), (true_norm, true_out) = answer, truth
    if error:
        return f"{peer}: {error}"
    epsilon = narrowest_epsilon(grads)
    parts = []
    if norm is not None:
        parts.append(norm_difference(norm, true_norm, epsilon))
    if out is not None and true_out is not None:
        tolerance = 0 if op == "clip_grad_value" else TOLERANCE_ULPS  # limiting a value involves no arithmetic
        parts.append(grads_difference(grads, out, true_out, epsilon, tolerance))
    if out is not None and not legal:
        parts.append(threshold_difference(grads, out))
    parts = [p for p in parts if p]
    return f"{peer}: {', '.join(parts)}" if parts else None


# ---------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------


def hex64(value):
    return None if value is None else f"{bits64(value):016x}"


def hex_grads(grads, out):
    return None if out is None else [hex_values(g.fmt, bits) for g, bits in zip(grads, out)]


def case(name, source, peer, op, grads, answer, truth, legal=True, **parameters):
    """One case as it is written. `answer` is the peer's (norm, grads, error), `truth` the exact (norm, grads)."""
    keys = ("max_norm", "eps", "lo", "hi")
    numbers = {key: hex64(parameters.get(key)) for key in keys}
    norm, out, _ = answer
    true_norm, true_out = truth
    return {
        "name": name,
        "source": source,
        "peer": peer,
        "op": op,
        "max_norm": numbers["max_norm"],
        "norm_type": parameters.get("norm_type"),
        "eps": numbers["eps"],
        "lo": numbers["lo"],
        "hi": numbers["hi"],
        "grads": [g.json() for g in grads],
        "exact_norm": hex64(true_norm),
        "peer_norm": hex64(norm),
        "peer_grads": hex_grads(grads, out),
        "exact_grads": hex_grads(grads, true_out),
        "peer_differs": differences(peer, op, grads, answer, truth, legal),
    }


def clip_norm(name, source, grads, max_norm, norm_type="2", peers=None):
    """One clip_grad_norm case per peer: optax where it can (order 2), else exact arithmetic with eps 0."""
    max_norm = float(max_norm)
    norm_bits = exact_norm(grads, norm_type)
    cases = []
    for peer in peers or ("torch", "optax" if norm_type == "2" else "exact"):
        eps = TORCH_EPS if peer == "torch" else 0.0
        truth = float64(norm_bits), exact_clip_norm(grads, norm_bits, max_norm, eps)
        answer = ask(peer, "clip_grad_norm", grads, max_norm, norm_type)
        parameters = {"max_norm": max_norm, "norm_type": norm_type, "eps": eps}
        label = f"{name}/{norm_type}/{peer}"
        cases.append(case(label, source, peer, "clip_grad_norm", grads, answer, truth, max_norm >= 0, **parameters))
    return cases


def clip_scaled(name, grads, loss_scale, max_norm, norm_type="2", peers=("torch",)):
    """Gradients that are multiplied by a loss scale: unscaled and clipped."""
    max_norm, loss_scale = float(max_norm), float(loss_scale)
    norm_bits = exact_norm(grads, norm_type)
    cases = []
    for peer in peers:
        eps = TORCH_EPS if peer == "torch" else 0.0
        true_bits, out = exact_unscale_and_clip_norm(grads, norm_bits, max_norm, eps, loss_scale)
        answer, found = (None, None, None), None
        if peer == "torch":
            try:
                *answer, found = torch_unscale_and_clip_norm(grads, max_norm, norm_type, loss_scale)
                answer = *answer, None
            except Exception as error:
                answer = None, None, f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
        truth = float64(true_bits), out
        parameters = {"max_norm": max_norm, "norm_type": norm_type, "eps": eps}
        label = f"{name}/{norm_type}/{peer}"
        written = case(label, "mixed precision", peer, "clip_grad_norm", grads, answer, truth, **parameters)
        cases.append(written | {"loss_scale": hex64(loss_scale), "peer_found_inf": found})
    return cases


def clip_with_norm(name, grads, given, max_norm):
    """Clipping by a norm that is given."""
    max_norm, given = float(max_norm), float(given)
    cases = []
    for peer in ("torch", "exact") if given == 2 else ("torch",):
        eps = TORCH_EPS if peer == "torch" else 0.0
        truth = given, exact_clip_with_norm(grads, given, max_norm, eps)
        answer = ask(peer, "clip_with_norm", grads, max_norm, given)
        parameters = {"max_norm": max_norm, "eps": eps}
        written = case(f"{name}/given/{peer}", EDGE, peer, "clip_with_norm", grads, answer, truth, **parameters)
        cases.append(written | {"total_norm": hex64(given)})
    return cases


def clip_value(name, source, grads, hi, lo=None, peers=("torch", "optax")):
    """One clip_grad_value case per peer. Bounds that are not symmetric are for exact arithmetic only."""
    hi = float(hi)
    lo = -hi if lo is None else float(lo)
    peers = peers if lo == -hi or math.isnan(hi) else ("exact",)
    truth = None, exact_clip_value(grads, lo, hi)
    cases = []
    for peer in peers:
        answer = ask(peer, "clip_grad_value", grads, lo, hi)
        label = f"{name}/value/{peer}"
        cases.append(case(label, source, peer, "clip_grad_value", grads, answer, truth, lo <= hi, lo=lo, hi=hi))
    return cases


def total_norm(name, source, grads, norm_type="2", peers=("torch", "optax")):
    truth = float64(exact_norm(grads, norm_type)), None
    cases = []
    for peer in peers:
        answer = ask(peer, "total_norm", grads, norm_type)
        label = f"{name}/{norm_type}/{peer}"
        cases.append(case(label, source, peer, "total_norm", grads, answer, truth, norm_type=norm_type))
    return cases


# ---------------------------------------------------------------------------------------------------------------
# published.json: the cases of the peers' own test suites
# ---------------------------------------------------------------------------------------------------------------

NORMS = ("1", "2", "inf")
OTHER_NORMS = ("0.5", "1.5", "4")


def torch_linear_grads():
    """The gradients of test_clip_grad_norm: a large weight and a small bias."""
    return [grad("f32", range(1, 101)), constant("f32", Fraction(1, 1000), 10)]


def torch_small_grads():
    rng = random.Random("torch small grads")
    return [grad("f32", [rng.random() / 10000 for _ in range(100)]), constant("f32", Fraction(1, 500), 10)]


def pytorch_norm_cases(norms):
    source = "pytorch test_nn.py test_clip_grad_norm"
    for norm in norms:
        yield from clip_norm("torch_linear", source, torch_linear_grads(), 2, norm)
        yield from clip_norm("torch_small", source, torch_small_grads(), 2, norm)
        yield from clip_norm("torch_single", source, [grad("f32", range(1, 101))], 2, norm)


def pytorch_nonfinite_cases(norms):
    """A scalar times ones: in all elements, also behind a finite gradient, or in the first element only."""
    source = "pytorch test_nn.py test_clip_grad_norm_error_if_nonfinite"
    ones = constant("f64", 1, 10)
    for scalar in (math.inf, -math.inf, math.nan, 2e22, -2e22, 2e200, -2e200):
        everywhere, first_only = constant("f64", scalar, 10), grad("f64", [scalar] + [1] * 9)
        for norm in norms:
            yield from clip_norm(f"torch_scalar_{scalar}_all", source, [everywhere], 1, norm)
            yield from clip_norm(f"torch_scalar_{scalar}_all_after_ones", source, [ones, everywhere], 1, norm)
            yield from clip_norm(f"torch_scalar_{scalar}_first", source, [first_only], 1, norm)


def pytorch_other_cases():
    linears = [constant("f32", 1, n) for n in (100, 10, 100, 10)]
    for norm in ("2", "inf"):
        source = "pytorch test_nn.py test_clip_grad_norm_multi_device"
        yield from clip_norm("torch_multi_device", source, linears, 0.5, norm)
    weight, bias = grad("f32", [Fraction(i, 5) for i in range(-50, 50)]), constant("f32", 2, 10)
    for name, grads in (("torch_value", [weight, bias]), ("torch_value_no_bias", [weight])):
        yield from clip_value(name, "pytorch test_nn.py test_clip_grad_value", grads, 2.5)


def apex_grads(count, dtypes):
    """Like make_params: one to three dimensions of one to five, each with a dtype from the list, standard normal."""
    rng = random.Random(f"apex {count} {dtypes}")
    grads = []
    for _ in range(count):
        numel = math.prod(rng.randint(1, 5) for _ in range(rng.randint(1, 3)))
        grads.append(normal_grad(rng, rng.choice(dtypes), numel))
    return grads


def apex_cases():
    source = "Apex contrib/test/clip_grad/test_clip_grad.py"
    yield from clip_norm("apex_mixed", source, apex_grads(41, ("f32", "f16", "f64")), 0.54321)
    for norm in ("1", "inf"):
        yield from clip_norm("apex_mixed", source, apex_grads(41, ("f32", "f16", "f64")), 0.54321, norm, ("torch",))
    yield from clip_norm("apex_f16", source, apex_grads(11, ("f16",)), 0.54321)
    yield from clip_norm("apex_f32", source, apex_grads(41, ("f32",)), 0.54321)
    yield from clip_norm("apex_f64", source, apex_grads(41, ("f64",)), 0.54321)


# Around TransformerEngine's chunk of 2048 * 32; its largest pair (7777 * 77, 555 * 555) is scaled down by 77.
TE_SIZES = (
    (7777, 555 * 7), (777, 555), (555, 65537), (65537, 555), (555, 65536), (65536, 555), (33333, 555), (555, 33333)
)


def te_cases():
    source = "TransformerEngine tests/pytorch/test_multi_tensor.py, sizes scaled down"
    for a, b in TE_SIZES:
        for dtype in ("f32", "f16", "bf16"):
            pair = [constant(dtype, 4.0, a), constant(dtype, 4.0, b)]
            yield from clip_norm(f"te_{a}_{b}_{dtype}", source, pair, 1)
    many = [constant("f32", 4.0, n) for _ in range(55) for n in (777, 555)]
    yield from clip_norm("te_repeat_55", source, many, 1)
    yield from te_overflow_cases(source)


def te_overflow_cases(source):
    """NaN in the first element, infinity in the last of all and in the middle."""
    for name, value, at in (("nan_first", math.nan, 0), ("inf_last", math.inf, -1), ("inf_middle", math.inf, 38)):
        values = [4.0] * 77
        values[at] = value
        grads = [grad("f32", values), constant("f32", 4.0, 55)]
        yield from clip_norm(f"te_{name}", source, grads if at == 0 else grads[::-1], 1)


def optax_cases():
    source = "optax transforms/_clipping_test.py"
    updates = [grad("f32", [500, 5]), grad("f32", [300, 3])]
    yield from clip_value("optax_clip_1", source, updates, 1)
    yield from clip_value("optax_clip_1e6", source, updates, 1e6)
    chained = updates
    for i in range(1, 51):
        yield from clip_norm(f"optax_1_over_{i}", source, updates, 1 / i, peers=("optax",))
        # The test also clips what it clipped before, with a threshold a little lower each time.
        yield from clip_norm(f"optax_again_1_over_{i}", source, chained, 1 / i, peers=("optax",))
        _, out = optax_clip_norm(chained, 1 / i, "2")
        chained = [raw("f32", bits) for bits in out]


BURN_LARGE = [0.6294, 0.0940, 0.8176, 0.8824, 0.5228, 0.4310, 0.7152, 0.9559, 0.7893, 0.5684, 0.5939, 0.8883]
BURN_SMALL = [0.3, 0.4, 0.5, 0.2, 0.1, 0.6, 0.3, 0.4]


def burn_cases():
    source = "burn grad_clipping/base.rs"
    yield from clip_value("burn_value", source, [grad("f32", BURN_LARGE)], 0.5)
    yield from clip_norm("burn_norm", source, [grad("f32", BURN_LARGE)], 2.2)
    yield from clip_norm("burn_norm_not_clipped", source, [grad("f32", BURN_SMALL)], 2.2)


def published_cases():
    yield from pytorch_norm_cases(NORMS)
    yield from pytorch_nonfinite_cases(NORMS)
    yield from pytorch_other_cases()
    yield from apex_cases()
    yield from te_cases()
    source = "DeepSpeed tests/unit/runtime/test_runtime_utils.py"
    yield from clip_norm("deepspeed_ones", source, [grad("f32", [1]), grad("f32", [1])], 0.1)
    yield from optax_cases()
    yield from burn_cases()


def other_order_cases():
    yield from pytorch_norm_cases(OTHER_NORMS)
    yield from pytorch_nonfinite_cases(("0.1", "3.5"))  # torch's own other orders; its 0 and negative ones are refused
    yield from edges_of_order()
    for norm in OTHER_NORMS:
        mixed = apex_grads(9, ("f32", "f16", "f64"))
        yield from clip_norm("mixed", "Apex contrib/test/clip_grad/test_clip_grad.py", mixed, 0.54321, norm)
        squares = [grad("f64", [1, 4, 9, 16])]
        yield from clip_norm("squares", "sums that are exact for half orders", squares, 1, norm)


def edges_of_order():
    """What overflows or vanishes on the way for some order, and orders from tiny to huge."""
    lists = {
        "one": [grad("f32", [-3.7])],
        "two_1e20": [grad("f32", [1e20]), grad("f32", [1e20])],
        "two_1e-30": [grad("f32", [1e-30, 1e-30])],
        "f32_subnormal": [raw("f32", [1, 2, 0x7FFFFF, 0x800000])],
        "f16_all_sizes": [grad("f16", [60000, -300, 6e-8, 1, 0])],
        "f64_ends": [grad("f64", [1e300, -1e300, 5e-324, 0, 1])],
        "f64_subnormal": [raw("f64", [1, 3, (1 << 52) - 1])],
        "zeros": [grad("bf16", [0, 0]), grad("f64", [0])],
        "equal": [table("f32", [0.7], 1000)],
        "decades": [grad("f64", [10.0**k for k in range(-9, 10)])],
    }
    for norm in ("0.01", "0.5", "3", "10.7", "100", "1e300"):
        for name, grads in lists.items():
            yield from clip_norm(f"order_{name}", EDGE, grads, 1e-3, norm)
    rng = random.Random("orders")
    for dtype in ALL_DTYPES:
        values = [grad(dtype, [rng.gauss(0, 1e-2) for _ in range(21)]) for _ in range(2)]
        for norm in ("0.5", "1.5", "3", "4", "10.7", "100"):
            yield from clip_norm(f"order_normal_{dtype}", EDGE, values, 1e-2, norm)


# ---------------------------------------------------------------------------------------------------------------
# edges.json: norms at the edges
# ---------------------------------------------------------------------------------------------------------------

EDGE = "peers' edge table"
ALL_DTYPES = ("f32", "f64", "f16", "bf16")


def all_norms(name, grads, max_norm, source=EDGE):
    for norm in NORMS:
        yield from clip_norm(name, source, grads, max_norm, norm)


def threshold_cases():
    """The threshold itself: far below the norm, equal to it, one unit beside it, zero, infinite."""
    five = [grad("f32", [3, 4])]
    below, above = math.nextafter(5, 0), math.nextafter(5, 9)
    thresholds = (1, 5, below, above, 10, 0, math.inf, 1e-3, 1e-7, 1e-40, 1e-300)
    for max_norm in thresholds:
        yield from clip_norm(f"three_four_max_{max_norm!r}", EDGE, five, max_norm)
    for dtype in ("f64", "f16", "bf16"):
        for max_norm in (1, 5, 0, math.inf):
            yield from clip_norm(f"three_four_{dtype}_max_{max_norm}", EDGE, [grad(dtype, [3, 4])], max_norm)
    yield from all_norms("max_0", [grad("f32", [1, -2, 0.0, -0.0])], 0)
    yield from all_norms("max_inf", [grad("f32", [1, -2]), grad("f16", [60000])], math.inf)


def nonfinite_cases():
    finite = grad("f32", [2])
    one_nan, one_inf, minus_inf = (grad("f32", [1, v]) for v in (math.nan, math.inf, -math.inf))
    lists = {
        "nan_first_tensor": [one_nan, finite],
        "nan_last_tensor": [finite, one_nan],
        "inf_first_tensor": [one_inf, finite],
        "inf_last_tensor": [finite, one_inf],
        "minus_inf": [minus_inf, finite],
        "inf_and_nan": [one_inf, finite, one_nan],
        "nan_and_inf": [one_nan, finite, one_inf],
        "nan_alone": [grad("f32", [math.nan])],
        "nan_in_empty_neighbours": [raw("f32", []), one_nan, raw("f32", [])],
        "nan_negative_with_payload": [raw("f32", [0xFFC12345, 0x40000000])],
        "nan_signalling": [raw("f32", [0x7F812345, 0x40000000])],
    }
    for name, grads in lists.items():
        # An infinite norm of an empty tensor raises in torch, which would hide the NaN.
        norms = ("1", "2") if "empty" in name else NORMS
        for norm in norms:
            yield from clip_norm(name, EDGE, grads, 1, norm)
    for dtype in ("f64", "f16", "bf16"):
        for value in (math.nan, math.inf):
            grads = [grad(dtype, [1, value]), grad(dtype, [2]), finite]
            yield from all_norms(f"{value}_in_{dtype}_beside_f32", grads, 1)
    yield from clip_norm("inf_max_inf", EDGE, [one_inf, finite], math.inf)
    yield from clip_norm("nan_max_inf", EDGE, [one_nan, finite], math.inf)
    yield from clip_norm("inf_max_0", EDGE, [one_inf, finite], 0)


def range_cases():
    """Finite gradients whose squares or sums leave the range of their dtype."""
    lists = {
        "two_1e20": ([grad("f32", [1e20]), grad("f32", [1e20])], 1),
        "four_3e38": ([grad("f32", [3e38, -3e38]), grad("f32", [3e38, 3e38])], 1),
        "f16_300": ([grad("f16", [300])], 1),
        "f16_two_60000": ([grad("f16", [60000]), grad("f16", [60000])], 1),
        "f16_60000_max_1e-4": ([grad("f16", [60000])], 1e-4),
        "f16_60000_max_70000": ([grad("f16", [60000, 60000])], 70000),
        "f16_300_beside_f32": ([grad("f16", [300]), grad("f32", [1, 2])], 1),
        "bf16_1e20": ([grad("bf16", [1e20, -1e20])], 1),
        "bf16_3e38": ([grad("bf16", [3e38] * 4)], 1e38),
        "f64_1e200": ([grad("f64", [1e200, -1e200, 1])], 1),
        "f64_1e300_beside_f32": ([grad("f64", [1e300]), grad("f32", [1, 2])], 1),
        "f64_1e200_beside_f16": ([grad("f16", [300]), grad("f64", [1e200])], 1e10),
        "f64_norm_beyond_f64": ([grad("f64", [1.7e308, 1.7e308])], 1),
        "two_1e-30": ([grad("f32", [1e-30, 1e-30])], 1e-31),
        "two_1e-30_not_clipped": ([grad("f32", [1e-30, 1e-30])], 1),
        "f32_subnormal": ([grad("f32", [1e-40, -3e-41, 1.4e-45])], 1e-41),
        "f32_subnormal_not_clipped": ([grad("f32", [1e-40, -3e-41, 1.4e-45])], 1),
        "f16_subnormal": ([grad("f16", [6e-8] * 20 + [-6e-5, 2e-7])], 2e-5),
        "bf16_subnormal": ([grad("bf16", [1e-40, -9e-41])], 5e-41),
        "f64_1e-200": ([grad("f64", [1e-200, -2e-200])], 1e-201),
        "f64_subnormal": ([grad("f64", [5e-324, 1e-310, -2e-320])], 1e-311),
        "large_and_small": ([grad("f32", [1e20, 1e-20, 1, -1e10])], 1e19),
        "large_hides_small": ([grad("f32", [1]), constant("f32", 1e-4, 1000)], 0.5),
    }
    for name, (grads, max_norm) in lists.items():
        yield from all_norms(name, grads, max_norm)


def zero_cases():
    zeros = grad("f32", [0.0, -0.0])
    for max_norm in (1, 1e-9, 0, math.inf):
        yield from clip_norm(f"zero_norm_max_{max_norm}", EDGE, [zeros, grad("f32", [0.0])], max_norm)
    for norm in ("1", "inf"):
        yield from clip_norm("zero_norm_max_1", EDGE, [zeros, grad("f32", [0.0])], 1, norm)
    for dtype in ("f64", "f16", "bf16"):
        yield from clip_norm(f"zero_norm_{dtype}", EDGE, [grad(dtype, [0.0, -0.0])], 0)


def empty_cases():
    full, empty = grad("f32", [3, -4]), raw("f32", [])
    lists = {
        "empty_list": [],
        "empty_only": [empty, empty],
        "empty_first": [empty, full],
        "empty_last": [full, empty],
        "empty_between": [full, empty, full],
        "empty_of_other_dtypes": [raw("f16", []), full, raw("f64", []), raw("bf16", []), full],
    }
    for name, grads in lists.items():
        yield from all_norms(name, grads, 1)
    yield from clip_norm("empty_list_max_0", EDGE, [], 0)


def many_cases():
    """More tensors than fit one launch anywhere (110, 400), with an empty one in slot 110 and at the end."""
    sizes = [1 + i % 3 for i in range(401)]
    sizes[110] = sizes[400] = 0
    grads, next_value = [], 1
    for numel in sizes:
        grads.append(grad("bf16", [(next_value + i) % 97 - 48 for i in range(numel)]))
        next_value += numel
    source = "Apex and TransformerEngine: empty tensor in slot 110"
    yield from clip_norm("many_tensors", source, grads, 1, peers=("torch",))


def tie_cases():
    """Products that lie halfway between two values, where only round to even is right."""
    source = "ties of x * c"
    for dtype in ALL_DTYPES:
        fmt = FORMATS[dtype]
        # The norm is 2 to the last bit of an f64, so c is 1/2, and odd subnormals fall on ties.
        halves = [grad(dtype, [2.0]), raw(dtype, [1, 3, 5, 7, fmt.sign_bit | 1, fmt.sign_bit | 3])]
        if dtype != "f16":  # f16's smallest value is large enough to move the norm
            yield from clip_norm(f"ties_subnormal_{dtype}", source, halves, 1, "2", ("exact",))
        # The largest element is 4, so c is 3/4; every second of these has its product on a tie.
        one = from_float(fmt, 1.0)
        quarters = [grad(dtype, [4.0, -4.0]), raw(dtype, [one + k for k in range(32)]), halves[1]]
        yield from clip_norm(f"ties_{dtype}", source, quarters, 3, "inf")


def edge_cases():
    yield from threshold_cases()
    yield from nonfinite_cases()
    yield from range_cases()
    yield from zero_cases()
    yield from empty_cases()
    yield from many_cases()
    yield from tie_cases()


# ---------------------------------------------------------------------------------------------------------------
# value.json: clipping by value at the edges
# ---------------------------------------------------------------------------------------------------------------


def special_values(dtype):
    """Every kind of element: NaN with a sign and payload, infinities, zeros, subnormals, extremes, plain numbers."""
    fmt = FORMATS[dtype]
    quiet = fmt.inf | 1 << (fmt.precision - 2)
    nans = [quiet, fmt.sign_bit | quiet | 5, fmt.inf | 1]  # the last one is signalling
    edges = [fmt.inf, 0, 1, (1 << (fmt.precision - 1)) - 1, 1 << (fmt.precision - 1), fmt.inf - 1]
    edges += [fmt.sign_bit | b for b in edges]
    plain = grad(dtype, [0.1, -0.1, 0.25, -0.25, 1, -1, 2.5, -2.5, 100, -100]).bits
    # The neighbours of a bound that the dtype cannot represent.
    near = [b + d for b in (from_float(fmt, 0.1), from_float(fmt, -0.1)) for d in (-1, 1)]
    return raw(dtype, nans + edges + list(plain) + near)


def symmetric_value_cases():
    for dtype in ALL_DTYPES:
        grads = [special_values(dtype)]
        for value in (1, 0.1, 0.25, 0, math.inf, 1e-40, 1e-50, 1e6, 1e39, 65519, 65520, 1e-320):
            yield from clip_value(f"special_{dtype}_{value!r}", EDGE, grads, value)
    mixed = [special_values(dtype) for dtype in ALL_DTYPES]
    yield from clip_value("special_mixed", EDGE, mixed, 0.1)


def asymmetric_value_cases():
    pairs = ((-0.25, 1), (0.5, 2), (-3, -1), (0.1, 0.1), (-math.inf, 1), (0, math.inf), (-1e-50, 1e39), (-0.1, 0.0))
    for dtype in ALL_DTYPES:
        for lo, hi in pairs:
            yield from clip_value(f"bounds_{dtype}_{lo!r}_{hi!r}", EDGE, [special_values(dtype)], hi, lo)


def empty_value_cases():
    full, empty = grad("f32", [3, -4, 0.5]), raw("f32", [])
    lists = {
        "empty_list": [],
        "empty_only": [empty],
        "empty_first": [empty, full],
        "empty_last": [full, empty],
        "empty_between": [full, empty, full],
    }
    for name, grads in lists.items():
        yield from clip_value(name, EDGE, grads, 1)


def random_value_cases():
    for dtype in ALL_DTYPES:
        rng = random.Random(f"value {dtype}")
        grads = [normal_grad(rng, dtype, n) for n in (1, 31, 33)] + [normal_table(rng, dtype, 4097)]
        yield from clip_value(f"random_{dtype}", "random", grads, 0.7)
        yield from clip_value(f"random_bits_{dtype}", "random", [random_bits(rng, dtype, 65)], 1e-3)


def value_cases():
    yield from symmetric_value_cases()
    yield from asymmetric_value_cases()
    yield from empty_value_cases()
    yield from random_value_cases()


# ---------------------------------------------------------------------------------------------------------------
# random.json
# ---------------------------------------------------------------------------------------------------------------

SMALL_SIZES = (1, 2, 3, 7, 31, 32, 33)
LARGE_SIZES = (1023, 1024, 1025, 4097)
TABLE = 23  # values of a table that stands for a large tensor; a prime, so that any stride reaches them all
STRIDE = 37


def normal_grad(rng, dtype, numel):
    # normalvariate takes only decisions, never digits, from the C library's logarithm: the same bits anywhere.
    return grad(dtype, [rng.normalvariate(0.0, 1.0) for _ in range(numel)])


def normal_table(rng, dtype, numel):
    values = [rng.normalvariate(0.0, 1.0) for _ in range(min(TABLE, numel))]
    return table(dtype, values, numel, STRIDE)


def lognormal(rng, dtype, count):
    """Magnitudes over some decades, as gradients have; narrower for f16, which has only five."""
    mu, sigma = (-3.0, 1.5) if dtype == "f16" else (-7.0, 4.0)
    return [math.copysign(rng.lognormvariate(mu, sigma), rng.random() - 0.5) for _ in range(count)]


def lognormal_grad(rng, dtype, numel):
    return grad(dtype, lognormal(rng, dtype, numel))


def lognormal_table(rng, dtype, numel):
    return table(dtype, lognormal(rng, dtype, min(TABLE, numel)), numel, STRIDE)


def random_bits(rng, dtype, numel):
    """Finite bit patterns, all equally likely: the whole range of exponents."""
    fmt = FORMATS[dtype]
    return raw(dtype, [rng.randrange(fmt.inf) | (fmt.sign_bit * rng.randrange(2)) for _ in range(numel)])


DISTRIBUTIONS = {"normal": (normal_grad, normal_table), "lognormal": (lognormal_grad, lognormal_table)}


def random_list(distribution, dtypes):
    """One tensor of every size, in random order, the dtypes taking turns."""
    rng = random.Random(f"{distribution} {dtypes}")
    small, large = DISTRIBUTIONS[distribution]
    sizes = list(SMALL_SIZES + LARGE_SIZES)
    rng.shuffle(sizes)
    makers = [(small if n in SMALL_SIZES else large, n) for n in sizes]
    return [make(rng, dtypes[i % len(dtypes)], n) for i, (make, n) in enumerate(makers)]


def random_list_cases():
    """Each list with a threshold well below its norm, and one above it."""
    for distribution in DISTRIBUTIONS:
        for dtypes in [(d,) for d in ALL_DTYPES] + [ALL_DTYPES]:
            name = f"{distribution}_{'_'.join(dtypes)}"
            grads = random_list(distribution, dtypes)
            for norm in NORMS if distribution == "normal" else ("1", "2"):
                true_norm = float64(exact_norm(grads, norm))
                yield from clip_norm(f"{name}_clipped", "random", grads, true_norm / 10, norm)
            if distribution == "normal":
                yield from clip_norm(f"{name}_not_clipped", "random", grads, float64(exact_norm(grads, "2")) * 2)


def random_size_cases():
    """One tensor of each odd size, on its own."""
    for numel in SMALL_SIZES + LARGE_SIZES:
        for dtype in ALL_DTYPES:
            rng = random.Random(f"size {numel} {dtype}")
            small, large = DISTRIBUTIONS["normal"]
            make = small if numel in SMALL_SIZES else large
            yield from clip_norm(f"normal_{dtype}_{numel}", "random", [make(rng, dtype, numel)], 0.5)


def random_bits_cases():
    for dtype in ALL_DTYPES:
        for max_norm in (1, 1e-3):
            rng = random.Random(f"bits {dtype}")
            yield from clip_norm(f"bits_{dtype}_max_{max_norm}", "random", [random_bits(rng, dtype, 67)], max_norm)
    rng = random.Random("bits mixed")
    yield from clip_norm("bits_mixed", "random", [random_bits(rng, d, 19) for d in ALL_DTYPES], 1)


def random_total_cases():
    """Norms only: longer tensors with no value repeated, and a long one from a table."""
    for dtype, numel in (("f32", 1025), ("f64", 1023), ("f16", 2049), ("bf16", 2049)):
        rng = random.Random(f"total {dtype}")
        yield from total_norm(f"total_{dtype}_{numel}", "random", [normal_grad(rng, dtype, numel)])
    for dtype in ALL_DTYPES:
        rng = random.Random(f"long {dtype}")
        grads = [table(dtype, [rng.normalvariate(0.0, 1.0) for _ in range(251)], 300_007, 97)]
        for norm in NORMS:
            yield from total_norm(f"total_long_{dtype}", "random", grads, norm)
    integers = [table("f32", range(1, 102), 300_007, 97), table("f64", range(-50, 51), 100_003, 2)]
    for norm in NORMS:
        yield from total_norm("total_integers", "sums that are exact in integers", integers, norm)


def random_cases():
    yield from random_list_cases()
    yield from random_size_cases()
    yield from random_bits_cases()
    yield from random_total_cases()


# ---------------------------------------------------------------------------------------------------------------
# invalid_thresholds.json: what the peers do where this crate returns an error
# ---------------------------------------------------------------------------------------------------------------


def invalid_threshold_cases():
    lists = {"three_four": [grad("f32", [3, 4])], "zero": [grad("f32", [0.0, -0.0])]}
    for name, grads in lists.items():
        for threshold in (-1, math.nan, -math.inf):
            yield from clip_norm(f"{name}_max_{threshold}", EDGE, grads, threshold)
    for value in (-1, math.nan):
        yield from clip_value(f"value_{value}", EDGE, [grad("f32", [-3, 0.5, 4, -0.25])], value)
    yield from clip_value("bounds_crossed", EDGE, [grad("f32", [-3, 0.5, 4])], -1, 1.5)
    yield from clip_value("bounds_lo_nan", EDGE, [grad("f32", [-3, 0.5, 4])], 1, math.nan)


# ---------------------------------------------------------------------------------------------------------------
# loss_scale.json, given_norm.json
# ---------------------------------------------------------------------------------------------------------------


def loss_scale_cases():
    for dtypes in [(d,) for d in ALL_DTYPES] + [ALL_DTYPES]:
        name = "_".join(dtypes)
        rng = random.Random(f"loss scale {name}")
        grads = [lognormal_grad(rng, d, n) for n in (1, 9) for d in dtypes]
        norm = float64(exact_norm(grads, "2"))
        for scale in (1, 65536, 1000, 0.125):
            for what, max_norm in (("clipped", norm / scale / 3), ("within", norm / scale * 3), ("inf", math.inf)):
                peers = ("torch", "exact") if what == "clipped" else ("torch",)
                yield from clip_scaled(f"scale_{scale}_{what}_{name}", grads, scale, max_norm, peers=peers)
    for norm in NORMS:
        yield from clip_scaled("scale_orders", [grad("f32", [3072, -4096]), grad("f16", [0.0, 512])], 1024, 2, norm)
    for dtype in ALL_DTYPES:
        zero, empty = grad(dtype, [0.0, -0.0]), raw(dtype, [])
        yield from clip_scaled(f"scale_zero_{dtype}", [zero, empty], 65536, 1)
        yield from clip_scaled(f"scale_max_0_{dtype}", [grad(dtype, [3, -4]), zero], 2, 0)
        # Ends of the dtype: what a large scale loses, and what a small one makes too large.
        ends = raw(dtype, [1, 2, 3, FORMATS[dtype].sign_bit | 5, FORMATS[dtype].inf - 1])
        for scale in (65536, 3) if dtype == "f64" else (65536, 3, 0.5):
            yield from clip_scaled(f"scale_{scale}_ends_{dtype}", [ends], scale, math.inf)
        for special in (math.nan, math.inf, -math.inf):
            grads = [grad(dtype, [1, 2]), grad(dtype, [3, special])]
            for what, max_norm in (("max_1", 1), ("max_inf", math.inf)):
                yield from clip_scaled(f"scale_1024_{special}_{what}_{dtype}", grads, 1024, max_norm)


def given_norm_cases():
    for dtype in ALL_DTYPES:
        rng = random.Random(f"given norm {dtype}")
        grads = [normal_grad(rng, dtype, 9), raw(dtype, []), grad(dtype, [0.0, -0.0])]
        special = [grad(dtype, [1, math.nan, -2, math.inf, -math.inf, 0.0]), grad(dtype, [-3])]
        for what, values in (("normal", grads), ("special", special)):
            for given in (0, 0.5, 1, 2, 10, 1e30, math.inf, math.nan):
                yield from clip_with_norm(f"given_{given}_{what}_{dtype}", values, given, 1)
            yield from clip_with_norm(f"given_5_max_0_{what}_{dtype}", values, 5, 0)
            yield from clip_with_norm(f"given_5_max_inf_{what}_{dtype}", values, 5, math.inf)


# ---------------------------------------------------------------------------------------------------------------
# scopes.json: a norm for each tensor, group or row
# ---------------------------------------------------------------------------------------------------------------

RENORM_EPS = 1e-7  # the constant inside torch.renorm


def scoped_case(name, what, op, grads, parts, answer, thresholds, eps, norm_type, **scope):
    """`parts` are lists of gradients, in order, each with a norm of its own; `put_back` in `scope` puts them in place."""
    put_back = scope.pop("put_back")
    norms, out, error = answer
    true_norms = [float64(exact_norm(part, norm_type)) for part in parts]
    true_out = None
    if op == "clip_grad_norm":
        clipped = []
        for part, norm, max_norm in zip(parts, true_norms, thresholds):
            one = exact_clip_norm(part, bits64(norm), max_norm, eps)
            if one is None:
                one = propagated(part, norm) if max_norm < math.inf else [list(g.bits) for g in part]
            clipped.append(one)
        true_out = put_back(clipped)
    written = case(name, what, "torch", op, grads, (None, out, error), (None, true_out), norm_type=norm_type, eps=eps,
                   max_norm=1.0 if op == "clip_grad_norm" else None)
    said = [] if written["peer_differs"] is None else [written["peer_differs"].removeprefix("torch: ")]
    for part, norm, true_norm in zip(parts, norms or [], true_norms):
        said.append(norm_difference(norm, true_norm, narrowest_epsilon(part)))
    said = [s for s in dict.fromkeys(said) if s]
    hexes = lambda values: None if values is None else [hex64(v) for v in values]
    return written | scope | {
        "exact_norms": hexes(true_norms), "peer_norms": hexes(norms), "nonfinite": "propagate",
        "peer_differs": f"torch: {', '.join(said)}" if said else None,
    }


def clip_groups(name, grads, group_of, max_norms, norm_type="2"):
    indices = [[i for i, of in enumerate(group_of) if of == group] for group in range(len(max_norms))]
    thresholds = [math.inf if m is None else float(m) for m in max_norms]

    def put_back(clipped):
        of_tensor = {i: bits for part, of_part in zip(indices, clipped) for i, bits in zip(part, of_part)}
        return [of_tensor[i] for i in range(len(grads))]

    answer = ask("torch", "clip each", grads, indices, thresholds, norm_type)
    parts = [[grads[i] for i in part] for part in indices]
    each = group_of == list(range(len(grads))) and set(max_norms) == {1.0}
    scope = {"scope": "tensor"} if each else {
        "scope": "group", "groups": group_of, "max_norms": [hex64(m) for m in max_norms]}
    yield scoped_case(f"{name}/{norm_type}/torch", "one clip_grad_norm_ for each", "clip_grad_norm", grads, parts, answer,
                      thresholds, TORCH_EPS, norm_type, put_back=put_back, **scope)


def rows_of(g, count):
    numel = g.numel // count
    return [[raw(g.fmt.name, g.bits[i * numel : (i + 1) * numel])] for i in range(count)]


def each_row(name, grads, rows, max_norm, norm_types):
    parts = [row for g, count in zip(grads, rows) for row in rows_of(g, count)]
    thresholds = [float(max_norm)] * len(parts)

    def put_back(clipped):
        flat = iter(clipped)
        return [[bits for _ in range(count) for bits in next(flat)[0]] for count in rows]

    for norm_type in norm_types:
        answer = ask("torch", "row norms", grads, rows, norm_type)
        yield scoped_case(f"{name}_norms/{norm_type}/torch", "torch.linalg.vector_norm", "total_norm", grads, parts, answer,
                          thresholds, 0.0, norm_type, put_back=put_back, scope="row", rows=rows)
        if max_norm == 1.0:
            answer = ask("torch", "renorm", grads, rows, 1.0, norm_type)
            yield scoped_case(f"{name}/{norm_type}/torch", "torch.renorm", "clip_grad_norm", grads, parts, answer,
                              thresholds, RENORM_EPS, norm_type, put_back=put_back, scope="row", rows=rows)


def scope_cases():
    for dtypes in [(d,) for d in ALL_DTYPES] + [ALL_DTYPES]:
        name = "_".join(dtypes)
        rng = random.Random(f"scopes {name}")
        grads = [normal_grad(rng, dtypes[i % len(dtypes)], n) for i, n in enumerate((1, 12, 5, 0, 4, 17))]
        for norm in (*NORMS, "0.5", "3"):
            yield from clip_groups(f"tensors_{name}", grads, list(range(6)), [1.0] * 6, norm)
            yield from clip_groups(f"groups_{name}", grads, [1, 0, 1, 2, 0, 2], [3.0, 0.125, None], norm)
        # A group without tensors, one with nothing in it, one whose threshold is its norm, one that becomes 0.
        edges = [grad(dtypes[0], [3, 4]), raw(dtypes[0], []), grad(dtypes[-1], [-12]), grad(dtypes[-1], [0.0, -0.0])]
        yield from clip_groups(f"group_edges_{name}", edges, [1, 2, 4, 3], [1.0, 5.0, 1.0, 1.0, 0.0])
        for special in (math.nan, math.inf, -math.inf):
            bad = [grad(dtypes[0], [1, special, -2]), grad(dtypes[-1], [3, 4]), grad(dtypes[-1], [2, -0.5])]
            yield from clip_groups(f"group_{special}_{name}", bad, [0, 1, 0], [1.0, 2.5])
            yield from clip_groups(f"tensor_{special}_{name}", bad, [0, 1, 2], [1.0] * 3)
            if len(dtypes) == 1:
                rows = [grad(dtypes[0], [3, 4, 1, special, 0.25, 0.5])]
                yield from each_row(f"rows_{special}_{name}", rows, [3], 1.0, ("2",))
        if len(dtypes) > 1:
            continue
        rows = [normal_grad(rng, name, n) for n in (15, 3, 9, 16)]
        yield from each_row(f"rows_{name}", rows, [5, 3, 1, 2], 1.0, ("1", "2", "3"))
        yield from each_row(f"more_rows_{name}", rows, [3, 1, 9, 2], 0.0, ("0.5", "inf"))
    f32, f64 = grad("f32", [1e20, -1e20, 3, 4, 1e-30, 1e-30]), grad("f64", [1e200, 1e200, 1e-200, 0.0])
    yield from each_row("rows_out_of_range", [f32, f64], [3, 2], 1.0, ("2",))
    yield from each_row("rows_f16_300", [grad("f16", [300, 300, 0.5, 0.25])], [2], 1.0, ("2",))


# ---------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------

FILES = {
    "published.json": (published_cases, "the peers' own published test cases"),
    "edges.json": (edge_cases, "norm clipping at the edges"),
    "value.json": (value_cases, "value clipping: special values, bounds, random lists"),
    "random.json": (random_cases, "random lists of one and of mixed dtypes, odd sizes, all bit patterns"),
    "other_orders.json": (other_order_cases, "norms of other orders, from 0.01 to 1e300"),
    "loss_scale.json": (loss_scale_cases, "clipping by norm with a loss scale to remove"),
    "given_norm.json": (given_norm_cases, "clipping by a norm that is given"),
    "scopes.json": (scope_cases, "a norm for each tensor, group or row"),
    "invalid_thresholds.json": (invalid_threshold_cases, "negative and NaN thresholds, crossed bounds"),
}


def versions():
    return {
        "script": "scripts/golden.py",
        "torch": torch.__version__.split("+")[0],  # without the tag of the accelerator it was built for
        "optax": optax.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def file_text(cases, made_with):
    """One case per line, so that a change to one shows as one line."""
    lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases)
    return f'{{"generator":{json.dumps(made_with)},\n"cases":[\n{lines}\n]}}\n'


def readme_text(cases_of):
    """The format, taken from the top of this script, and tables computed from the cases."""
    form = __doc__.split("# Format\n", 1)[1].strip()
    setup = next(line.strip() for line in __doc__.splitlines() if line.strip().startswith("pip install"))
    made_with = ", ".join(f"{k} {v}" for k, v in versions().items() if k != "script")
    parts = [
        "# Golden files",
        "Clipping cases with answers from PyTorch, optax and exact arithmetic. Written by `scripts/golden.py`, this\n"
        "page included: change the script, not the files. `presets.json` is another script's, and [PRESETS.md](PRESETS.md)\n"
        "is its page.",
        f"Made with {made_with}. To regenerate:",
        f"    {setup}\n    python scripts/golden.py            # --check: write nothing, fail if a file would change",
        file_table(cases_of),
        "`log2_exp2.txt` is no list of cases: logarithms and exponentials to 106 bits, for the tests of the CPU path's own.\n"
        "Each line has the function, the argument, the f64 nearest to the result and the f64 nearest to what that leaves.",
        "## Format",
        form,
        "## Where a peer is wrong",
        f"Norms and clipping by norm: by more than {TOLERANCE_ULPS} units in the last place of the peer's arithmetic\n"
        "(the narrowest dtype of the list). Clipping by value: at all. Counts are of values written in the file, so a\n"
        "value of a table counts once. XLA flushes subnormal numbers to 0 on the CPU, which is why optax loses some\n"
        "in `value.json`.",
        difference_table(cases_of),
        "## What the peers make of a norm that is not finite",
        "There is no right answer here, so `exact_grads` is null. What becomes of the finite elements, zeros left out:",
        nonfinite_table(cases_of),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(header, rows):
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *escaped]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def file_table(cases_of):
    rows = []
    for name, cases in cases_of.items():
        peers = Counter(c["peer"] for c in cases)
        rows.append([f"`{name}`", FILES[name][1], len(cases), *(peers[p] for p in ("torch", "optax", "exact"))])
    return markdown_table(["file", "what", "cases", "torch", "optax", "exact"], rows)


def difference_table(cases_of):
    """Cases of one peer that say the same share a row."""
    rows = {}
    for file, cases in cases_of.items():
        for c in cases:
            if c["peer_differs"]:
                peer, what = c["peer_differs"].split(": ", 1)
                rows.setdefault((file, peer, what), []).append(c["name"].removesuffix("/" + peer))
    cells = []
    for (file, peer, what), names in rows.items():
        cells.append([peer, what, ", ".join(f"`{n}`" for n in names), f"`{file}`"])
    return markdown_table(["peer", "what", "cases", "file"], cells)


def nonfinite_table(cases_of):
    rows = {}
    for cases in cases_of.values():
        for c in cases:
            norm = c["exact_norm"]
            if c["op"] == "clip_grad_norm" and norm is not None and c["peer_grads"] and not math.isfinite(unhex(norm)):
                key = c["peer"], "infinite" if unhex(norm) == math.inf else "NaN", finite_fate(c)
                rows[key] = rows.get(key, 0) + 1
    header = ["peer", "true norm", "finite elements", "cases"]
    return markdown_table(header, [[*key, count] for key, count in sorted(rows.items())])


def unhex(text):
    return float64(int(text, 16))


def finite_fate(c):
    """What became of the finite non-zero elements."""
    fates = set()
    for g, out in zip(c["grads"], c["peer_grads"]):
        fmt = FORMATS[g["dtype"]]
        for before, after in zip(split_hex(fmt, g["bits"]), split_hex(fmt, out)):
            b, a = to_float(fmt, before), to_float(fmt, after)
            if math.isfinite(b) and b:
                fates.add("NaN" if math.isnan(a) else "0" if a == 0 else "unchanged" if a == b else "other")
    return " and ".join(sorted(fates)) or "none in the list"


def split_hex(fmt, text):
    return [int(text[i : i + fmt.digits], 16) for i in range(0, len(text), fmt.digits)]


def self_check():
    """The exact arithmetic against what Python's own correctly rounded operations give."""
    rng = random.Random("self check")
    for _ in range(2000):
        num, den = rng.getrandbits(rng.randint(1, 200)), 1 + rng.getrandbits(rng.randint(1, 200))
        assert float64(round_ratio(F64, False, num, den)) == num / den
        value = math.ldexp(rng.random() - 0.5, rng.randint(-30, 15))
        assert from_float(F16, value) == struct.unpack(">H", struct.pack(">e", value))[0]
        assert from_float(F32, value) == struct.unpack(">I", struct.pack(">f", value))[0]
        square = rng.getrandbits(53)
        assert float64(round_sqrt(square, 0)) == math.sqrt(square)
        for fmt in FORMATS.values():
            bits = rng.randrange(fmt.inf) | fmt.sign_bit * rng.randrange(2)
            assert from_float(fmt, to_float(fmt, bits)) == bits
    assert from_float(BF16, 1 + 2**-8) == from_float(BF16, 1.0) and from_float(BF16, 1 + 3 * 2**-8) == 0x3F82
    assert from_float(F64, 5e-324 / 1) == 1 and round_ratio(F64, False, 1, 2, -1074) == 0


def log2_and_exp2():
    """log2(x) and 2^z to 106 bits: function, argument, the nearest f64, and the f64 nearest to the rest."""
    rng = random.Random("log2 and exp2")
    root = math.sqrt(0.5)
    logs = [1.0, root, 2 * root, sys.float_info.min, sys.float_info.max, 5e-324, 2.0**-1022 - 5e-324, 0.75, 3.0, 10.0]
    logs += [near for x in (1.0, root, 2 * root, 2.0) for near in (math.nextafter(x, 0), math.nextafter(x, 9))]
    logs += [float64(rng.randrange(1, F64.inf)) for _ in range(150)]
    logs += [float64(rng.randrange(1, 1 << 52)) for _ in range(20)]
    logs += [rng.uniform(root, 2 * root) for _ in range(150)]
    logs += [1 + rng.choice((-1, 1)) * 2.0 ** -rng.uniform(1, 52) for _ in range(50)]
    exps = [0.0, -0.0, 0.5, -0.5, -1.5, 1.5, 1.0, -1.0, -1000.0, 1000.0, 5e-324, -1e-300]
    exps += [near for x in (0.5, -0.5, -1.0, -999.5) for near in (math.nextafter(x, -2e3), math.nextafter(x, 2e3))]
    exps += [rng.uniform(-1000, 0) for _ in range(100)] + [rng.uniform(-1, 1) for _ in range(200)]
    exps += [rng.uniform(0, 1000) for _ in range(50)]
    lines = []
    with localcontext(Context(prec=80)):
        ln2 = Decimal(2).ln()
        for name, arguments in (("log2", logs), ("exp2", exps)):
            for x in arguments:
                value = Decimal(x).ln() / ln2 if name == "log2" else (Decimal(x) * ln2).exp()
                nearest = float(value)  # correctly rounded, by Python
                rest = float(value - Decimal(nearest))
                lines.append(" ".join([name, *(f"{bits64(v):016x}" for v in (x, nearest, rest))]))
    return "\n".join(lines) + "\n"


def generate():
    """Every file as its name and its text."""
    torch.set_num_threads(1)
    self_check()
    cases_of = {name: list(make()) for name, (make, _) in FILES.items()}
    names = Counter(c["name"] for cases in cases_of.values() for c in cases)
    assert max(names.values()) == 1, f"not unique: {[n for n, k in names.items() if k > 1]}"
    texts = {name: file_text(cases, versions()) for name, cases in cases_of.items()}
    texts["README.md"] = readme_text(cases_of)
    texts["log2_exp2.txt"] = log2_and_exp2()
    total = sum(len(t.encode()) for t in texts.values())
    assert total < SIZE_LIMIT, f"{total} bytes: too large to commit"
    return texts


def run(description, generate):
    """Writes the files that differ from what is there; with --check, says so instead."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    check = parser.parse_args().check
    stale = []
    for name, text in generate().items():
        path = GOLDEN / name
        if path.is_file() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    print(f"{'differs' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(run(__doc__, generate))
