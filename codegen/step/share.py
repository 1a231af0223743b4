"""How finely the work of a phase is cut."""

SHARE_BYTES = 2**17
"""Of a weight, in one share: some microseconds of reading, long beside the cost of claiming it."""

SHARE_FLOATS = 2**12
"""Of pointwise work."""

SHARES_A_THREAD = 8
