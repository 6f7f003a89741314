"""Does the bundled benchmark tell models apart, and does it rank them as real MTEB tasks do?

python tests/benchmarks/models.py [--trained DIR] [--mteb STSBenchmark,STS12] [--resamples 100]
    [--out outputs/models]

Scores five models: random vectors, a bag of words (TF-IDF, hashed, its weights from
data/teacher/seed.jsonl), the untrained base, the reference encoder and the run's trained embedder
(default: of outputs/runs/laptop). Intervals come from the bootstrap: each task's test items
(queries, pairs, texts) are drawn again with replacement and scored anew on the same embeddings, the
same draws for every model; the interval of the mean draws all tasks at once.

Scores stay in --out: killed, it goes on where it was, and --mteb with another task scores only that
one. Draws are made anew.

Prints one JSON object: scores and intervals (x100, 95 %) of each model, wins (of each pair of
models, the share of draws in which the one with the better mean wins), and with --mteb (a hub,
HF_ENDPOINT) the real tasks' scores and the Spearman correlation of the models' means.
"""

import argparse
import json
import random
import sys
import warnings
from itertools import combinations
from pathlib import Path

ROOT_DIR = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT_DIR))

import numpy as np  # noqa: E402

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
REFERENCE = "sentence-transformers/all-MiniLM-L6-v2"
TRAINED = ROOT_DIR / "outputs/runs/laptop/artifacts/11_train_embedder/training/model"
DIMENSION = 384  # of the random vectors
N_FEATURES = 2**14  # of the bag of words
CLUSTER_SAMPLES = 5  # of clustering, in a draw; 50 in the score itself


def main() -> None:
    """Score, draw again, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trained", type=Path, default=TRAINED)
    parser.add_argument("--mteb", default="", help="real tasks, by name, with commas")
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT_DIR / "outputs/models")
    options = parser.parse_args()

    from speed_utils.benchmark_tasks import TASK_CLASSES, bundled_tasks
    from speed_utils.evaluation import evaluate, find_tasks

    result = {"models": {}}
    draws, real = {}, {}
    for name, model in _models(options.trained):
        _remember(model)
        scores = _scores(evaluate(model, bundled_tasks(), options.out))
        draws[name] = {
            task_class.metadata.name: [
                _draw(model, task_class, number) for number in range(options.resamples)
            ]
            for task_class in TASK_CLASSES
        }
        if options.mteb:
            named = find_tasks(options.mteb.split(","))
            real[name] = _scores(evaluate(model, named, options.out))
        result["models"][name] = {
            "mean": round(float(np.mean(list(scores.values()))), 1),
            "mean_interval": _interval(_means(draws[name])),
            "tasks": {
                task: {"score": round(score, 1), "interval": _interval(draws[name][task])}
                for task, score in scores.items()
            },
        }
        print(name, result["models"][name], file=sys.stderr)
    by_mean = sorted(result["models"], key=lambda name: result["models"][name]["mean"])
    result["order"] = by_mean
    result["wins"] = {
        f"{better} > {worse}": round(
            float(np.mean(_means(draws[better]) > _means(draws[worse]))), 2
        )
        for worse, better in combinations(by_mean, 2)
    }
    if options.mteb:
        from scipy.stats import spearmanr

        result["mteb"] = real
        bundled = [result["models"][name]["mean"] for name in by_mean]
        means = [np.mean(list(real[name].values())) for name in by_mean]
        result["rank_correlation"] = round(float(spearmanr(bundled, means).statistic), 2)
    print(json.dumps(result))


def _models(trained_dir: Path) -> list:
    from sentence_transformers import SentenceTransformer

    from speed_utils.embedder import build_embedder
    from speed_utils.evaluation import instructed, plain
    from speed_utils.models import folder_fingerprint, resolve_model
    from speed_utils.records import record_id
    from speed_utils.teacher import TEACHER_DIR

    base_dir, reference_dir = resolve_model(BASE), resolve_model(REFERENCE)
    base = build_embedder(base_dir, 72)
    trained = SentenceTransformer(str(trained_dir))
    reference = SentenceTransformer(str(reference_dir))
    models = [
        ("base", instructed(base, "base", folder_fingerprint(base_dir))),
        ("trained", instructed(trained, "trained", folder_fingerprint(trained_dir))),
        ("reference", plain(reference, "reference", folder_fingerprint(reference_dir))),
    ]
    bag = record_id(N_FEATURES, (TEACHER_DIR / "seed.jsonl").read_text(encoding="utf8"))
    for name, encode, revision in (
        ("random", _random_vectors, str(DIMENSION)),
        ("bag_of_words", _bag_of_words(), bag),
    ):
        model = plain(reference, name, revision)
        model.encode = _encoder(encode)
        models.append((name, model))
    return models


def _random_vectors(texts: list[str]) -> np.ndarray:
    """A vector of its own for every text, the same one each time."""
    return np.array([np.random.default_rng(list(t.encode())).normal(size=DIMENSION) for t in texts])


def _bag_of_words():
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.pipeline import make_pipeline

    from speed_utils.data_check import read_rows
    from speed_utils.teacher import TEACHER_DIR

    rows = read_rows(TEACHER_DIR / "seed.jsonl")
    texts = [text for row in rows for text in row["answer"].values()]
    bag = make_pipeline(
        HashingVectorizer(n_features=N_FEATURES, alternate_sign=False, norm=None),
        TfidfTransformer(sublinear_tf=True),
    ).fit(texts)
    return lambda texts: bag.transform(texts).astype("float32").toarray()


def _encoder(encode):
    def of_batches(inputs, **_options):
        return encode([text for batch in inputs for text in batch["text"]]).astype("float32")

    return of_batches


def _remember(model: object) -> None:
    """Let a model encode every text of a task once, however often it is drawn."""
    inner, known = model.encode, {}

    def encode(inputs, *, task_metadata, prompt_type=None, **options):
        texts = [text for batch in inputs for text in batch["text"]]
        if not task_metadata.name.startswith("SpeedBench"):
            return inner(inputs, task_metadata=task_metadata, prompt_type=prompt_type, **options)
        keys = [(task_metadata.name, prompt_type, text) for text in texts]
        if not all(key in known for key in keys):
            vectors = inner(inputs, task_metadata=task_metadata, prompt_type=prompt_type, **options)
            known.update(zip(keys, np.asarray(vectors), strict=True))
        return np.stack([known[key] for key in keys])

    model.encode = encode


def _draw(model: object, task_class: type, number: int) -> float:
    """The score, x100, on one draw of the task's test items."""
    import mteb

    task = task_class()
    task.load_data()
    type_, rng = task.metadata.type, random.Random(number)
    if type_ in ("Retrieval", "Reranking"):
        _draw_queries(task.dataset["default"]["test"], rng)
    else:
        rows = task.dataset["test"]
        drawn = [rng.randrange(len(rows)) for _ in rows]
        if type_ == "Clustering":  # copies would always be in one cluster, and raise the score
            drawn = sorted(set(drawn))
            task.n_clusters = CLUSTER_SAMPLES
        task.dataset["test"] = rows.select(drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that a weak model never predicts
        results = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return 100 * float(results.task_results[0].get_score())


def _draw_queries(data: dict, rng: random.Random) -> None:
    """Draw queries; one that comes twice gets an id of its own each time."""
    queries = data["queries"].to_list()
    drawn = [dict(rng.choice(queries)) for _ in queries]
    relevant, candidates = {}, {}
    for number, row in enumerate(drawn):
        new = f"{row['id']}#{number}"
        relevant[new] = data["relevant_docs"][row["id"]]
        if data["top_ranked"]:
            candidates[new] = data["top_ranked"][row["id"]]
        row["id"] = new
    data["queries"] = type(data["queries"]).from_list(drawn)
    data["relevant_docs"] = relevant
    data["top_ranked"] = candidates or None


def _scores(table) -> dict[str, float]:
    failed = table["error"].dropna()
    if len(failed):
        raise SystemExit(failed.iloc[0])
    return dict(zip(table["task"], table["score"], strict=True))


def _means(draws: dict[str, list[float]]) -> np.ndarray:
    return np.mean(list(draws.values()), axis=0)


def _interval(scores) -> list[float]:
    return [round(float(score), 1) for score in np.percentile(scores, [2.5, 97.5])]


if __name__ == "__main__":
    main()
