"""From signed blocks to what is kept: candidate pairs on disk, verified pairs to decisions.

Examples are named by their rank: the place of their id among all ids, so that a smaller rank is an
earlier example. A pair is one number, later rank above earlier rank, and sorts by the later one.

    index = read_index(blocks)
    partitions = write_pairs(index, blocks, n_bands, work_dir, n_documents)
    marks = Marks(len(index.order))
    for pairs in read_pairs(partitions, n_pairs):
        marks.add(pairs, similarities, threshold)

Paper: not stated; ours, because a million examples have more pairs than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numba as nb
import numpy as np

from speed_utils.dedup_blocks import bands_path

RANK_BITS = np.uint64(32)
LOW_BITS = np.uint64(0xFFFFFFFF)
PAIRS_AT_ONCE = 2**22  # candidate pairs in memory while they are written


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


def write_pairs(
    index: Index, blocks: Sequence[Path], n_bands: int, work_dir: Path, n_documents: int
) -> list[Path]:
    """Write the candidate pairs of every band, split by the later example.

    Of examples with the same text only the first takes part: what it matches, they match.

    Args:
        index: of all blocks.
        blocks: their files.
        n_bands: bands that each block holds.
        work_dir: receives the files; those of an earlier try are replaced.
        n_documents: later examples in one file.

    Returns:
        The files, in order of the later example.
    """
    n_files = max(1, -(-len(index.order) // n_documents))
    paths = [work_dir / f"pairs-{number:05d}.bin" for number in range(n_files)]
    for path in paths:
        path.write_bytes(b"")
    unique = np.flatnonzero(index.first == np.arange(len(index.first))).astype(np.uint64)
    for band in range(n_bands):
        hashes = _joined(
            [np.load(bands_path(block), mmap_mode="r")[band] for block in blocks],
            np.empty(0, np.uint64),
        )
        for pairs in _bucket_pairs(hashes[index.order][unique], unique):
            numbers = (pairs >> RANK_BITS).astype(np.int64) // n_documents
            for number in np.unique(numbers):
                with paths[number].open("ab") as file:
                    pairs[numbers == number].tofile(file)
    return paths


def read_pairs(paths: Sequence[Path], n_pairs: int) -> Iterator[np.ndarray]:
    """Distinct pairs, ascending over all files, at most ``n_pairs`` at a time."""
    for path in paths:
        pairs = np.unique(np.fromfile(path, np.uint64))
        for start in range(0, len(pairs), n_pairs):
            yield pairs[start : start + n_pairs]


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
        """Decide by pairs that come in ascending order, over all calls.

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
    order = np.lexsort(prints.T)  # stable: equal rows keep their order
    ordered = prints[order]
    starts = np.ones(len(prints), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(prints), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def _bucket_pairs(hashes: np.ndarray, ranks: np.ndarray) -> Iterator[np.ndarray]:
    """All pairs of examples of equal hash; ``ranks`` ascend."""
    n = np.uint64(len(hashes))
    bits = np.uint64(max(1, int(n).bit_length()))
    keys = (hashes >> bits << bits) | np.arange(n, dtype=np.uint64)
    keys.sort()  # by hash, then by rank; much faster than argsort
    places = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    edges = np.flatnonzero(np.diff(keys >> bits)) + 1
    bounds = np.concatenate([[0], edges, [len(keys)]])
    n_later = np.repeat(bounds[1:], np.diff(bounds)) - np.arange(len(keys)) - 1
    members = np.flatnonzero(n_later)  # places in the sorted order that have later ones
    totals = np.cumsum(n_later[members])
    start = 0
    while start < len(members):
        done = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, done + PAIRS_AT_ONCE, "right")))
        chosen = members[start:stop]
        out = np.empty(int(totals[stop - 1] - done), np.uint64)
        _fill_pairs(chosen, n_later[chosen], ranks[places], out)
        yield out
        start = stop


@nb.njit(cache=True, nogil=True)
def _fill_pairs(members, n_later, ranks, out):
    place = 0
    for k in range(len(members)):
        member = members[k]
        for other in range(member + 1, member + 1 + n_later[k]):
            out[place] = (ranks[other] << RANK_BITS) | ranks[member]
            place += 1


@nb.njit(cache=True, nogil=True)
def _decide(earlier, later, similarity, threshold, duplicate_of, best):
    for pair in range(len(earlier)):
        one, two = earlier[pair], later[pair]
        if duplicate_of[one] >= 0 or similarity[pair] < threshold:
            continue
        if duplicate_of[two] < 0 or similarity[pair] > best[two]:
            duplicate_of[two], best[two] = one, similarity[pair]
