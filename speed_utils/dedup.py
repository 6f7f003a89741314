"""Near-duplicate removal with datasketch MinHash LSH, and the statistics of Table 6.

Reads examples, returns the kept ones and, for every removed one, which example it repeats.

    result = deduplicate(examples, threshold=0.7)
    result.kept, result.removed

Paper: Section 4.1, Appendix A, Table 6. MinHash parameters are not published; ours: 5-word
shingles, 128 permutations, threshold 0.7, every candidate pair verified by exact Jaccard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from speed_utils.records import KINDS, Example

SHINGLE_WORDS = 5
N_PERMUTATIONS = 128
MINHASH_SEED = 1


@dataclass(frozen=True)
class Removal:
    """Why an example was removed: the kept one that it repeats, and their exact Jaccard."""

    id: str
    duplicate_of: str
    jaccard: float


@dataclass(frozen=True)
class Deduplication:
    """Kept examples in their order, and a Removal for each of the others."""

    kept: list[Example]
    removed: list[Removal]


def duplicate_text(example: Example) -> str:
    """The text that decides duplication: query, positive and negative, one after another.

    The task and its instruction are left out: they repeat by design.
    """
    return " ".join(text for text in (example.query, example.positive, example.negative) if text)


def shingles(text: str, n_words: int = SHINGLE_WORDS) -> set[str]:
    """The set of overlapping word n-grams, lower case; a shorter text is one shingle."""
    words = text.lower().split()
    if len(words) <= n_words:
        return {" ".join(words)}
    return {" ".join(words[i : i + n_words]) for i in range(len(words) - n_words + 1)}


def jaccard(left: set[str], right: set[str]) -> float:
    """Intersection over union of two sets, 0 to 1; two empty sets are equal."""
    union = len(left | right)
    return len(left & right) / union if union else 1.0


def closest_pair(examples: Sequence[Example]) -> tuple[str, str, float]:
    """Ids and Jaccard of the two most similar examples of one kind; every pair is compared.

    Raises:
        ValueError: no two examples of one kind.
    """
    sets = [(example.kind, example.id, shingles(duplicate_text(example))) for example in examples]
    pairs = [
        (left_id, right_id, jaccard(left, right))
        for (kind, left_id, left), (other, right_id, right) in combinations(sets, 2)
        if kind == other
    ]
    if not pairs:
        raise ValueError("no two examples of one kind to compare")
    return max(pairs, key=lambda pair: pair[2])


def deduplicate(
    examples: Sequence[Example], *, threshold: float = 0.7, n_permutations: int = N_PERMUTATIONS
) -> Deduplication:
    """Remove every example that nearly repeats an earlier kept one.

    Examples are taken in order of their id, so that the result does not depend on the order of the
    input; the smallest id of near-duplicates is kept. Kinds never match each other.

    Args:
        examples: any kinds, ids distinct.
        threshold: Jaccard similarity of word 5-grams from which on two are duplicates, (0, 1].
        n_permutations: of the MinHash.

    Raises:
        ValueError: threshold out of range, or an id that occurs twice.
    """
    from datasketch import MinHash, MinHashLSH

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} must be above 0 and at most 1")
    by_id = {example.id: example for example in examples}
    if len(by_id) < len(examples):
        raise ValueError("example ids must be distinct")
    # LSH only proposes pairs; a lower threshold for it loses fewer, exact Jaccard decides.
    proposing = max(0.1, threshold - 0.15)
    indexes = {kind: MinHashLSH(threshold=proposing, num_perm=n_permutations) for kind in KINDS}
    sets: dict[str, set[str]] = {}
    removals: dict[str, Removal] = {}
    for identifier in sorted(by_id):
        example = by_id[identifier]
        own = shingles(duplicate_text(example))
        signature = MinHash(num_perm=n_permutations, seed=MINHASH_SEED)
        signature.update_batch([shingle.encode() for shingle in own])
        index = indexes[example.kind]
        scored = [(jaccard(own, sets[other]), other) for other in index.query(signature)]
        similarity, original = max(scored, key=lambda pair: (pair[0], pair[1]), default=(0.0, ""))
        if similarity >= threshold:
            removals[identifier] = Removal(identifier, original, round(similarity, 4))
            continue
        sets[identifier] = own
        index.insert(identifier, signature)
    kept = [example for example in examples if example.id not in removals]
    return Deduplication(kept, [removals[e.id] for e in examples if e.id in removals])


def dataset_statistics(raw: Sequence[Example], kept: Sequence[Example]) -> list[dict]:
    """Table 6: per kind, examples before and after, share removed, mean lengths in words."""
    rows = []
    for kind in [*KINDS, "all"]:
        before = [e for e in raw if kind in ("all", e.kind)]
        after = [e for e in kept if kind in ("all", e.kind)]
        rows.append(
            {
                "kind": kind,
                "raw": len(before),
                "kept": len(after),
                "removed_share": 1 - len(after) / len(before) if before else None,
                "query_words": _mean_words([e.query for e in after]),
                "positive_words": _mean_words([e.positive for e in after]),
                "negative_words": _mean_words([e.negative for e in after if e.negative]),
            }
        )
    return rows


def _mean_words(texts: list[str]) -> float | None:
    return round(sum(len(text.split()) for text in texts) / len(texts), 1) if texts else None
