"""Functions that are nearly the same: MinHash, locality-sensitive hashing, union-find.

Signatures are cut into 16 bands of 4. Two functions that share a band are compared in full, and those
of which at least 85 % of the 64 values agree, an estimate of their shingles' Jaccard similarity, are of
one cluster. At that threshold a pair shares no band in 1 of 130,000 cases.

In a bucket each function is compared with the first and with its next neighbours, not with all: buckets
of thousands of look-alikes would take quadratic time, and they hang together by their neighbours.

Source: https://en.wikipedia.org/wiki/Locality-sensitive_hashing
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BANDS", "THRESHOLD", "cluster_signatures"]

BANDS = 16
THRESHOLD = 0.85
_NEIGHBOURS = 8
_CHUNK = 1 << 18


def cluster_signatures(signatures: np.ndarray, *, threshold: float = THRESHOLD) -> np.ndarray:
    """The cluster of each signature, named by the position of its first member.

    Args:
        signatures: uint16 [functions, 64].
        threshold: the share of values that agree, above which two are of one cluster.

    Returns:
        int64 [functions]; a function that is like no other is a cluster of its own.
    """
    import numpy as np

    count = len(signatures)
    if count == 0:
        return np.zeros(0, np.int64)
    rows = np.ascontiguousarray(signatures, "<u2")
    whole = rows.view([("", f"V{rows.shape[1] * 2}")]).ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # unique rows by their first appearance
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    unique = rows[first[order]]
    labels = np.arange(len(unique))
    bands = unique.view("<u8").reshape(len(unique), BANDS)
    needed = int(np.ceil(threshold * rows.shape[1]))
    for band in range(BANDS):
        left, right = _candidates(bands[:, band])
        left, right = _similar(unique, left, right, labels, needed)
        labels = _join(labels, left, right)
    return first[order][labels[rank[inverse.ravel()]]].astype(np.int64)


def _candidates(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of positions with equal keys: with the bucket's first, and with the next neighbours."""
    import numpy as np

    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    begins = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
    sizes = np.diff(np.r_[begins, len(keys)])
    heads = np.repeat(order[begins], sizes)
    left, right = [heads], [order]
    for distance in range(1, min(_NEIGHBOURS + 1, len(keys))):
        same = sorted_keys[distance:] == sorted_keys[:-distance]
        left.append(order[:-distance][same])
        right.append(order[distance:][same])
    return np.concatenate(left), np.concatenate(right)


def _similar(
    rows: np.ndarray, left: np.ndarray, right: np.ndarray, labels: np.ndarray, needed: int
) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    apart = labels[left] != labels[right]
    left, right = left[apart], right[apart]
    kept = [
        (rows[left[at : at + _CHUNK]] == rows[right[at : at + _CHUNK]]).sum(axis=1) >= needed
        for at in range(0, len(left), _CHUNK)
    ]
    mask = np.concatenate(kept) if kept else np.zeros(0, bool)
    return left[mask], right[mask]


def _join(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Connected components, each labelled by its least member."""
    import numpy as np

    labels = labels.copy()
    while True:
        one, two = labels[left], labels[right]
        apart = one != two
        if not apart.any():
            return labels
        left, right = left[apart], right[apart]
        low = np.minimum(one, two)[apart]
        high = np.maximum(one, two)[apart]
        np.minimum.at(labels, high, low)
        while True:  # until each label is a root
            shorter = labels[labels]
            if np.array_equal(shorter, labels):
                break
            labels = shorter
