"""ODP topics: read a dump, drop what is not wanted, truncate, sample in balance.

Reads a real ODP dump (structure.rdf.u8, plain or gzip), a list of paths (one a line), or a table
(TSV with a header and a ``path`` column), each streamed: memory does not grow with the file.

    paths = read_topic_paths("data/odp/topics.tsv")
    topics = sample_topics(paths, n_topics=60, seed=42)

Paper: Section 3.2.1, Appendix D.1, Table 7.
"""

from __future__ import annotations

import gzip
import html
import io
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from speed_utils.records import Topic, record_id

# Not English, or not for general use; the paper does not say, E5 and the ODP's own users drop both.
DROPPED_CATEGORIES = ("Adult", "World")
DEPTH_MAX = 4  # deeper paths lose their middle (Appendix D.1)
RESERVOIR_PER_CELL = 5000  # paths kept per (category, depth) while streaming: bounds memory


class TopicError(ValueError):
    """A topic file cannot be read or holds no topics."""


def read_topic_paths(
    source: Path | str, *, drop: Collection[str] = DROPPED_CATEGORIES
) -> Iterator[str]:
    """Stream the category paths of a dump, without the leading ``Top/``.

    Args:
        source: .rdf.u8, .txt or .tsv file, plain or .gz.
        drop: top categories to leave out.

    Raises:
        TopicError: no such file, not gzip or not UTF-8 text, or a table without a path column.
    """
    source = Path(source)
    if not source.is_file():
        raise TopicError(f"no topic file {source}; the bundled one is data/odp/topics.tsv")
    n_found = 0
    try:
        with _open_text(source) as lines:
            for path in _paths_of(lines, source):
                path = path.strip().strip("/")
                path = path.removeprefix("Top/")
                if path in ("", "Top") or path.split("/", 1)[0] in drop:
                    continue
                n_found += 1
                yield path
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise TopicError(f"{source} is damaged after {n_found} topics: {error}") from None
    if n_found == 0:
        raise TopicError(f"{source} holds no topics; expected ODP paths such as Arts/Movies")


@dataclass(frozen=True)
class Catalogue:
    """What a stream of paths holds: how many, by depth, its widest, its deepest, a few examples."""

    n_paths: int
    n_by_depth: dict[int, int]
    widest: str
    deepest: str
    examples: list[str]


def summarize_paths(paths: Iterable[str], *, n_examples: int = 8) -> Catalogue:
    """Describe a stream of paths in one pass; only the examples are held in memory."""
    rng = random.Random("catalogue")
    n_by_depth: Counter[int] = Counter()
    examples: list[str] = []
    widest = deepest = ""
    for number, path in enumerate(paths):
        depth = path.count("/")
        n_by_depth[depth + 1] += 1
        widest = path if not widest or depth < widest.count("/") else widest
        deepest = path if depth > deepest.count("/") else deepest
        if len(examples) < n_examples:
            examples.append(path)
        elif (place := rng.randrange(number + 1)) < n_examples:
            examples[place] = path
    return Catalogue(n_by_depth.total(), dict(n_by_depth), widest, deepest or widest, examples)


def truncate_path(path: str, depth_max: int = DEPTH_MAX) -> str:
    """Cut a path deeper than ``depth_max`` by dropping its middle.

    The paper's example: Arts/Movies/Titles/3/36_Hours_-_1964/Cast_and_Crew becomes
    Arts/Movies/36_Hours_-_1964/Cast_and_Crew: the first half of the kept parts come from the front,
    the rest from the end.

    Paper: Appendix D.1.
    """
    parts = path.split("/")
    if len(parts) <= depth_max:
        return path
    head = depth_max // 2
    return "/".join(parts[:head] + parts[len(parts) - (depth_max - head) :])


def sample_topics(
    paths: Iterable[str],
    *,
    n_topics: int,
    seed: int,
    depth_max: int | None = DEPTH_MAX,
    only: Collection[str] | None = None,
) -> list[Topic]:
    """Sample topics balanced over top categories, and within each over raw depths.

    Args:
        paths: category paths, as read_topic_paths gives them.
        n_topics: how many; fewer come back when there are not so many distinct ones.
        seed: same seed and paths, same topics.
        depth_max: truncate deeper ones; None keeps whole paths (the ablation of Table 3).
        only: keep just these (truncated) paths, as a recorded teacher needs.

    Returns:
        Topics with distinct truncated paths, in order of path.

    Raises:
        TopicError: nothing left to sample from.
    """
    cells = _reservoirs(paths, seed, depth_max, only)
    if not cells:
        raise TopicError("no topics left to sample from; check the file and the dropped categories")
    rng = random.Random(f"topics|{seed}")
    chosen: dict[str, Topic] = {}
    by_category: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for (category, depth), pool in sorted(cells.items()):
        rng.shuffle(pool)
        by_category[category][depth] = pool
    turn = 0
    while len(chosen) < n_topics and by_category:
        categories = sorted(by_category)
        rng.shuffle(categories)
        for category in categories:
            if len(chosen) >= n_topics:
                break
            depths = sorted(by_category[category])
            depth = depths[turn % len(depths)]
            raw = by_category[category][depth].pop()
            path = truncate_path(raw, depth_max) if depth_max else raw
            if path not in chosen:
                chosen[path] = Topic(
                    id=record_id("topic", path),
                    path=path,
                    raw_path=raw,
                    category=category,
                    depth=raw.count("/") + 1,
                )
            if not by_category[category][depth]:
                del by_category[category][depth]
            if not by_category[category]:
                del by_category[category]
        turn += 1
    return sorted(chosen.values(), key=lambda topic: topic.path)


_RDF_TOPIC = re.compile(r'<Topic\s+r:id="([^"]*)"')


def _open_text(source: Path) -> io.TextIOBase:
    if source.suffix == ".gz":
        return gzip.open(source, "rt", encoding="utf8")
    return source.open(encoding="utf8")


def _paths_of(lines: Iterable[str], source: Path) -> Iterator[str]:
    name = source.name.removesuffix(".gz")
    if ".rdf" in name:
        for line in lines:
            for match in _RDF_TOPIC.finditer(line):
                yield html.unescape(match.group(1))
        return
    if name.endswith(".tsv"):
        lines = iter(lines)
        header = next(lines, "").rstrip("\n").split("\t")
        if "path" not in header:
            raise TopicError(f"{source}: the first line must name a column 'path', has {header}")
        column = header.index("path")
        for line in lines:
            fields = line.rstrip("\n").split("\t")
            if len(fields) > column:
                yield fields[column]
        return
    yield from lines


def _reservoirs(
    paths: Iterable[str], seed: int, depth_max: int | None, only: Collection[str] | None
) -> dict[tuple[str, int], list[str]]:
    rng = random.Random(f"reservoir|{seed}")
    cells: dict[tuple[str, int], list[str]] = defaultdict(list)
    n_seen: dict[tuple[str, int], int] = defaultdict(int)
    for path in paths:
        if only is not None:
            short = truncate_path(path, depth_max) if depth_max else path
            if short not in only:
                continue
        cell = (path.split("/", 1)[0], path.count("/") + 1)
        n_seen[cell] += 1
        if len(cells[cell]) < RESERVOIR_PER_CELL:
            cells[cell].append(path)
        else:
            place = rng.randrange(n_seen[cell])
            if place < RESERVOIR_PER_CELL:
                cells[cell][place] = path
    return {cell: sorted(pool) for cell, pool in cells.items()}
