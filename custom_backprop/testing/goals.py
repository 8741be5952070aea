"""What the kernels on 16-bit numbers are held to on sm_90, and which are short of it.

All of it is read in machine code, where it has no noise. While an H200 moves a number of 16 bits,
at 4.2 TB/s, it can issue 16 instructions (132 x 128 a clock of 1.98 GHz), if nothing ever waits:
two thirds of them are allowed. Its memory is busy while some 30 KB are under way to each
multiprocessor; more are asked for, as programs do not load all the time.
"""

from __future__ import annotations

from importlib.metadata import version

ELEMENT = "instructions an element"
NUMBER = "instructions a number"
NUMBER_IN_A_LOOP = "instructions a number in a loop"
RESIDENT = "programs on a multiprocessor"
KB_IN_FLIGHT = "KB in flight"

#: for an element of an elementwise kernel; for a number that is loaded or stored, by a whole kernel
#: and in a loop over rows; programs there at once; loads that nothing has waited for yet
GOALS: dict[str, float] = {
    ELEMENT: 22,
    NUMBER: 11,
    NUMBER_IN_A_LOOP: 10,
    RESIDENT: 2,
    KB_IN_FLIGHT: 48,
}

#: more of these is better
_AT_LEAST = {RESIDENT, KB_IN_FLIGHT}

#: the triton that the figures are of: another one's code differs by a few instructions
TRITON = "3.9."

#: why -> (kernel, what) -> the worst that it measures. ", narrow" are the variants of a kernel
#: without a 128-bit access
_MEASURED: dict[str, dict[tuple[str, str], float]] = {
    "rows of an odd length: each number has an address and an access of its own": {
        ("contrastive._triplet_forward, narrow", KB_IN_FLIGHT): 31.5,
        ("contrastive._triplet_forward, narrow", NUMBER): 11.8,
        ("contrastive._triplet_forward, narrow", NUMBER_IN_A_LOOP): 10.2,
        ("cross_entropy._forward, narrow", NUMBER): 14.8,
        ("embedding._chunk_sums, narrow", KB_IN_FLIGHT): 28,
        ("embedding._gather, narrow", KB_IN_FLIGHT): 40,
        ("embedding._row_sums, narrow", KB_IN_FLIGHT): 9,
        ("gating._backward, narrow", KB_IN_FLIGHT): 29,
        ("gating._backward, narrow", NUMBER): 11.8,
        ("gating._forward, narrow", KB_IN_FLIGHT): 27,
        ("gating._forward, narrow", NUMBER): 12.1,
        ("norm._backward, narrow", KB_IN_FLIGHT): 18,
        ("norm._backward, narrow", NUMBER_IN_A_LOOP): 10.3,
        ("norm._forward, narrow", KB_IN_FLIGHT): 16,
        ("norm._forward, narrow", NUMBER_IN_A_LOOP): 14.8,
        ("normalize._forward, narrow", KB_IN_FLIGHT): 40,
        ("scale._scale, narrow", KB_IN_FLIGHT): 42,
        ("softmax._backward, narrow", KB_IN_FLIGHT): 16,
        ("softmax._backward, narrow", NUMBER): 16,
        ("softmax._forward, narrow", KB_IN_FLIGHT): 32,
        ("softmax._forward, narrow", NUMBER): 13.6,
    },
    "a row of 8192 numbers and more stays in the registers of 512 threads": {
        ("norm._backward", RESIDENT): 1,
        ("norm._forward", RESIDENT): 1,
        ("softmax._backward", RESIDENT): 1,
    },
    "one access of 128 bits a thread, on a multiprocessor full of threads, or nearly full": {
        ("channel_norm._sums", KB_IN_FLIGHT): 32,
        ("embedding._row_sums", KB_IN_FLIGHT): 32,
        ("embedding_bag._sums", KB_IN_FLIGHT): 40,
        ("group_norm._forward", KB_IN_FLIGHT): 32,
        ("nll._forward", KB_IN_FLIGHT): 40,
        ("prelu._forward", KB_IN_FLIGHT): 32,
    },
    "to save registers, the assembler loads some of a thread's numbers after it has used others": {
        ("cross_entropy._forward", KB_IN_FLIGHT): 40,
        ("embedding._chunk_sums", KB_IN_FLIGHT): 24,
        ("norm._forward", KB_IN_FLIGHT): 24,
        ("pointwise.forward", KB_IN_FLIGHT): 24,
        ("rotary._rotate", KB_IN_FLIGHT): 28,
        ("softmax._backward", KB_IN_FLIGHT): 16,
    },
    "a distance whose p is not 1, 2 or infinity: a logarithm and an exponential a difference": {
        ("contrastive._triplet_backward", NUMBER): 17,
        ("contrastive._triplet_forward", NUMBER): 17.7,
    },
    "exponentials and logarithms to the last bit: a small dx is a difference of the two": {
        ("cross_entropy._forward", NUMBER): 13.8,
        ("softmax._backward", NUMBER): 13.2,
    },
    "binary cross-entropy: two logarithms of an element, each of them near 1 a series": {
        ("loss._forward", NUMBER): 13.7,
    },
    "few numbers a thread: its addresses, and the sums over its row, count for much": {
        ("group_norm._forward", NUMBER): 11.1,
        ("prelu._backward", NUMBER): 11.9,
    },
}

SHORT = {key: value for measured in _MEASURED.values() for key, value in measured.items()}


def shortfall(kernel: str, what: str, value: float) -> str | None:
    """How a figure is short of its goal, or of what is known of the kernel; None if it is not, and
    if another triton compiled it."""
    if not version("triton").startswith(TRITON):
        return None
    limit, at_least = SHORT.get((kernel, what), GOALS[what]), what in _AT_LEAST
    if round(value, 1) >= limit if at_least else round(value, 1) <= limit:
        return None
    return f"{value:.1f} {what}, where {limit:g} is {'the least' if at_least else 'the most'}"
