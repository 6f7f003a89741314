"""The bundled tasks in mteb with encoders of known quality, and what surrounds an evaluation."""

import hashlib
import http.server
import json
import threading

import numpy as np
import pandas as pd
import pytest

from speed_utils import evaluation, mteb_models
from speed_utils.benchmark_files import BenchmarkError, read_retrieval, read_sts
from speed_utils.embedder import query_text
from speed_utils.evaluation import EvaluationError, compare, evaluate, find_tasks, hub_answers

SUBJECTS = ["tide", "bread", "comet", "violin"]
FILLER = ["early", "north", "again", "paper", "quiet", "seven", "under", "maybe"]


class WordEncoder:
    """A hashing bag of words; unrelated random vectors when it is told to know nothing."""

    dimension = 256

    def __init__(self, name: str, *, knows_words: bool = True) -> None:
        from mteb.models import ModelMeta

        self.knows_words = knows_words
        self.encoded: list[tuple[str | None, str]] = []
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": "1"})

    def _vector(self, text: str) -> np.ndarray:
        parts = text.lower().split() if self.knows_words else [text]
        vector = np.zeros(self.dimension)
        for part in parts:
            seed = int.from_bytes(hashlib.sha256(part.encode()).digest()[:4])
            vector += np.random.default_rng(seed).normal(size=self.dimension)
        return vector / np.linalg.norm(vector)

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        texts = [text for batch in inputs for text in batch["text"]]
        self.encoded += [(prompt_type.value if prompt_type else None, text) for text in texts]
        return np.stack([self._vector(text) for text in texts])

    def similarity(self, embeddings1, embeddings2):
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1, embeddings2):
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


@pytest.fixture
def benchmark_dir(tmp_path):
    """A benchmark that counting words solves: texts of one subject share its word."""
    rng = np.random.default_rng(0)

    def text(subject: str, n: int = 3) -> str:
        return " ".join([subject] * 4 + list(rng.choice(FILLER, n, replace=False)))

    def words(shared: int, side: str) -> str:
        return " ".join([f"w{i}" for i in range(shared)] + [f"{side}{i}" for i in range(shared, 6)])

    labelled = [{"text": text(s), "label": s} for s in SUBJECTS for _ in range(10)]
    files = {
        "classification_train": labelled,
        "classification_test": [{"text": text(s), "label": s} for s in SUBJECTS for _ in range(8)],
        "clustering": labelled,
        "pair_classification": [
            {"subject": s, "sentence1": text(s), "sentence2": text(t), "label": int(s == t)}
            for s in SUBJECTS
            for t in SUBJECTS
        ],
        "reranking": [
            {
                "query": text(s),
                "positive": [text(s)],
                "negative": [text(t) for t in SUBJECTS if t != s],
            }
            for s in SUBJECTS
        ],
        "retrieval_corpus": [{"id": f"d{i}", "text": text(s)} for i, s in enumerate(SUBJECTS)],
        "retrieval_queries": [
            {"id": f"q{i}", "text": text(s), "relevant": [f"d{i}"]} for i, s in enumerate(SUBJECTS)
        ],
        "sts": [
            {"sentence1": words(n, f"a{k}x"), "sentence2": words(n, f"b{k}x"), "score": n * 5 / 6}
            for n in range(7)
            for k in range(3)
        ],
        "summarization": [
            {
                "text": " ".join(f"{s}{i}" for i in range(8)),
                "summaries": [
                    {
                        "summary": " ".join(
                            [f"{s}{i}" for i in range(n)] + [f"no{i}" for i in range(8 - n)]
                        ),
                        "rating": rating,
                    }
                    for n, rating in ((1, 1), (3, 2), (5, 4), (7, 5))
                ],
            }
            for s in SUBJECTS
        ],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf8")
    return tmp_path


def tasks_of(folder):
    from speed_utils.benchmark_tasks import bundled_tasks

    return bundled_tasks(data_dir=folder)


def test_an_encoder_that_knows_words_beats_one_that_knows_nothing(benchmark_dir, tmp_path):
    results = tmp_path / "results"
    knowing = evaluate(WordEncoder("knowing"), tasks_of(benchmark_dir), results)
    random = evaluate(WordEncoder("random", knows_words=False), tasks_of(benchmark_dir), results)

    assert list(knowing["type"]) == [
        "Classification",
        "Clustering",
        "PairClassification",
        "Reranking",
        "Retrieval",
        "STS",
        "Summarization",
    ]
    assert knowing["error"].isna().all() and random["error"].isna().all()
    assert (knowing["score"] > 95).all() and (knowing["score"] <= 100).all()
    assert (knowing["score"] - random["score"] > 10).all()
    assert random.set_index("task").loc["SpeedBenchClassification", "score"] < 60


def test_bundled_tasks_can_be_chosen_by_type():
    from speed_utils.benchmark_files import BenchmarkError
    from speed_utils.benchmark_tasks import bundled_tasks

    assert [t.metadata.name for t in bundled_tasks(["STS", "Classification"])] == [
        "SpeedBenchClassification",
        "SpeedBenchSTS",
    ]
    assert len(bundled_tasks()) == 7
    with pytest.raises(BenchmarkError, match=r"Sts.*Retrieval"):
        bundled_tasks(["Sts"])


def test_queries_and_documents_are_told_apart_and_other_texts_are_neither(benchmark_dir, tmp_path):
    model = WordEncoder("m")
    for task in tasks_of(benchmark_dir):
        model.encoded.clear()
        evaluate(model, [task], tmp_path / "results")
        kinds = {kind for kind, _ in model.encoded}
        asymmetric = task.metadata.type in ("Retrieval", "Reranking")
        assert kinds == ({"query", "document"} if asymmetric else {None}), task.metadata.name


def test_stored_results_are_mtebs_own_and_are_not_computed_again(benchmark_dir, tmp_path):
    from mteb.results import TaskResult

    results = tmp_path / "results"
    first = evaluate(WordEncoder("m"), tasks_of(benchmark_dir), results)
    again = WordEncoder("m")
    second = evaluate(again, tasks_of(benchmark_dir), results)

    assert again.encoded == []
    assert np.allclose(first["score"], second["score"], atol=1e-3)  # mteb stores six digits
    stored = TaskResult.from_disk(next(results.rglob("SpeedBenchSTS.json")))
    assert stored.get_score() * 100 == pytest.approx(
        first.set_index("task").loc["SpeedBenchSTS", "score"], abs=1e-3
    )


def test_another_model_and_a_changed_file_are_computed(benchmark_dir, tmp_path):
    results = tmp_path / "results"
    evaluate(WordEncoder("m"), tasks_of(benchmark_dir), results)
    other = WordEncoder("other")
    evaluate(other, tasks_of(benchmark_dir), results)
    assert other.encoded

    path = benchmark_dir / "sts.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    model = WordEncoder("m")
    evaluate(model, tasks_of(benchmark_dir), results)
    assert len(model.encoded) == 2 * 20, "only the changed STS file is encoded, both sides"


def test_one_task_object_gives_every_model_the_same_samples(benchmark_dir, tmp_path):
    task = next(t for t in tasks_of(benchmark_dir) if t.metadata.type == "Clustering")
    scores = [
        evaluate(WordEncoder(name, knows_words=False), [task], tmp_path / "r")["score"][0]
        for name in ("first", "second")
    ]
    assert scores[0] == scores[1]


def test_encoding_has_all_threads_and_they_are_given_back(benchmark_dir, tmp_path):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model = WordEncoder("m")
        seen = []
        vector = model._vector
        model._vector = lambda text: (seen.append(torch.get_num_threads()), vector(text))[1]
        evaluate(model, tasks_of(benchmark_dir)[:3], tmp_path / "r")
        assert set(seen) == {3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_metadata_is_complete(benchmark_dir):
    for task in tasks_of(benchmark_dir):
        task.metadata._validate_metadata()
        assert task.metadata.is_filled(), task.metadata.name
        assert task.metadata.license == "cc0-1.0"
        assert isinstance(task.metadata.prompt, str)


def test_a_task_without_data_does_not_end_the_others(benchmark_dir, tmp_path):
    (benchmark_dir / "clustering.jsonl").unlink()
    table = evaluate(WordEncoder("m"), tasks_of(benchmark_dir), tmp_path / "r").set_index("task")
    assert "SpeedBenchClustering cannot be loaded" in table.loc["SpeedBenchClustering", "error"]
    assert table["score"].notna().sum() == 6


def test_an_error_in_the_model_is_not_taken_for_missing_data(benchmark_dir, tmp_path):
    model = WordEncoder("m")
    model._vector = lambda text: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, tasks_of(benchmark_dir), tmp_path / "r")


def test_broken_files_name_their_line(tmp_path):
    path = tmp_path / "sts.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a"}\n')
    with pytest.raises(BenchmarkError, match=r"line 2.*sentence2"):
        read_sts(path)
    (tmp_path / "c.jsonl").write_text('{"id": "d1", "text": "x"}\n')
    (tmp_path / "q.jsonl").write_text('{"id": "q1", "text": "x", "relevant": ["d2"]}\n')
    with pytest.raises(BenchmarkError, match="no passage d2"):
        read_retrieval(tmp_path / "c.jsonl", tmp_path / "q.jsonl")


def test_instructions_stand_on_queries_and_symmetric_texts_only(
    tiny_model, benchmark_dir, tmp_path
):
    from speed_utils.embedder import build_embedder

    embedder = build_embedder(tiny_model, 32)
    seen = []
    original = embedder.encode
    embedder.encode = lambda texts, **kw: (
        seen.extend((kw["prompt"] or "") + text for text in texts) or original(texts, **kw)
    )
    model = evaluation.instructed(embedder, "a/b c:d", "abc")
    tasks = {task.metadata.type: task for task in tasks_of(benchmark_dir)}

    evaluate(model, [tasks["Retrieval"]], tmp_path / "r")
    retrieval = read_retrieval(
        benchmark_dir / "retrieval_corpus.jsonl", benchmark_dir / "retrieval_queries.jsonl"
    )["default"]["test"]
    prompt = tasks["Retrieval"].metadata.prompt
    expected = {query_text(prompt, text) for text in retrieval["queries"]["text"]}
    assert set(seen) == expected | set(retrieval["corpus"]["text"])

    seen.clear()
    evaluate(model, [tasks["STS"]], tmp_path / "r")
    assert seen and all(text.startswith("Instruct: Retrieve sem") for text in seen)
    folders = [
        path.relative_to(tmp_path / "r").parts for path in (tmp_path / "r").rglob("*STS.json")
    ]
    assert folders == [("results", "a_b_c_d", "abc-instructed-32", "SpeedBenchSTS.json")]


def test_the_same_weights_with_and_without_instructions_are_two_results(tiny_model):
    from speed_utils.embedder import build_embedder

    short, long = build_embedder(tiny_model, 16), build_embedder(tiny_model, 32)
    metas = [
        evaluation.instructed(short, "base", "1").mteb_model_meta,
        evaluation.plain(short, "base", "1").mteb_model_meta,
        evaluation.plain(long, "base", "1").mteb_model_meta,
    ]
    assert len({meta.revision for meta in metas}) == 3


def test_e5_prompts_are_for_tasks_that_exist_and_reach_the_model(tiny_model):
    import mteb

    from speed_utils.embedder import build_embedder

    assert len(mteb_models.E5_PROMPTS) == 10 + 1 + 12
    model = evaluation.instructed(build_embedder(tiny_model, 16), "base", "1")
    for name, prompt in mteb_models.E5_PROMPTS.items():
        metadata = mteb.get_task(name).metadata
        instruction = model.get_task_instruction(metadata, None)
        assert instruction == query_text(prompt, ""), name


def test_tasks_are_found_by_name_and_typos_are_refused():
    tasks = find_tasks(["STSBenchmark", "STS22", "STSBenchmark", "MassiveIntentClassification"])
    assert [task.metadata.name for task in tasks] == [
        "STSBenchmark",
        "STS22",
        "MassiveIntentClassification",
    ]
    assert list(tasks[0].eval_splits) == ["test"]
    assert [list(task.hf_subsets) for task in tasks[1:]] == [["en"], ["en"]]
    assert list(find_tasks(["MSMARCO"])[0].eval_splits) == ["dev"]  # as the benchmark has it
    assert len(find_tasks(["MTEB(eng, v1)", "SciFact"])) == 56
    with pytest.raises(EvaluationError, match="did you mean 'STSBenchmark'"):
        find_tasks(["STSBenchmrak"])
    with pytest.raises(EvaluationError, match=r"did you mean 'MTEB\(eng, v1\)'"):
        find_tasks(["MTEB(en, v1)"])
    with pytest.raises(EvaluationError, match="no English"):
        find_tasks(["BornholmBitextMining"])


def table(**scores):
    return pd.DataFrame({"task": list(scores), "score": list(scores.values())})


def test_compare_keeps_what_every_model_has_and_adds_the_mean_and_gain():
    scores = compare(
        {
            "base": table(a=10.0, b=20.0, c=None),
            "trained": table(b=50.0, a=30.0, c=90.0),
            "reference": table(a=60.0, b=70.0, c=80.0),
        }
    )
    assert scores.to_dict("list") == {
        "task": ["a", "b", "mean"],
        "base": [10.0, 20.0, 15.0],
        "trained": [30.0, 50.0, 40.0],
        "reference": [60.0, 70.0, 65.0],
        "gain": [20.0, 30.0, 25.0],
    }
    assert evaluation.score_metrics(scores)["mean_gain"] == 25.0
    assert "gain" not in compare({"base": table(a=1.0), "other": table(a=2.0)})
    with pytest.raises(EvaluationError, match="no task"):
        compare({"base": table(a=1.0), "trained": table(b=1.0)})


@pytest.fixture
def serve(monkeypatch):
    """Start a server that answers every request alike, and make it the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    servers = []

    def start(status: int, **headers: str) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_hub_answers_only_where_there_is_one(serve, monkeypatch):
    from huggingface_hub import constants

    serve(200)
    assert hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    serve(404, X_Error_Code="RepoNotFound")
    assert hub_answers(), "a mirror without that one data set is a hub"
    serve(403)
    assert not hub_answers(), "a proxy that refuses is not"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub_answers(0.5)
    monkeypatch.setattr(constants, "ENDPOINT", "not a url")
    assert not hub_answers(0.5)
