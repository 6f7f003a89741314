"""The bundled benchmark: one small mteb task of each of the seven MTEB types, offline.

Reads data/benchmark/*.jsonl, texts of our own on subjects that the training data avoids. Importing
this module imports mteb (some seconds): classes of mteb tasks cannot be made without it.

    tasks = bundled_tasks()
    results = mteb.evaluate(model, tasks)
    [task.metadata.prompt for task in tasks]

Paper: Section 4.2 evaluates on MTEB's 56 English tasks; these seven stand in where there is no hub.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.text.summarization import AbsTaskSummarization

from speed_utils import benchmark_files
from speed_utils.benchmark_files import BenchmarkError

BENCHMARK_DIR = Path(__file__).parent.parent / "data" / "benchmark"


def bundled_tasks(types: Sequence[str] = (), data_dir: Path | str = BENCHMARK_DIR) -> list[AbsTask]:
    """One task of each MTEB type, in alphabetical order.

    Args:
        types: MTEB types ("STS", "Retrieval", ...) to take; empty for all seven.
        data_dir: folder with the benchmark's JSON Lines files.

    Raises:
        BenchmarkError: an unknown type; names the seven.
    """
    known = {task_class.metadata.type: task_class for task_class in TASK_CLASSES}
    unknown = sorted(set(types) - set(known))
    if unknown:
        raise BenchmarkError(f"no bundled task of type {unknown[0]!r}; choose of {list(known)}")
    return [known[type](data_dir) for type in known if not types or type in types]


def _metadata(
    name: str, type: str, main_score: str, *, description: str, prompt: str
) -> TaskMetadata:
    """Metadata as complete as mteb's own tasks must have it."""
    return TaskMetadata(
        name=name,
        description=description,
        prompt=prompt,
        type=type,
        category="t2c" if type in ("Classification", "Clustering") else "t2t",
        main_score=main_score,
        dataset={"path": "data/benchmark", "revision": "set by BundledTask"},
        reference="https://arxiv.org/abs/2410.18634",  # the paper that this study reproduces
        eval_langs=["eng-Latn"],
        date=("2026-01-01", "2026-12-31"),
        domains=["Written", "Constructed"],
        task_subtypes=[],
        license="cc0-1.0",
        annotations_creators="LM-generated",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
    )


class BundledTask:
    """Loads a task from local files; mixed into one of mteb's task classes.

    The revision is a hash of the files and the prompt, so that mteb never takes a stored score for
    that of a changed task.

    Attributes:
        files: names of the task's files.
        read: their paths to the data set, in mteb's form.
    """

    files: ClassVar[tuple[str, ...]]
    read: ClassVar[Callable]

    def __init__(self, data_dir: Path | str = BENCHMARK_DIR, **kwargs: object) -> None:
        self._paths = [Path(data_dir) / name for name in self.files]
        dataset = {**self.metadata.dataset, "revision": self._revision()}
        self.metadata = self.metadata.model_copy(update={"dataset": dataset})
        super().__init__(**kwargs)

    def load_data(self, num_proc: int | None = None, **kwargs: object) -> None:
        """Read the files; mteb calls this.

        Raises:
            BenchmarkError: a file is missing or not what the task needs.
        """
        if not self.data_loaded:
            self.dataset = type(self).read(*self._paths)
            self.data_loaded = True

    def unload_data(self) -> None:
        """Free the texts; mteb would go back to the metadata of the class, without our revision."""
        metadata = self.metadata
        super().unload_data()
        self.metadata = metadata

    def _revision(self) -> str:
        texts = [
            path.read_text(encoding="utf8") if path.is_file() else None for path in self._paths
        ]
        return hashlib.sha256(json.dumps([self.metadata.prompt, texts]).encode()).hexdigest()[:16]


class SpeedBenchClassification(BundledTask, AbsTaskClassification):
    """What a library user wants: logistic regression on ten examples of each of ten labels."""

    files = ("classification_train.jsonl", "classification_test.jsonl")
    read = benchmark_files.read_classification
    samples_per_label = 10  # all of the training part,
    n_experiments = 1  # so that a second experiment would be the first
    metadata = _metadata(
        "SpeedBenchClassification",
        "Classification",
        "accuracy",
        description="Intents of messages to a public library.",
        prompt="Given a message to a public library, find the corresponding intent",
    )


class SpeedBenchClustering(BundledTask, AbsTaskClustering):
    """Which of twelve subjects a text is about; mean V-measure over samples of the texts."""

    files = ("clustering.jsonl",)
    read = benchmark_files.read_clustering
    max_fraction_of_documents_to_embed = None  # all of them
    max_documents_per_cluster = 300  # texts in a sample, drawn with replacement
    n_clusters = 50  # samples; mteb's ten leave a standard deviation of 1.4 points, these 0.6
    metadata = _metadata(
        "SpeedBenchClustering",
        "Clustering",
        "v_measure",
        description="Short texts on twelve subjects of everyday life and science.",
        prompt="Identify the subject of the given text",
    )

    def evaluate(self, *args: object, **kwargs: object) -> object:
        """As mteb, but with the same samples for every model that this object evaluates."""
        self.rng_state = random.Random(self.seed)
        return super().evaluate(*args, **kwargs)


class SpeedBenchPairClassification(BundledTask, AbsTaskPairClassification):
    """Whether two sentences say the same; average precision over all thresholds."""

    files = ("pair_classification.jsonl",)
    read = benchmark_files.read_pair_classification
    metadata = _metadata(
        "SpeedBenchPairClassification",
        "PairClassification",
        "max_ap",
        description="Pairs of sentences that do or do not mean the same.",
        prompt="Retrieve sentences that have the same meaning as the given sentence",
    )


class SpeedBenchReranking(BundledTask, AbsTaskRetrieval):
    """The better of a few candidate passages first; mean average precision."""

    files = ("reranking.jsonl",)
    read = benchmark_files.read_reranking
    metadata = _metadata(
        "SpeedBenchReranking",
        "Reranking",
        "map_at_1000",
        description="Questions, each with some passages that answer it and some that do not.",
        prompt="Given a question, retrieve passages that answer it",
    )


class SpeedBenchRetrieval(BundledTask, AbsTaskRetrieval):
    """The passages that answer a query, out of all; nDCG of the first ten."""

    files = ("retrieval_corpus.jsonl", "retrieval_queries.jsonl")
    read = benchmark_files.read_retrieval
    metadata = _metadata(
        "SpeedBenchRetrieval",
        "Retrieval",
        "ndcg_at_10",
        description="Search queries and passages, several of them close to each other in subject.",
        prompt="Given a search query, retrieve passages that answer it",
    )


class SpeedBenchSTS(BundledTask, AbsTaskSTS):
    """How similar two sentences are, 0 to 5; Spearman correlation with the cosine."""

    files = ("sts.jsonl",)
    read = benchmark_files.read_sts
    min_score, max_score = 0, 5
    metadata = _metadata(
        "SpeedBenchSTS",
        "STS",
        "cosine_spearman",
        description="Pairs of sentences with a similarity from 0 to 5, as in STSBenchmark.",
        prompt="Retrieve semantically similar text.",
    )


class SpeedBenchSummarization(BundledTask, AbsTaskSummarization):
    """How good a summary is, by its similarity to the text; mean Spearman correlation."""

    files = ("summarization.jsonl",)
    read = benchmark_files.read_summarization
    min_score, max_score = 1, 5
    metadata = _metadata(
        "SpeedBenchSummarization",
        "Summarization",
        "cosine_spearman",
        description="Texts with four summaries each, rated from 1 to 5.",
        prompt="Given a text, retrieve semantically similar summaries",
    )


TASK_CLASSES = (
    SpeedBenchClassification,
    SpeedBenchClustering,
    SpeedBenchPairClassification,
    SpeedBenchReranking,
    SpeedBenchRetrieval,
    SpeedBenchSTS,
    SpeedBenchSummarization,
)
