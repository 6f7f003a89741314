"""From signed blocks to what is kept: candidate pairs in rounds, verified pairs to decisions.

Examples are named by their rank: the place of their id among all ids, so that a smaller rank is an
earlier example. A pair is one number, later rank above earlier rank, and sorts by the later one.

Each round doubles the examples that are decided. What repeats a kept example of an earlier round
is gone before the round's own pairs are made: thousands of near-copies cost no square of pairs.

    index = read_index(blocks)
    bands = write_bands(index, blocks, n_bands, work_dir)
    marks = Marks(len(index.order))
    for candidates in rounds(index, bands, marks):
        for pairs in in_parts(candidates, index, n_bytes):
            marks.add(pairs, similarities, threshold)

Paper: not stated; ours, because a million examples have more pairs than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numba as nb
import numpy as np

from speed_utils.dedup_blocks import bands_path

RANK_BITS = np.uint64(32)
LOW_BITS = np.uint64(0xFFFFFFFF)
FIRST_ROUND = 1024  # examples; a constant, so that the same pairs decide on every machine
BANDS_AT_ONCE = 4  # by threads; each holds 24 bytes an example
PAIRS_AT_ONCE = 2**23  # candidate pairs, from which on repeated ones are thinned out


@dataclass(frozen=True)
class Index:
    """What is known of every example; all arrays but ``order`` and ``first`` in file order.

    Attributes:
        ids: bytes, shape (examples,).
        kinds: index into KINDS.
        starts: byte where each line begins, and the end of the file.
        words: of query, positive and negative, shape (examples, 3).
        order: rank to place in the file.
        first: rank to the smallest rank of the same text and kind.
    """

    ids: np.ndarray
    kinds: np.ndarray
    starts: np.ndarray
    words: np.ndarray
    order: np.ndarray
    first: np.ndarray

    def repeated_id(self) -> str | None:
        """An id that occurs twice, or None."""
        ordered = self.ids[self.order]
        same = np.flatnonzero(ordered[1:] == ordered[:-1])
        return ordered[same[0]].decode() if len(same) else None


def read_index(blocks: Sequence[Path]) -> Index:
    """Join the blocks' notes, in file order."""
    parts = [dict(np.load(block)) for block in blocks]
    ids = _joined([part["ids"] for part in parts], np.empty(0, "S1"))
    prints = _joined([part["prints"] for part in parts], np.empty((0, 2), np.uint64))
    starts = _joined([part["starts"][:-1] for part in parts], np.empty(0, np.int64))
    end = parts[-1]["starts"][-1:] if parts else np.zeros(1, np.int64)
    order = _order(ids)
    return Index(
        ids,
        _joined([part["kinds"] for part in parts], np.empty(0, np.uint8)),
        np.concatenate([starts, end]),
        _joined([part["words"] for part in parts], np.empty((0, 3), np.int32)),
        order,
        _first_of_same(prints[order]),
    )


def write_bands(
    index: Index, blocks: Sequence[Path], n_bands: int, work_dir: Path, mapper: Callable = map
) -> list[Path]:
    """Write the hashes of each band in order of rank, a file a band. Shape (examples,), uint64.

    ``mapper`` is ``map``, or that of a pool of threads.
    """

    def write_band(band: int) -> Path:
        parts = [np.load(bands_path(block), mmap_mode="r")[band] for block in blocks]
        path = work_dir / f"band-{band:03d}.npy"
        np.save(path, _joined(parts, np.empty(0, np.uint64)).take(index.order))
        return path

    return [path for few in _few(range(n_bands)) for path in mapper(write_band, few)]


def rounds(
    index: Index, bands: Sequence[Path], marks: Marks, mapper: Callable = map
) -> Iterator[np.ndarray]:
    """Candidate pairs, ascending and distinct, round by round; mark them before the next.

    Of examples with the same text only the first takes part: what it matches, they match.
    ``mapper`` is ``map``, or that of a pool of threads.
    """
    n_examples = len(index.order)
    takes_part = index.first == np.arange(n_examples)
    start, stop = 0, min(FIRST_ROUND, n_examples)
    while start < n_examples:
        for is_across in (True, False) if start else (False,):
            lowest = 0 if is_across else start
            chosen = takes_part[lowest:stop] & (marks.duplicate_of[lowest:stop] < 0)
            ranks = lowest + np.flatnonzero(chosen)
            yield _candidates(bands, ranks, start if is_across else None, mapper)
        start, stop = stop, min(2 * stop, n_examples)


def in_parts(pairs: np.ndarray, index: Index, n_bytes: int) -> Iterator[np.ndarray]:
    """Cut pairs so that the lines of a part have about ``n_bytes`` at most (or it is one pair)."""
    places = [index.order[ranks] for ranks in split_pairs(pairs)]
    ends = np.cumsum(sum(index.starts[place + 1] - index.starts[place] for place in places))
    start = 0
    while start < len(pairs):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + n_bytes, "right")))
        yield pairs[start:stop]
        start = stop


def split_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(earlier ranks, later ranks) of pairs."""
    return (pairs & LOW_BITS).astype(np.int64), (pairs >> RANK_BITS).astype(np.int64)


class Marks:
    """For each rank the kept rank that it repeats, and their similarity.

    Attributes:
        duplicate_of: -1 where the example is kept.
        similarity: NaN where it was not computed.
    """

    def __init__(self, n_examples: int):
        self.duplicate_of = np.full(n_examples, -1, np.int64)
        self.similarity = np.full(n_examples, np.nan)

    def add(self, pairs: np.ndarray, similarity: np.ndarray | None, threshold: float) -> None:
        """Decide by the pairs of a round, which come in ascending order over its calls.

        When the later example of a pair comes up, all pairs of the earlier one have been seen: it
        is known whether that one is kept, and only a kept one removes others.
        """
        earlier, later = split_pairs(pairs)
        if similarity is None:
            similarity = np.full(len(pairs), np.nan)
        _decide(earlier, later, similarity, threshold, self.duplicate_of, self.similarity)

    def add_copies(self, first: np.ndarray) -> None:
        """Remove what has the same text as an earlier example: it repeats what that one repeats."""
        copies = np.flatnonzero(first != np.arange(len(first)))
        originals = first[copies]
        is_removed = self.duplicate_of[originals] >= 0
        self.duplicate_of[copies] = np.where(is_removed, self.duplicate_of[originals], originals)
        self.similarity[copies] = np.where(is_removed, self.similarity[originals], 1.0)

    def is_kept(self, order: np.ndarray) -> np.ndarray:
        """Whether each example is kept, in file order."""
        kept = np.empty(len(order), bool)
        kept[order] = self.duplicate_of < 0
        return kept


def _joined(parts: list[np.ndarray], nothing: np.ndarray) -> np.ndarray:
    return np.concatenate(parts) if parts else nothing


def _order(ids: np.ndarray) -> np.ndarray:
    """Places of the ids in ascending order of their bytes."""
    width = -(-ids.dtype.itemsize // 8) * 8
    numbers = ids.astype(f"S{width}").view(">u8").reshape(len(ids), width // 8).astype(np.uint64)
    return np.lexsort(numbers.T[::-1])


def _first_of_same(prints: np.ndarray) -> np.ndarray:
    """For each row the smallest index of an equal row."""
    first = np.arange(len(prints))
    maybe = _not_alone(np.ascontiguousarray(prints[:, 0]))
    order = maybe[np.lexsort(prints[maybe].T)]  # stable: equal rows keep their order
    ordered = prints[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def _not_alone(hashes: np.ndarray) -> np.ndarray:
    """Indices, ascending, of all hashes that are there twice, and of a few that are not.

    Most hashes are there once, and need not be sorted.
    """
    n_bits = max(6, len(hashes).bit_length() + 3)
    out = np.empty(len(hashes), np.int64)
    return out[: _fill_not_alone(hashes, np.uint64(64 - n_bits), out)]


def _candidates(
    bands: Sequence[Path], ranks: np.ndarray, start: int | None, mapper: Callable
) -> np.ndarray:
    """Pairs that share a band's hash, distinct and ascending.

    Args:
        bands: as write_bands gives them.
        ranks: of the examples that take part, ascending.
        start: only pairs of a rank below it and one from it on; None for all pairs.
        mapper: ``map``, or that of a pool of threads.
    """

    def pairs_of(path: Path) -> np.ndarray:
        return _bucket_pairs(np.load(path, mmap_mode="r").take(ranks), ranks, start)

    found = [np.empty(0, np.uint64)]
    for few in _few(bands):
        found += mapper(pairs_of, few)
        if sum(map(len, found)) > PAIRS_AT_ONCE:
            found = [np.unique(np.concatenate(found))]
    return np.unique(np.concatenate(found))


def _few(bands: Sequence) -> list[Sequence]:
    """Bands in slices, for threads."""
    return [bands[k : k + BANDS_AT_ONCE] for k in range(0, len(bands), BANDS_AT_ONCE)]


def _bucket_pairs(hashes: np.ndarray, ranks: np.ndarray, start: int | None) -> np.ndarray:
    """Pairs of examples of equal hash; ``ranks`` ascend."""
    maybe = _not_alone(hashes)
    hashes, ranks = hashes[maybe], ranks[maybe]
    bits = np.uint64(len(hashes).bit_length())
    keys = (hashes >> bits << bits) | np.arange(len(hashes), dtype=np.uint64)
    keys.sort()  # by hash, then by rank; much faster than argsort
    n_pairs = _fill_pairs(keys, bits, hashes, ranks, start, np.empty(0, np.uint64))
    out = np.empty(n_pairs, np.uint64)
    _fill_pairs(keys, bits, hashes, ranks, start, out)
    return out


@nb.njit(cache=True, nogil=True)
def _fill_not_alone(hashes, shift, out):
    """Write the indices of hashes whose upper bits another one shares; return how many."""
    n_words = 1 << (58 - np.int64(shift))
    once, twice = np.zeros(n_words, np.uint64), np.zeros(n_words, np.uint64)
    for k in range(len(hashes)):
        slot = hashes[k] >> shift
        bit = np.uint64(1) << (slot & np.uint64(63))
        twice[slot >> np.uint64(6)] |= once[slot >> np.uint64(6)] & bit
        once[slot >> np.uint64(6)] |= bit
    n_found = 0
    for k in range(len(hashes)):
        slot = hashes[k] >> shift
        if twice[slot >> np.uint64(6)] >> (slot & np.uint64(63)) & np.uint64(1):
            out[n_found] = k
            n_found += 1
    return n_found


@nb.njit(cache=True, nogil=True)
def _fill_pairs(keys, bits, hashes, ranks, start, out):
    """Write the pairs to ``out``, or count them where it is too short for all; return how many.

    A bucket is a run of keys of equal upper bits; the sort saw only those bits of a hash, so that
    whole hashes are compared. From ``start`` on ranks are new; None pairs all.
    """
    index_bits = (np.uint64(1) << bits) - np.uint64(1)
    n_pairs, first = 0, 0
    for last in range(1, len(keys) + 1):
        if last < len(keys) and keys[last] >> bits == keys[first] >> bits:
            continue
        n_old = last - first
        if start is not None and n_old > 1:
            n_old = 0
            while first + n_old < last and ranks[keys[first + n_old] & index_bits] < start:
                n_old += 1
        for one in range(first, first + n_old):
            earlier = keys[one] & index_bits
            for two in range(one + 1 if start is None else first + n_old, last):
                later = keys[two] & index_bits
                if hashes[earlier] == hashes[later]:
                    if n_pairs < len(out):
                        out[n_pairs] = (np.uint64(ranks[later]) << RANK_BITS) | np.uint64(
                            ranks[earlier]
                        )
                    n_pairs += 1
        first = last
    return n_pairs


@nb.njit(cache=True, nogil=True)
def _decide(earlier, later, similarity, threshold, duplicate_of, best):
    for pair in range(len(earlier)):
        one, two = earlier[pair], later[pair]
        if duplicate_of[one] >= 0 or similarity[pair] < threshold:
            continue
        if duplicate_of[two] < 0 or similarity[pair] > best[two]:
            duplicate_of[two], best[two] = one, similarity[pair]
