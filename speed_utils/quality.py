"""Quality measures of synthetic data: validity, diversity, coverage, hardness of the negatives.

    distinct_n(texts, 2)
    pair_similarities(examples, encode)

Paper: not stated; ours, to look into what the paper measures only through MTEB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from speed_utils.generation import fields_at_limit
from speed_utils.parsing import slot_violations
from speed_utils.records import Example, Rejection


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct word n-grams over all word n-grams, 0 to 1; None when there are none."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.lower().split()
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return len(grams) / total if total else None


def topic_coverage(examples: Sequence[Example], topics: Sequence[str]) -> float | None:
    """The share of topics with at least one example; None without topics."""
    return len({e.topic for e in examples} & set(topics)) / len(set(topics)) if topics else None


def cut_share(examples: Sequence[Example]) -> float | None:
    """The share with a field that the generator's length limit cut; None without examples."""
    return sum(bool(fields_at_limit(e)) for e in examples) / len(examples) if examples else None


def rejection_reasons(rejections: Sequence[Rejection]) -> dict[str, int]:
    """How often each reason occurs; the reason is the part before the colon."""
    counts = Counter(rejection.reason.split(":", 1)[0] for rejection in rejections)
    return dict(counts.most_common())


def slot_obedience(examples: Sequence[Example]) -> float | None:
    """The share of examples that break none of the countable rules of their prompt."""
    if not examples:
        return None
    return sum(not slot_violations(example) for example in examples) / len(examples)


def pair_similarities(
    examples: Sequence[Example], encode: Callable[[list[str]], np.ndarray]
) -> list[dict]:
    """Cosine similarity of the query with its positive and with its negative.

    Args:
        examples: any kinds.
        encode: texts to embeddings. Shape (texts, dim), float32, rows L2-normalised.

    Returns:
        One row per example: id, kind, positive, negative (None without one) and
        ``is_suspect``: the negative is nearer to the query than the positive, a suspected false
        negative (or a wrong positive).
    """
    if not examples:
        return []
    texts = [t for e in examples for t in (e.query, e.positive, e.negative) if t is not None]
    vectors = dict(zip(texts, encode(texts), strict=True))
    rows = []
    for example in examples:
        query = vectors[example.query]
        positive = float(query @ vectors[example.positive])
        negative = None
        if example.negative is not None:
            negative = float(query @ vectors[example.negative])
        rows.append(
            {
                "id": example.id,
                "kind": example.kind,
                "positive": positive,
                "negative": negative,
                "is_suspect": negative is not None and negative > positive,
            }
        )
    return rows
