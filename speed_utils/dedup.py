"""Near-duplicate removal: MinHash LSH proposes pairs, exact Jaccard decides, a million at a time.

Reads examples as JSON Lines, writes the kept lines as they were, and why each other one was left
out. Texts are read in blocks; of each example about 200 bytes stay in memory.

    result = deduplicate_file(raw_path, dataset_path, removed_path, DedupPlan(threshold=0.7))
    result.n_kept, result.statistics

Paper: Section 4.1, Appendix A, Table 6. MinHash parameters are not published; ours: 5-word
shingles, 128 permutations, threshold 0.7, every candidate pair verified by exact Jaccard.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import combinations, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from speed_utils.records import KINDS, Example, RecordError, replace_file, write_records

if TYPE_CHECKING:
    import numpy as np

    from speed_utils.dedup_join import Index, Marks

SHINGLE_WORDS = 5
N_PERMUTATIONS = 128
LSH_SLACK = 0.15  # LSH proposes from this much below the threshold: it loses fewer, Jaccard decides

Mapper = Callable[[Callable, Iterable], Iterable]


@dataclass(frozen=True)
class DedupPlan:
    """How duplicates are found.

    Attributes:
        threshold: Jaccard similarity of word 5-grams from which on two are duplicates, (0, 1].
        n_permutations: of the MinHash.
        is_verified: whether exact Jaccard decides each proposed pair; without, LSH decides.
        memory_gib: what blocks, verified pairs and the number of threads are sized for, beside 200
            bytes an example.
    """

    threshold: float = 0.7
    n_permutations: int = N_PERMUTATIONS
    is_verified: bool = True
    memory_gib: float = 2.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} must be above 0 and at most 1")
        if self.memory_gib <= 0:
            raise ValueError(f"memory_gib {self.memory_gib} must be above 0")

    def bands(self) -> tuple[int, int]:
        """(bands, rows) of the LSH, as datasketch chooses them for the threshold it proposes at."""
        from datasketch import MinHashLSH

        slack = LSH_SLACK if self.is_verified else 0.0
        proposing = max(0.1, self.threshold - slack)
        index = MinHashLSH(threshold=proposing, num_perm=self.n_permutations)
        return index.b, index.r


@dataclass(frozen=True)
class Removal:
    """Why an example was removed: the kept one that it repeats, and their exact Jaccard.

    The Jaccard is None where it was not computed (is_verified off).
    """

    id: str
    duplicate_of: str
    jaccard: float | None


@dataclass(frozen=True)
class Deduplication:
    """What a run of deduplicate_file did; ``statistics`` are the rows of Table 6."""

    n_raw: int
    n_kept: int
    n_candidates: int
    statistics: list[dict]


def duplicate_text(example: Example) -> str:
    """The text that decides duplication: query, positive and negative, one after another.

    The task and its instruction are left out: they repeat by design.
    """
    return " ".join(text for text in (example.query, example.positive, example.negative) if text)


def shingles(text: str, n_words: int = SHINGLE_WORDS) -> set[str]:
    """The set of overlapping word n-grams; a shorter text is one shingle.

    Words stand between ASCII white space; ASCII letters are taken in lower case.
    """
    words = [word.decode() for word in text.encode().lower().split()]
    if len(words) <= n_words:
        return {" ".join(words)}
    return {" ".join(words[i : i + n_words]) for i in range(len(words) - n_words + 1)}


def jaccard(left: set[str], right: set[str]) -> float:
    """Intersection over union of two sets, 0 to 1; two empty sets are equal."""
    union = len(left | right)
    return len(left & right) / union if union else 1.0


def closest_pair(examples: Sequence[Example]) -> tuple[str, str, float] | None:
    """Ids and Jaccard of the two most similar examples of one kind; every pair is compared.

    None where no two examples are of one kind.
    """
    sets = [(example.kind, example.id, shingles(duplicate_text(example))) for example in examples]
    pairs = [
        (left_id, right_id, jaccard(left, right))
        for (kind, left_id, left), (other, right_id, right) in combinations(sets, 2)
        if kind == other
    ]
    return max(pairs, key=lambda pair: pair[2], default=None)


def near_duplicates(examples: Sequence[Example], threshold: float) -> list[Removal]:
    """What deduplicate_file would remove from a few examples in memory, in their order."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, removed = folder / "raw.jsonl", folder / "removed.jsonl"
        write_records(raw, examples)
        deduplicate_file(raw, folder / "kept.jsonl", removed, DedupPlan(threshold))
        found = {removal.id: removal for removal in read_removals(removed)}
    return [found[example.id] for example in examples if example.id in found]


def read_removals(path: Path, limit: int | None = None) -> list[Removal]:
    """The (first) removals that deduplicate_file wrote; those of one group stand together."""
    with path.open(encoding="utf8") as lines:
        return [Removal(**json.loads(line)) for line in islice(lines, limit)]


def deduplicate_file(
    path: Path,
    kept_path: Path,
    removed_path: Path,
    plan: DedupPlan = DedupPlan(),
    *,
    mapper: Mapper | None = None,
) -> Deduplication:
    """Remove every example that nearly repeats an earlier kept one.

    Earlier is the smaller id, so that the result depends neither on the order of the input nor on
    who computed which block. Each removed example is a duplicate of the kept one that it names,
    not merely of one that was removed itself. Kinds never match each other.

    Blocks that are done stay beside ``kept_path`` until the end: run again after a crash, it
    goes on.

    Args:
        path: Example records as JSON Lines, ids distinct.
        kept_path: receives the kept lines, unchanged and in their order.
        removed_path: receives a Removal per line, groups together.
        plan: how duplicates are found.
        mapper: applies a function to blocks and yields results in order: ``map``, a process
            pool's ``map``, or one over a cluster that shares the file system. None for threads.

    Raises:
        RecordError: a line is not an Example, or an id occurs twice.

    Paper: Section 4.1; ours is the order of ids and the exact verification.
    """
    from speed_utils import dedup_join as join
    from speed_utils.dedup_blocks import (
        block_spans,
        copy_lines,
        sign_block,
        threads_and_block_bytes,
        worker_threads,
    )

    n_bands, n_rows = plan.bands()
    n_threads, block_bytes = threads_and_block_bytes(plan.memory_gib)
    work_dir = _work_dir(path, kept_path, [*astuple(plan), n_bands, n_rows, block_bytes])
    sign = partial(sign_block, path, plan.n_permutations, (n_bands, n_rows), work_dir)
    with worker_threads(n_threads) as threads:
        spans = block_spans(path, block_bytes)
        blocks = list((mapper or threads.map)(sign, list(enumerate(spans))))
        index = join.read_index(blocks)
        repeated = index.repeated_id()
        if repeated is not None:
            raise RecordError(f"{path}: the id {repeated!r} occurs twice; ids must be distinct")
        bands = join.write_bands(index, blocks, n_bands, work_dir, threads.map)
        marks = join.Marks(len(index.order))
        n_candidates = 0
        for candidates in join.rounds(index, bands, marks, threads.map):
            n_candidates += len(candidates)
            parts = list(join.in_parts(candidates, index, block_bytes))
            similarities = repeat(None)
            if plan.is_verified:
                similarities = threads.map(partial(_similarities, path, index), parts)
            for pairs, similarity in zip(parts, similarities, strict=False):
                marks.add(pairs, similarity, plan.threshold)
        marks.add_copies(index.first)
        is_kept = marks.is_kept(index.order)
        copy_lines(path, kept_path, index.starts, is_kept, threads.map)
    _write_removals(removed_path, index, marks)
    shutil.rmtree(work_dir)
    return Deduplication(
        len(is_kept), int(is_kept.sum()), n_candidates, _statistics(index, is_kept)
    )


def _work_dir(path: Path, kept_path: Path, settings: list) -> Path:
    """The folder of finished blocks, named by all that decides them; those of others go."""
    from speed_utils import dedup_blocks, minhash

    stat = path.stat()
    code = [Path(module.__file__).read_text() for module in (dedup_blocks, minhash)]
    parts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, settings, code]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    folder = kept_path.with_name(f".{kept_path.name}.{key}.blocks")
    for other in kept_path.parent.glob(f".{kept_path.name}.*.blocks"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _similarities(path: Path, index: Index, pairs: np.ndarray) -> np.ndarray:
    """Exact Jaccard of each pair, from the texts, which are read again."""
    import numpy as np

    from speed_utils import minhash
    from speed_utils.dedup_blocks import duplicate_texts, parse_lines, read_lines
    from speed_utils.dedup_join import split_pairs

    left, right = (index.order[ranks] for ranks in split_pairs(pairs))
    places = np.union1d(left, right)
    data = read_lines(path, index.starts, places)
    texts = duplicate_texts(parse_lines(data, str(path)))
    hashes, offsets = minhash.shingle_sets(texts)
    one, two = np.searchsorted(places, left), np.searchsorted(places, right)
    return minhash.jaccards(hashes, offsets, one, two)


def _write_removals(removed_path: Path, index: Index, marks: Marks) -> None:
    """One line for each removed example; those of one original together."""
    import numpy as np

    removed = np.flatnonzero(marks.duplicate_of >= 0)
    removed = removed[np.lexsort([removed, marks.duplicate_of[removed]])]
    ids = index.ids[index.order]
    columns = (
        ids[removed].tolist(),
        ids[marks.duplicate_of[removed]].tolist(),
        marks.similarity[removed].tolist(),
    )

    def write(file: BinaryIO) -> None:
        for own, original, similarity in zip(*columns, strict=True):
            value = None if similarity != similarity else round(similarity, 4)
            row = {"id": own.decode(), "duplicate_of": original.decode(), "jaccard": value}
            file.write(json.dumps(row).encode() + b"\n")

    replace_file(removed_path, write)


def _statistics(index: Index, is_kept: np.ndarray) -> list[dict]:
    """Table 6: per kind, examples before and after, share removed, mean lengths in words."""
    import numpy as np

    from speed_utils.dedup_blocks import TEXT_FIELDS

    rows = []
    for kind in [*KINDS, "all"]:
        own = np.ones(len(is_kept), bool) if kind == "all" else index.kinds == KINDS.index(kind)
        words = index.words[own & is_kept]
        n_raw, n_kept = int(own.sum()), len(words)
        row = {
            "kind": kind,
            "raw": n_raw,
            "kept": n_kept,
            "removed_share": 1 - n_kept / n_raw if n_raw else None,
        }
        for field, counts in zip(TEXT_FIELDS, words.T, strict=True):
            counts = counts[counts > 0]  # matching has no negative
            row[f"{field}_words"] = round(float(counts.mean()), 1) if len(counts) else None
        rows.append(row)
    return rows
