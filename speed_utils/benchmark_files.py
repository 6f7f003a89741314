"""The files of the bundled benchmark as the data sets that mteb's task classes read.

Reads JSON Lines files of data/benchmark; every line is checked.

    read_sts(Path("data/benchmark/sts.jsonl"))["test"][0]
    # {"sentence1": ..., "sentence2": ..., "score": 3.5}

Paper: Section 4.2 evaluates on MTEB; the texts here are the study's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from speed_utils.records import record_id

if TYPE_CHECKING:
    from datasets import DatasetDict


class BenchmarkError(ValueError):
    """A file of the benchmark is missing or not what its task needs."""


def read_rows(path: Path, **fields: type | tuple[type, ...]) -> list[dict]:
    """Read the named fields of every line of a JSON Lines file.

    Args:
        path: the file.
        fields: name and type of each field to keep.

    Raises:
        BenchmarkError: no such file, an empty one, or a line without such a field; names the line.
    """
    if not path.is_file():
        raise BenchmarkError(f"{path} is missing; it is part of the repository, restore it")
    rows = []
    with path.open(encoding="utf8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append({name: row[name] for name in fields})
            except (ValueError, TypeError, KeyError) as error:
                raise BenchmarkError(f"{path}, line {number}: {error!r}") from None
            for name, kind in fields.items():
                if not isinstance(row[name], kind) or row[name] in ("", []):
                    raise BenchmarkError(f"{path}, line {number}: {name} is {row[name]!r}")
    if not rows:
        raise BenchmarkError(f"{path} is empty")
    return rows


def read_classification(train_path: Path, test_path: Path) -> DatasetDict:
    """Splits train and test of text, label."""
    return _splits(
        train=_columns(read_rows(train_path, text=str, label=str)),
        test=_columns(read_rows(test_path, text=str, label=str)),
    )


def read_clustering(path: Path) -> DatasetDict:
    """Split test of sentences, labels."""
    columns = _columns(read_rows(path, text=str, label=str))
    return _splits(test={"sentences": columns["text"], "labels": columns["label"]})


def read_pair_classification(path: Path) -> DatasetDict:
    """Split test of sentence1, sentence2, labels (0 or 1)."""
    columns = _columns(read_rows(path, sentence1=str, sentence2=str, label=int))
    columns["labels"] = columns.pop("label")
    if set(columns["labels"]) != {0, 1}:
        raise BenchmarkError(f"{path}: labels are {set(columns['labels'])}, not 0 and 1")
    return _splits(test=columns)


def read_sts(path: Path) -> DatasetDict:
    """Split test of sentence1, sentence2, score (0 to 5)."""
    columns = _columns(read_rows(path, sentence1=str, sentence2=str, score=(int, float)))
    return _splits(test={**columns, "score": [float(score) for score in columns["score"]]})


def read_summarization(path: Path) -> DatasetDict:
    """Split test of text, human_summaries (the text itself), machine_summaries, relevance.

    mteb compares summaries with those that people wrote; there are none here.
    """
    rows = read_rows(path, text=str, summaries=list)
    return _splits(
        test={
            "text": [row["text"] for row in rows],
            "human_summaries": [[row["text"]] for row in rows],
            "machine_summaries": [[s["summary"] for s in row["summaries"]] for row in rows],
            "relevance": [[float(s["rating"]) for s in row["summaries"]] for row in rows],
        }
    )


def read_retrieval(corpus_path: Path, queries_path: Path) -> dict:
    """Corpus, queries and judgements, in mteb's nesting: subset, split, part.

    Raises:
        BenchmarkError: a query names a passage that is not in the corpus.
    """
    corpus = read_rows(corpus_path, id=str, text=str)
    queries = read_rows(queries_path, id=str, text=str, relevant=list)
    passages = {row["id"]: row["text"] for row in corpus}
    unknown = {id_ for row in queries for id_ in row["relevant"]} - set(passages)
    if unknown:
        raise BenchmarkError(f"{queries_path}: no passage {', '.join(sorted(unknown))}")
    relevant = {row["id"]: dict.fromkeys(row["relevant"], 1) for row in queries}
    return _retrieval(passages, {row["id"]: row["text"] for row in queries}, relevant, None)


def read_reranking(path: Path) -> dict:
    """Corpus, queries, judgements and each query's candidates, in mteb's nesting."""
    passages, queries, relevant, candidates = {}, {}, {}, {}
    for number, row in enumerate(read_rows(path, query=str, positive=list, negative=list)):
        id_ = f"q{number}"
        queries[id_] = row["query"]
        # Ids by content: equal scores are ordered by id, which then favours no candidate.
        texts = {record_id(text): text for text in row["positive"] + row["negative"]}
        passages |= texts
        candidates[id_] = sorted(texts)
        relevant[id_] = {record_id(text): 1 for text in row["positive"]}
    return _retrieval(passages, queries, relevant, candidates)


def _retrieval(
    passages: dict[str, str],
    queries: dict[str, str],
    relevant: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None,
) -> dict:
    parts = {"corpus": passages, "queries": queries}
    texts = _splits(
        **{part: {"id": list(d), "text": list(d.values())} for part, d in parts.items()}
    )
    return {"default": {"test": {**texts, "relevant_docs": relevant, "top_ranked": candidates}}}


def _splits(**columns: dict[str, list]) -> DatasetDict:
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_dict(part) for split, part in columns.items()})


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}
