"""Random numbers that depend on keys alone: no batch, chunk, process or interruption changes what is drawn.

A key is an int64; `mixed` is the finalizer of SplitMix64 (Steele, Lea and Flood 2014), in wrapping int64 arithmetic.
"""

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def mixed(keys):
    """Return int64 `keys`, a tensor, with all bits mixed: neighbours become independent."""
    keys = keys + _GOLDEN
    keys = (keys ^ (keys >> 30 & (1 << 34) - 1)) * _FIRST
    keys = (keys ^ (keys >> 27 & (1 << 37) - 1)) * _SECOND
    return keys ^ (keys >> 31 & (1 << 33) - 1)


def uniform(keys):
    """Return one float64 in [0, 1) for each of the mixed `keys`."""
    return (keys >> 11 & (1 << 53) - 1).double() * 2.0**-53


def spread(keys, count: int):
    """Return `count` mixed keys for each of `keys` (n,), shape (n, count)."""
    return mixed(keys[:, None] + keys.new_ones(count).cumsum(0))
