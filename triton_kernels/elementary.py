"""Elementary functions of kernels, in float32 to a unit or two of rounding, in the accumulator's
dtype that they are given.

A GPU's own exponential is 2^(x log2 e): the rounding of that product is an error of |x| / 2 units
of e^x, 1e-6 at x = -30, where the C library's, and so stock's, is exact to a unit. A call of the
special function unit (exponential, reciprocal) takes as long as eight multiplications, and 40
instructions an element are what hides behind the memory of a pass over bfloat16: hence the
polynomials. float64 takes Triton's functions, which are exact there.

HALF states that the argument came from a 16-bit number and the result goes to one. Then an error of
2^-15 of the value is enough, and 22 instructions an element hide behind the memory: the special
function unit alone, and polynomials of less degree.

Reduction of the argument after Cody and Waite (Software Manual for the Elementary Functions, 1980).
The polynomial of tanh is that of Moshier's Cephes library; those of e^r and log(1 + u) are fitted
for the least maximum of the relative error: 4e-9 and 5e-9; that of the normal distribution's tail
too, to 4e-9. In half precision: 9e-6 for log(1 + u), 2e-5 for the tail, which is exact where gelu'
is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import is_cuda


@triton.jit
def upcast(x):
    """float64 as it is, everything else in float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def constant(value, x):
    """In the dtype of x. A comparison would take a number in float32, whatever it is compared with
    (triton before 3.9)."""
    return tl.full((), value, x.dtype)


@triton.jit
def _reduced(x, MAGIC: tl.constexpr):
    """(t, r) with x = t log 2 + r: t is x log2 e rounded to a multiple of 2^-23 MAGIC / 1.5, which
    adding MAGIC does.

    0.693359375 has so few digits that its product with t is exact.
    """
    t = (x * 1.4426950408889634 + MAGIC) - MAGIC
    return t, (x - t * 0.693359375) + t * 2.12194440e-4


@triton.jit
def _expm1_near_0(r):
    """e^r - 1 for |r| <= log(2) / 2."""
    p = ((1.381417399e-3 * r + 8.368921797e-3) * r + 4.166840798e-2) * r + 1.666651894e-1
    return (p * r + 4.999999333e-1) * (r * r) + r


@triton.constexpr_function  # in triton 3.6 a name for what a jit function returns is no constexpr
def half(X):
    """Whether a tensor's elements have 16 bits."""
    return X.dtype.element_ty.primitive_bitwidth == 16


@triton.jit
def divide(a, d, HALF: tl.constexpr = False):
    """a / d for d >= 2^-126. A division takes eight instructions, this takes three."""
    if HALF:
        r = tl.rsqrt(d)
        return a * r * r
    return a / d


@triton.jit
def _square_of_root(x, FACTOR: tl.constexpr):
    """2^(2 x FACTOR): tl.exp2 makes 0 of what is less than 2^-126, which bfloat16 has."""
    root = tl.exp2(x * FACTOR)
    return root * root


@triton.jit
def exp(x, HALF: tl.constexpr = False):
    """e^x = 2^k e^r with a whole k."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    if HALF:
        return _square_of_root(x, 0.7213475204444817)
    k, r = _reduced(tl.where(x < -104, -104.0, tl.where(x > 89, 89.0, x)), 12582912.0)
    return (_expm1_near_0(r) + 1) * tl.exp2(k - 1) * 2  # 2^k may overflow where e^x does not


@triton.jit
def exp_minus(x, HALF: tl.constexpr = False):
    """e^-x for x >= 0."""
    if x.dtype == tl.float64:
        return tl.exp(-x)
    if HALF:
        return _square_of_root(x, -0.7213475204444817)
    k, r = _reduced(tl.where(x > 104, -104.0, -x), 12582912.0)
    return (_expm1_near_0(r) + 1) * tl.exp2(k)


@triton.jit
def exp_below_0(x, FLUSH: tl.constexpr = False):
    """e^x for x <= 0, by the special function unit. FLUSH: what is less than 2^-126 may be 0, for
    which tl.exp has three instructions more."""
    return tl.exp2(x * 1.4426950408889634) if FLUSH else tl.exp(x)


@triton.jit
def _exp_minus_roughly(x):
    """e^-x for x >= 0 to 1.5 units, in fewer instructions: 2^t e^r, |r| < 0.003."""
    t, r = _reduced(tl.where(x > 104, -104.0, -x), 98304.0)
    p = tl.exp2(t)
    return p + p * (r * (0.5 * r + 1))


@triton.jit
def expm1(x, HALF: tl.constexpr = False):
    """e^x - 1 = (2^k - 1) + 2^k (e^r - 1); in half precision Taylor's series near 0; in float64 the
    rounding of e = e^x cancels in (e - 1) / log(e) (Kahan)."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
        far = (e < 0.5) | (e > 2)
        near = (e - 1) * (x / tl.log(tl.where(far | (e == 1), 0.75, e)))
        return tl.where(e == 1, x, tl.where(far, e - 1, near))
    if HALF:
        near = x + x * x * (0.16666667 * x + 0.5)
        return tl.where(tl.abs(x) < 0.0625, near, tl.exp2(x * 1.4426950408889634) - 1)
    k, r = _reduced(tl.where(x < -104, -104.0, tl.where(x > 89, 89.0, x)), 12582912.0)
    s = tl.exp2(k - 1)
    return 2 * ((s - 0.5) + s * _expm1_near_0(r))


@triton.constexpr_function
def _for_nvidia():
    """Whether a kernel is compiled for a GPU of NVIDIA's: the interpreter has no assembly."""
    return not knobs.runtime.interpret and is_cuda()


@triton.jit
def _log_by_unit(w, u, NORMAL: tl.constexpr):
    """log w with u = w - 1, by the special function unit: two instructions where no w is below
    2^-126, else five; Triton's logarithm has 29. It is off by up to 2^-23, so that near 1 it is
    Taylor's series."""
    if _for_nvidia():
        log2: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;" if NORMAL else "lg2.approx.f32 $0, $1;"
        far = 0.6931471805599453 * tl.inline_asm_elementwise(
            log2, "=f,f", [w], tl.float32, is_pure=True, pack=1
        )
    else:
        far = tl.log(w)
    return tl.where(tl.abs(u) < 0.006, u - u * (0.5 * u), far)


@triton.jit
def log(x, HALF: tl.constexpr = False):
    """log x."""
    return _log_by_unit(x, x - 1, False) if HALF else tl.log(x)


@triton.jit
def log1p(u, HALF: tl.constexpr = False):
    """log(1 + u) for -1 <= u <= 1: of w = 1 + u rounded, and what the rounding took, over w, which
    is near 1 where that matters."""
    w = 1 + u
    if HALF:
        return _log_by_unit(w, u, True)
    return tl.log(w) + (u - (w - 1)) * (2 - w)


@triton.jit
def log_sum(a, b):
    """log(a + b) for a, b >= 0, of which one is at least 1. Near 1, what the rounding of the sum
    took is added to its logarithm."""
    z = a + b
    lost = tl.minimum(a, b) - (z - tl.maximum(a, b))
    return tl.log(z) + lost * tl.maximum(2 - z, 0.0)


@triton.jit
def log1p_positive(u, HALF: tl.constexpr = False):
    """log(1 + u) for 0 <= u <= 1: 2 artanh(u / (2 + u)), in half precision a polynomial."""
    if u.dtype == tl.float64:
        return log1p(u)
    if HALF:
        p = ((-0.02386915 * u + 0.1012223) * u - 0.2100487) * u + 0.3252067
        return ((p * u - 0.4993614) * u + 0.9999916) * u
    s = u / (2 + u)
    z = s * s
    p = ((0.28024459 * z + 0.27999141) * z + 0.40021699) * z + 0.66666413
    return 2 * s + s * z * p


@triton.jit
def sigmoid(x, HALF: tl.constexpr = False):
    """1 / (1 + e^-x), from e^-|x|."""
    if HALF:
        return divide(1.0, 1 + tl.exp2(x * -1.4426950408889634), HALF)
    e = exp_minus(tl.abs(x))
    s = 1 / (1 + e)
    return tl.where(x < 0, e * s, s)


@triton.jit
def normal_tail(u, HALF: tl.constexpr = False):
    """(Φ(-u), φ(u)) for u >= 0, φ = e^(-u²/2) / √(2π): the normal distribution's function far from
    its mean, where (1 + erf(x / √2)) / 2 cancels. Φ(-u) / φ(u) is a polynomial in 1 / (1 + 0.3 u);
    in float64 Laplace's continued fraction 1 / (u + 1 / (u + 2 / (u + ...)))."""
    if HALF:
        density = tl.exp2(u * u * -0.7213475204444817 - 1.325748064736159)
        t = divide(1.0, 1 + 0.37 * u, HALF)
        p = ((-0.228530513 * t + 0.528708496) * t + 0.191065954) * t + 0.393583951
        return (p * t + 0.368457938) * t * density, density
    e = exp_minus(0.5 * u * u)
    density = e * 0.3989422804014327
    if u.dtype == tl.float64:
        fraction = u + 1
        for k in range(50):
            fraction = u + (50 - k) / fraction
        near = 0.5 * (1 - tl.erf(u * 0.7071067811865476))  # 3 is a compromise: both to 1e-13
        tail = tl.where(u < 3, near, density / fraction)
    else:
        t = 1 / (1 + 0.3 * u)
        p = ((-0.0206235521 * t + 0.112436063) * t - 0.228214652) * t + 0.191785927
        p = ((p * t - 0.0794246367) * t + 0.0961574384) * t + 0.0783894442
        p = ((p * t + 0.110235468) * t + 0.119571809) * t + 0.11968669
        tail = p * t * e
    return tail, density


@triton.jit
def softplus(x, HALF: tl.constexpr = False):
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)."""
    return tl.where(x < 0, 0.0, x) + log1p_positive(exp_minus(tl.abs(x), HALF), HALF)


@triton.jit
def tanh(x, HALF: tl.constexpr = False):
    """1 - 2 e / (1 + e) with e = e^-2|x|, where that would cancel a polynomial in x² (float64: (1 -
    e) / (1 + e) by e - 1), with the sign of x. Near 1 it is exact to half a unit, which 1 - tanh²
    wants."""
    if HALF:
        z = x * x
        near = x + x * z * (0.13333333 * z - 0.33333333)
        far = 1 - divide(2.0, 1 + tl.exp2(x * 2.8853900817779268), HALF)
        return tl.where(z < 0.015625, near, far)
    u = tl.abs(x)
    if x.dtype == tl.float64:
        e = exp_minus(2 * u)
        m = expm1(-2 * u)
        near = -m / (m + 2)
    else:
        e = _exp_minus_roughly(2 * u)
        z = u * u
        p = (-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2
        p = (p * z + 1.33314422036e-1) * z - 3.33332819422e-1
        near = u + u * z * p
    t = tl.where(u < 0.625, near, 1 - 2 * e / (1 + e))
    return tl.where(x < 0, -t, t)
