"""What the kernels on 16-bit numbers are held to on sm_90, and which are short of it.

All of it is read in machine code, where it has no noise. An H100 issues some 44 instructions in the
time that it copies a number of 16 bits, so that a quarter of these hide behind the memory, and the
memory is busy while about 48 KB are on their way to each multiprocessor.
"""

from __future__ import annotations

ELEMENT = "instructions an element"
NUMBER = "instructions a number"
NUMBER_IN_A_LOOP = "instructions a number in a loop"
RESIDENT = "programs on a multiprocessor"
KB_IN_FLIGHT = "KB in flight"

#: an element of an elementwise kernel; a number that is loaded or stored, of a whole kernel and of
#: one round of a loop over rows; and of the loads that no instruction has waited for yet
GOALS: dict[str, float] = {
    ELEMENT: 22,
    NUMBER: 11,
    NUMBER_IN_A_LOOP: 10,
    RESIDENT: 2,
    KB_IN_FLIGHT: 48,
}

#: more of these is better
_AT_LEAST = {RESIDENT, KB_IN_FLIGHT}

#: (kernel, what) -> the worst that it measures, and why. ", narrow": without a 128-bit access
SHORT: dict[tuple[str, str], tuple[float, str]] = {}


def shortfall(kernel: str, what: str, value: float) -> str | None:
    """What is wrong with a kernel's figure; None if it has its goal, or what is known of it."""
    limit, _ = SHORT.get((kernel, what), (GOALS[what], ""))
    at_least = what in _AT_LEAST
    if round(value, 1) >= limit if at_least else round(value, 1) <= limit:
        return None
    return (
        f"{value:.1f} {what}, where {'at least' if at_least else 'at most'} {limit:g} is the goal"
    )
