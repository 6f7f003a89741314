"""Evaluate embedding models with mteb: the bundled tasks, and any MTEB task by name.

Writes mteb's own result files, by model and weights; what is there is not computed again.

    model = instructed(SentenceTransformer(str(folder)), "trained", folder_fingerprint(folder))
    table = evaluate(model, bundled_tasks() + find_tasks(["STSBenchmark"]), results_dir)
    scores = compare({"base": base_table, "trained": table})

Paper: Section 4.2, Tables 1 and 8.
"""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from speed_utils.mteb_models import instructed, instruction, plain

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "EvaluationError",
    "compare",
    "evaluate",
    "find_tasks",
    "hub_answers",
    "instructed",
    "instruction",
    "plain",
    "score_metrics",
]

PAPER_BENCHMARK = "MTEB(eng, v1)"  # the 56 English tasks of Section 4.1
HUB_PROBE = "api/datasets/mteb/stsbenchmark-sts"  # small, and needed by this very stage


class EvaluationError(ValueError):
    """A task is not known, or there is nothing to compare."""


class TaskNotLoadedError(RuntimeError):
    """The data of a task cannot be read, most often because no hub answers."""


def find_tasks(names: Sequence[str]) -> list:
    """MTEB tasks by their names or those of benchmarks; each task once.

    A benchmark's tasks are as it defines them. A task is as the paper's benchmark defines it, or
    else its English subsets and its test split (where it has one).

    Raises:
        EvaluationError: no such task or benchmark (names the nearest), or no English in it.
    """
    import mteb

    found = {}
    for name in names:
        try:
            tasks = list(mteb.get_benchmark(name))
        except KeyError:
            tasks = [_find_task(name)]
        for task in tasks:
            found.setdefault(task.metadata.name, task)
    return list(found.values())


def evaluate(
    model: object, tasks: Sequence[object], results_dir: Path | str, *, batch_size: int = 32
) -> pd.DataFrame:
    """Run the tasks that have no stored result; one row per task.

    Args:
        model: from instructed or plain, or another encoder of mteb.
        tasks: mteb tasks.
        results_dir: folder of mteb's result files.
        batch_size: texts encoded together.

    Returns:
        Columns task, type, score (main score x100, mean over subsets), seconds (when it was
        computed), error (missing, or why the task's data could not be loaded; then no score).
    """
    import mteb
    import pandas as pd
    from datasets.utils import disable_progress_bars
    from tqdm import tqdm

    disable_progress_bars()  # several for each task, none of which says much
    logging.getLogger("mteb").setLevel(logging.ERROR)  # that a newer version of a task exists
    cache = mteb.ResultCache(results_dir)
    rows = []
    progress = tqdm(tasks, model.mteb_model_meta.name, unit="task", file=sys.stderr)
    with progress, warnings.catch_warnings():
        # Newer versions of a task, and classes that a weak model never predicts: both known.
        warnings.simplefilter("ignore")
        for task in progress:
            progress.set_postfix_str(task.metadata.name)
            rows.append(_evaluate_task(model, task, cache, batch_size))
    return pd.DataFrame(rows, columns=["task", "type", "score", "seconds", "error"])


def compare(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Scores side by side: a row per task that every model has, then their mean.

    The mean weighs all rows alike: compare bundled and MTEB tasks in two calls.

    Args:
        tables: model name to its table from evaluate.

    Returns:
        Columns task, one per model, and gain = trained - base where there are both. Scores x100.

    Raises:
        EvaluationError: no task has a score of every model.
    """
    import pandas as pd

    columns = {name: t.set_index("task")["score"].dropna() for name, t in tables.items()}
    scores = pd.concat(columns, axis=1, join="inner")
    if scores.empty:
        raise EvaluationError("no task has a score of every model; look at their error columns")
    scores.loc["mean"] = scores.mean()
    if {"base", "trained"} <= set(columns):
        scores["gain"] = scores["trained"] - scores["base"]
    return scores.rename_axis("task").reset_index()


def score_metrics(scores: pd.DataFrame) -> dict[str, float]:
    """The comparison as flat metrics of a stage record: STSBenchmark_trained, mean_gain, ..."""
    rows = scores.set_index("task")
    return {
        f"{task}_{column}": round(float(rows.loc[task, column]), 2)
        for task in rows.index
        for column in rows.columns
    }


def hub_answers(timeout_seconds: float = 3.0) -> bool:
    """Whether the hub (HF_ENDPOINT) can be reached; False when HF_HUB_OFFLINE is set."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(f"{constants.ENDPOINT}/{HUB_PROBE}", timeout=timeout_seconds):
            return True
    except HTTPError as error:
        return "X-Error-Code" in error.headers  # a hub, though without this data set
    except (OSError, HTTPException, ValueError):  # no route, no answer in time, not a URL
        return False


def _find_task(name: str) -> object:
    import mteb

    for task in mteb.get_benchmark(PAPER_BENCHMARK):
        if task.metadata.name == name:
            return task
    try:
        task = mteb.get_task(name, languages=["eng"], exclusive_language_filter=True)
    except KeyError:
        raise EvaluationError(f"no MTEB task or benchmark {name!r}; {_nearest(name)}") from None
    except ValueError:
        raise EvaluationError(f"MTEB task {name} has no English subset") from None
    return task.filter_eval_splits(["test"]) if "test" in task.eval_splits else task


def _nearest(name: str) -> str:
    import mteb

    tasks = mteb.get_tasks(languages=["eng"], modalities=["text"], exclude_superseded=False)
    names = {known.lower(): known for known in (task.metadata.name for task in tasks)}
    names |= {benchmark.name.lower(): benchmark.name for benchmark in mteb.get_benchmarks()}
    close = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.4)
    return f"did you mean {names[close[0]]!r}?" if close else "see mteb.get_tasks()"


def _evaluate_task(model: object, task: object, cache: object, batch_size: int) -> dict:
    import mteb

    row = {"task": task.metadata.name, "type": task.metadata.type}
    stored = cache.load_task_result(task.metadata.name, model.mteb_model_meta)
    # mteb compares the revision of the data only where a stored result lacks a subset.
    is_outdated = stored is not None and not stored.is_mergeable(task)
    fits = task.metadata.type in ("Classification", "Clustering")  # k-means, logistic regression
    limits = _scoring_on_one_thread(model) if fits else nullcontext()
    try:
        with _named_load_errors(task), limits:
            results = mteb.evaluate(
                model,
                task,
                cache=cache,
                overwrite_strategy="always" if is_outdated else "only-missing",
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
                show_progress_bar=False,
                co2_tracker=False,
            )
    except TaskNotLoadedError as error:
        return {**row, "score": None, "seconds": None, "error": str(error)}
    result = results.task_results[0].validate_and_filter_scores(task)
    score = 100 * float(result.get_score())
    return {**row, "score": score, "seconds": result.evaluation_time, "error": None}


@contextmanager
def _scoring_on_one_thread(model: object) -> Iterator[None]:
    """Give scikit-learn one thread, and the model's encoding all of them.

    The loops of k-means are so short here that two threads which wait for each other on a busy
    machine were 70 times slower than one. Both share torch's OpenMP, hence the exception.
    """
    from threadpoolctl import threadpool_limits

    encode = model.encode
    with threadpool_limits(1) as limits:

        def encode_on_all(*args: object, **kwargs: object) -> object:
            limits.restore_original_limits()
            try:
                return encode(*args, **kwargs)
            finally:
                threadpool_limits(1)

        model.encode = encode_on_all
        try:
            yield
        finally:
            model.encode = encode


@contextmanager
def _named_load_errors(task: object) -> Iterator[None]:
    """Turn any error of loading a task's data, and no other, into a TaskNotLoadedError."""
    parts = getattr(task, "tasks", [task])  # an aggregate task, as CQADupstack, has several
    for part in parts:
        part.load_data = partial(_load_or_name, part, part.load_data)
    try:
        yield
    finally:
        for part in parts:
            del part.load_data


def _load_or_name(task: object, load_data: Callable, *args: object, **kwargs: object) -> None:
    try:
        load_data(*args, **kwargs)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise TaskNotLoadedError(
            f"the data of {task.metadata.name} cannot be loaded ({reason}); check the network and "
            "HF_ENDPOINT, or leave the task out"
        ) from error
