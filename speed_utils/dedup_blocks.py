"""Examples in blocks: read, signed and noted on disk, a block a thread, by whom it may be.

    spans = list(block_spans(path, block_bytes))
    notes_path = sign_block(path, n_permutations, bands, work_dir, (0, spans[0]))

Paper: not stated; ours, because a million examples are more than memory should hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as arrow_json

from speed_utils import minhash
from speed_utils.records import KINDS, RecordError, replace_file

TEXT_FIELDS = ("query", "positive", "negative")
BLOCK_BYTES_MAX = 16 * 2**20  # of the input, read at once by one thread
BLOCK_MEMORY = 12  # bytes that a thread takes for each byte of its block, at most
PARSE_BYTES = 2**22  # of JSON for one thread at a time
COPY_BYTES = 2**24


def threads_and_block_bytes(memory_gib: float) -> tuple[int, int]:
    """How many threads have room in the memory, and how much of a file each reads at once."""
    n_bytes = int(memory_gib * 2**30) // BLOCK_MEMORY
    n_threads = min(os.cpu_count() or 1, n_bytes // BLOCK_BYTES_MAX)
    return max(1, n_threads), max(1, min(BLOCK_BYTES_MAX, n_bytes))


@contextmanager
def worker_threads(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that drops what it has not begun when an error or Ctrl-C ends its use."""
    threads = ThreadPoolExecutor(n_threads)
    try:
        yield threads
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def block_spans(path: Path, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of whole lines that cover the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 0
        while start < size:
            file.seek(min(start + block_bytes, size) - 1)
            file.readline()
            stop = file.tell()
            yield start, stop
            start = stop


def sign_block(
    path: Path,
    n_permutations: int,
    bands: tuple[int, int],
    work_dir: Path,
    item: tuple[int, tuple[int, int]],
) -> Path:
    """Read and sign one block, if no earlier try did.

    Args:
        path: Example records as JSON Lines.
        n_permutations: of the MinHash.
        bands: number of bands, and signature values in each.
        work_dir: receives the block's files.
        item: the block's number and byte range.

    Returns:
        The file with the block's notes (ids, kinds, starts, words, prints), as numpy writes it;
        the hashes of its bands lie beside it, see bands_path.

    Raises:
        RecordError: a line is not an Example.
    """
    number, span = item
    block = work_dir / f"{number:05d}.npz"
    if block.is_file() and bands_path(block).is_file():
        return block
    table, starts = read_block(path, *span)
    kinds = pc.index_in(table["kind"].combine_chunks(), pa.array(KINDS, pa.string()))
    if kinds.null_count:
        raise RecordError(f"{path}: a record has an unknown kind; one of {', '.join(KINDS)}")
    kinds = kinds.to_numpy().astype(np.uint8)
    hashes, prints = minhash.band_hashes(
        duplicate_texts(table),
        kinds,
        n_permutations=n_permutations,
        n_bands=bands[0],
        n_rows=bands[1],
    )
    words = [minhash.count_words(table[name]) for name in TEXT_FIELDS]
    notes = {
        "ids": np.array(table["id"].cast("binary").to_pylist(), "S"),
        "kinds": kinds,
        "starts": starts,
        "words": np.stack(words, axis=1).astype(np.int32),
        "prints": prints,
    }
    replace_file(bands_path(block), lambda part: np.save(part, hashes))
    replace_file(block, lambda part: np.savez(part, **notes))
    return block


def bands_path(block: Path) -> Path:
    """Where a block keeps the hashes of its bands, shape (bands, examples)."""
    return block.with_name(f"{block.stem}-bands.npy")


def read_block(path: Path, start: int, stop: int) -> tuple[pa.Table, np.ndarray]:
    """The records of a byte range, and where in the file each begins (and the last one ends).

    Raises:
        RecordError: a line is not an Example, or empty.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    table, starts = parse_lines(data, str(path)), line_starts(data)
    if len(starts) - 1 != len(table):
        raise RecordError(
            f"{path}: {len(starts) - 1} lines hold {len(table)} records; remove empty lines"
        )
    return table, start + starts


def parse_lines(data: bytes, where: str) -> pa.Table:
    """Columns id, kind, query, positive, negative of JSON Lines, in their order."""
    schema = pa.schema([(name, pa.string()) for name in ("id", "kind", *TEXT_FIELDS)])
    options = arrow_json.ParseOptions(
        explicit_schema=schema, newlines_in_values=False, unexpected_field_behavior="ignore"
    )
    try:
        table = arrow_json.read_json(
            pa.BufferReader(data),
            read_options=arrow_json.ReadOptions(block_size=PARSE_BYTES),
            parse_options=options,
        )
    except pa.ArrowInvalid as error:
        raise RecordError(f"{where}: {error}; run 09 again, or repair the file") from None
    missing = [name for name in ("id", "kind", "query", "positive") if table[name].null_count]
    if missing:
        raise RecordError(f"{where}: a record has no {missing[0]!r}; run 09 again")
    return table.combine_chunks()


def duplicate_texts(table: pa.Table) -> pa.Array:
    """dedup.duplicate_text of each row."""
    columns = [table[name].combine_chunks() for name in TEXT_FIELDS]
    return pc.binary_join_element_wise(*columns, " ", null_handling="skip")


def line_starts(data: bytes) -> np.ndarray:
    """Where each line begins, and the end of the data. Shape (lines + 1,), int64."""
    starts = [0]
    while (end := data.find(b"\n", starts[-1])) >= 0:  # faster than numpy's comparison
        starts.append(end + 1)
    if starts[-1] < len(data):
        starts.append(len(data))
    return np.array(starts, np.int64)


def read_lines(path: Path, starts: np.ndarray, places: np.ndarray) -> bytes:
    """The lines at ascending places."""
    file = os.open(path, os.O_RDONLY)
    try:
        froms, untils = starts[places].tolist(), starts[places + 1].tolist()
        lines = [
            os.pread(file, until - start, start) for start, until in zip(froms, untils, strict=True)
        ]
    finally:
        os.close(file)
    return b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines)


def copy_lines(
    path: Path, kept_path: Path, starts: np.ndarray, is_kept: np.ndarray, mapper: Callable = map
) -> None:
    """Copy the kept lines, unchanged, in runs of neighbours.

    Args:
        path: a text file.
        kept_path: is replaced, in one step.
        starts: Shape (lines + 1,), byte where each line begins, and the end of the file.
        is_kept: Shape (lines,), bool.
        mapper: ``map``, or that of a pool of threads.
    """
    turns = np.flatnonzero(np.diff(np.concatenate([[False], is_kept, [False]]).astype(np.int8)))
    spans = starts[turns.reshape(-1, 2)]
    lengths = spans[:, 1] - spans[:, 0]
    places = np.cumsum(lengths) - lengths
    parts = np.searchsorted(places, np.arange(0, lengths.sum(), COPY_BYTES))

    def copy(target: BinaryIO) -> None:
        with path.open("rb") as source:

            def copy_part(first: int, last: int) -> None:
                for (start, stop), place in zip(
                    spans[first:last].tolist(), places[first:last].tolist(), strict=True
                ):
                    while start < stop:
                        data = os.pread(source.fileno(), min(COPY_BYTES, stop - start), start)
                        if not data:
                            raise OSError(f"{path} was changed while it was read; run it again")
                        n_bytes = os.pwrite(target.fileno(), data, place)
                        start, place = start + n_bytes, place + n_bytes

            for _ in mapper(copy_part, parts, [*parts[1:], len(spans)]):
                pass

    replace_file(kept_path, copy)
