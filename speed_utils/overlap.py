"""Keep evaluation texts out of the training data: examples that share 13 words in a row with one.

    known = known_ngrams({"STSBenchmark": texts})
    result = remove_overlap(dataset_path, clean_path, report_path, known)
    result.n_removed, result.by_source

Words are runs of letters and digits, in lower case; all else is left out, so that a quotation mark
hides nothing. Evaluation texts of fewer than 13 words are not found: too many texts hold them.

Paper: not stated; ours, because a benchmark that leaks is no benchmark. 13 words in a row are the
common test.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from speed_utils.records import replace_file

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

OVERLAP_WORDS = 13
MEMORY_GIB = 2.0  # what blocks and threads are sized for
TEXTS_AT_ONCE = 2**16  # of the evaluation, while they are indexed
FILTER_BITS = 24  # of a hash: a table of 16 MiB tells most strangers at once
_NO_WORD = r"[\W_]+"  # for re, which takes letters and digits of all scripts as words
_NO_WORD_RE2 = r"[^\p{L}\p{N}]+"  # the same for Arrow


@dataclass(frozen=True)
class KnownNgrams:
    """Hashes of all n-grams of the evaluation texts.

    Attributes:
        hashes: ascending, uint64.
        sources: of each hash, index into names.
        names: of the evaluation sets.
    """

    hashes: np.ndarray
    sources: np.ndarray
    names: list[str]


@dataclass(frozen=True)
class Overlap:
    """How many examples shared words with which evaluation set (its name to a count)."""

    n_raw: int
    n_removed: int
    by_source: dict[str, int]


def ngrams(text: str, n_words: int = OVERLAP_WORDS) -> list[str]:
    """The word n-grams of a text, without punctuation; none where it is shorter."""
    words = [word.decode() for word in re.sub(_NO_WORD, " ", text.lower()).encode().split()]
    return [" ".join(words[i : i + n_words]) for i in range(len(words) - n_words + 1)]


def known_ngrams(texts: Mapping[str, Iterable[str]]) -> KnownNgrams:
    """Index evaluation texts by the name of their set; a shared n-gram counts for the first."""
    import numpy as np
    import pyarrow as pa

    hashes, sources = [np.empty(0, np.uint64)], [np.empty(0, np.uint16)]
    for number, own in enumerate(texts.values()):
        waiting = iter(own)
        while part := list(islice(waiting, TEXTS_AT_ONCE)):
            found = np.unique(_hashes(pa.array(part, pa.string()))[0])
            hashes.append(found)
            sources.append(np.full(len(found), number, np.uint16))
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    return KnownNgrams(unique, np.concatenate(sources)[first], list(texts))


def remove_overlap(path: Path, kept_path: Path, report_path: Path, known: KnownNgrams) -> Overlap:
    """Copy the examples that share no n-gram with an evaluation text.

    Args:
        path: Example records as JSON Lines.
        kept_path: receives the others' lines, unchanged and in their order.
        report_path: receives a line for each removed example: id, source, and the words.
        known: of the evaluation texts.

    Raises:
        RecordError: a line is not an Example.
    """
    import numpy as np

    from speed_utils.dedup_blocks import (
        block_spans,
        copy_lines,
        threads_and_block_bytes,
        worker_threads,
    )

    n_threads, block_bytes = threads_and_block_bytes(MEMORY_GIB)
    find = partial(_block_overlap, path, known, _low_bits_of(known))
    rows, kept, starts = [], [np.empty(0, bool)], [np.empty(0, np.int64)]
    with worker_threads(n_threads) as threads:
        for own_starts, is_kept, own_rows in threads.map(find, block_spans(path, block_bytes)):
            kept.append(is_kept)
            starts.append(own_starts[:-1])
            rows += own_rows
        mask = np.concatenate(kept)
        ends = np.append(np.concatenate(starts), path.stat().st_size)
        copy_lines(path, kept_path, ends, mask, threads.map)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    replace_file(report_path, lambda file: file.write(lines.encode()))
    by_source = dict(Counter(row["source"] for row in rows))
    return Overlap(len(mask), len(rows), by_source)


def _block_overlap(
    path: Path, known: KnownNgrams, is_maybe: np.ndarray, span: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """(line starts, whether each is kept, rows of the report) of a byte range."""
    import numpy as np

    from speed_utils.dedup_blocks import duplicate_texts, read_block

    table, starts = read_block(path, *span)
    texts = duplicate_texts(table)
    found, owners = _found(texts, known, is_maybe)
    is_kept = np.ones(len(table), bool)
    is_kept[owners] = False
    rows = [
        {
            "id": table["id"][owner].as_py(),
            "source": known.names[known.sources[found[at]]],
            "words": _words_of(texts[owner].as_py(), known.hashes[found[at]]),
        }
        for owner, at in zip(*np.unique(owners, return_index=True), strict=True)
    ]
    return starts, is_kept, rows


def _hashes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all n-grams, and the index of the text of each."""
    import numpy as np
    import pyarrow.compute as pc

    from speed_utils import minhash

    words = pc.replace_substring_regex(pc.utf8_lower(texts), _NO_WORD_RE2, " ")
    hashes, offsets = minhash.shingle_sets(words, OVERLAP_WORDS)
    owners = np.repeat(np.arange(len(texts)), np.diff(offsets))
    is_long = (minhash.count_words(words) >= OVERLAP_WORDS)[owners]
    return hashes[is_long], owners[is_long]


def _low_bits_of(known: KnownNgrams) -> np.ndarray:
    """Whether any known hash ends in these FILTER_BITS bits. Shape (2**FILTER_BITS,), bool."""
    import numpy as np

    table = np.zeros(2**FILTER_BITS, bool)
    table[known.hashes & np.uint64(2**FILTER_BITS - 1)] = True
    return table


def _found(
    texts: pa.Array, known: KnownNgrams, is_maybe: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(index into known.hashes, index of the text) of every n-gram that is known."""
    import numpy as np

    hashes, owners = _hashes(texts)
    maybe = is_maybe[hashes & np.uint64(2**FILTER_BITS - 1)]
    hashes, owners = hashes[maybe], owners[maybe]
    at = np.minimum(np.searchsorted(known.hashes, hashes), len(known.hashes) - 1)
    is_known = known.hashes[at] == hashes if len(known.hashes) else np.zeros(len(hashes), bool)
    return at[is_known], owners[is_known]


def _words_of(text: str, hashed: int) -> str:
    """The n-gram of a text that has this hash; empty where lower case depends on the language."""
    from speed_utils.minhash import shingle_hash

    return next((gram for gram in ngrams(text) if shingle_hash(gram.encode()) == hashed), "")
