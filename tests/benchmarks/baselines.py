"""Table 1 in small: an embedder from teacher data, an unaligned generator, and the aligned one.

python tests/benchmarks/baselines.py [--run-dir outputs/runs/laptop] [--seeds 1,2,3]
    [--teacher-examples 1000] [--mteb STSBenchmark] [--out outputs/baselines]

Each arm makes a data set and trains the embedder on it as stage 11 of the run did: `teacher` takes
recorded seed examples alone (one epoch of --teacher-examples), `teacher_same_size` as many as the
aligned arm has, `instruct` lets the base model answer data prompts under the schema, `aligned` lets
senior and revisor answer the same prompts, drawn as stage 09 would with this seed. The seed decides
prompts, sampling, and order and initialisation of the embedder; the generators are the run's.
Duplicates go, as in stage 10; overlap with the benchmark is not looked for.

What is done stays in --out (half a GiB an arm and seed): killed, it goes on where it was.

Prints one JSON object: for each arm its examples, and the scores of each seed with mean and
standard deviation (x100): the bundled benchmark's mean, and the tasks of --mteb (a hub).
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

ROOT_DIR = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT_DIR))

from speed_utils.contrastive import EmbedderPlan, train_embedder  # noqa: E402
from speed_utils.data_check import read_rows  # noqa: E402
from speed_utils.dedup import near_duplicates  # noqa: E402
from speed_utils.models import folder_fingerprint, resolve_model  # noqa: E402
from speed_utils.parsing import parse_example  # noqa: E402
from speed_utils.records import (  # noqa: E402
    Example,
    Task,
    read_records,
    record_id,
    write_records,
)
from speed_utils.teacher import TEACHER_DIR, recorded_prompt, sample_prompts  # noqa: E402

ARMS = ("aligned", "instruct", "teacher_same_size", "teacher")


def main() -> None:
    """Train and score each arm with each seed, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", type=Path, default=ROOT_DIR / "outputs/runs/laptop")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--teacher-examples", type=int, default=1000)
    parser.add_argument("--mteb", default="", help="real tasks, by name, with commas")
    parser.add_argument("--out", type=Path, default=ROOT_DIR / "outputs/baselines")
    options = parser.parse_args()
    result: dict[str, dict] = {}
    for seed in map(int, options.seeds.split(",")):
        for arm in options.arms.split(","):
            n_examples, scores = _scores(arm, seed, options)
            own = result.setdefault(arm, {"n_examples": [], "scores": {}})
            own["n_examples"].append(n_examples)
            for name, score in scores.items():
                own["scores"].setdefault(name, []).append(round(score, 2))
            print(seed, arm, n_examples, scores, file=sys.stderr)
    for own in result.values():
        for name in ("bundled_mean", *filter(None, options.mteb.split(","))):
            values = own["scores"][name]
            own[name] = round(statistics.mean(values), 1)
            own[f"{name}_deviation"] = round(statistics.stdev(values), 1) if values[1:] else None
    print(json.dumps(result))


def _scores(arm: str, seed: int, options: argparse.Namespace) -> tuple[int, dict[str, float]]:
    """(number of examples, score of each task and of the bundled mean), x100."""
    from sentence_transformers import SentenceTransformer

    from speed_utils.benchmark_tasks import bundled_tasks
    from speed_utils.evaluation import evaluate, find_tasks, instructed

    folder = _folder(arm, seed, options)
    examples = _examples(arm, seed, folder, options)
    values = _parameters(options.run_dir, "11_train_embedder") | {"seed": seed}
    base_dir = resolve_model(values.pop("embedder_model"))
    if arm == "teacher":
        values["epochs"] = 1.0
    training = train_embedder(base_dir, examples, folder / "training", EmbedderPlan(**values))
    revision = folder_fingerprint(training.model_dir)
    model = instructed(SentenceTransformer(str(training.model_dir)), f"{arm}-{seed}", revision)
    bundled = bundled_tasks()
    tasks = bundled + find_tasks([name for name in options.mteb.split(",") if name])
    table = evaluate(model, tasks, folder / "results")
    failed = table["error"].dropna()
    if len(failed):
        raise SystemExit(failed.iloc[0])
    scores = dict(zip(table["task"], table["score"], strict=True))
    own = [scores[task.metadata.name] for task in bundled]
    return len(examples), scores | {"bundled_mean": statistics.mean(own)}


def _folder(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """Where an arm's work is kept, named by what decides it."""
    decides = [_parameters(options.run_dir, "11_train_embedder")]
    decides.append(_parameters(options.run_dir, "10_deduplicate")["threshold"])
    if arm.startswith("teacher"):
        decides.append((TEACHER_DIR / "seed.jsonl").read_text(encoding="utf8"))
    if arm == "teacher":
        decides.append(options.teacher_examples)
    else:
        decides.append(_parameters(options.run_dir, "09_synthesize"))
        decides.append(_record(options.run_dir, "02_brainstorm_tasks")["outputs"])
    if arm in ("aligned", "teacher_same_size"):
        decides.append(_record(options.run_dir, "06_train_senior")["outputs"])
        decides.append(_record(options.run_dir, "08_train_revisor")["outputs"])
    key = record_id(*decides)
    return options.out / f"{arm}-{seed}-{key}"


def _examples(arm: str, seed: int, folder: Path, options: argparse.Namespace) -> list[Example]:
    path = folder / "dataset.jsonl"
    if path.is_file():
        return read_records(path, Example)
    if arm == "teacher":
        examples = _teacher_examples(options.teacher_examples, seed)
    elif arm == "teacher_same_size":
        size = len(_examples("aligned", seed, _folder("aligned", seed, options), options))
        examples = _teacher_examples(size, seed)
    else:
        examples = _synthesized(arm == "aligned", seed, folder, options.run_dir)
    threshold = _parameters(options.run_dir, "10_deduplicate")["threshold"]
    repeated = {removal.id for removal in near_duplicates(examples, threshold)}
    examples = [example for example in examples if example.id not in repeated]
    write_records(path, examples)
    return examples


def _teacher_examples(n_examples: int, seed: int) -> list[Example]:
    examples = [
        parse_example(
            json.dumps(row["answer"]),
            recorded_prompt(row),
            "teacher",
            stage="baselines",
        )
        for row in read_rows(TEACHER_DIR / "seed.jsonl")
    ]
    assert all(isinstance(example, Example) for example in examples), "see: data check"
    return random.Random(seed).sample(examples, min(n_examples, len(examples)))


def _synthesized(is_aligned: bool, seed: int, folder: Path, run_dir: Path) -> list[Example]:
    """What stage 09 does; without alignment the base model writes, and nothing is revised."""
    from speed_utils.engines import open_engine
    from speed_utils.generation import generate
    from speed_utils.synthesis import (
        apply_revisions,
        example_requests,
        read_examples,
        revise_requests,
    )

    values = _parameters(run_dir, "09_synthesize")
    sampling = {name: values[name] for name in ("temperature", "top_p")}
    tasks = read_records(run_dir / "artifacts/02_brainstorm_tasks/tasks.jsonl", Task)
    prompts = sample_prompts(
        tasks,
        values["n_examples"],
        seed=f"synthesis|{seed}",
        document_words_max=values["document_words_max"] or None,
    )

    def answers(requests: list, adapter: str | None, name: str) -> list:
        adapter_dir = run_dir / "artifacts" / adapter / "training/adapter" if adapter else None
        engine = open_engine(
            values["engine"],
            resolve_model(values["generator_model"]),
            adapter_dir,
            batch_size=values["batch_size"],
        )
        completions = generate(requests, engine, folder / f"{name}.jsonl", title=name)
        engine.close()
        return completions

    requests = example_requests(prompts, seed=seed, **sampling)
    if not is_aligned:
        return read_examples(prompts, answers(requests, None, "base"), "base", "baselines")[0]
    written = answers(requests, "06_train_senior", "senior")
    drafts, _ = read_examples(prompts, written, "senior", "baselines")
    refined = answers(revise_requests(drafts, seed=seed, **sampling), "08_train_revisor", "revisor")
    revised, _ = read_examples(drafts, refined, "revisor", "baselines")
    return apply_revisions(drafts, revised)[0]


def _parameters(run_dir: Path, stage: str) -> dict:
    return _record(run_dir, stage)["parameters"]


def _record(run_dir: Path, stage: str) -> dict:
    path = run_dir / "stages" / f"{stage}.json"
    if not path.is_file():
        raise SystemExit(f"{path} is not there; make study, or name a finished run with --run-dir")
    return json.loads(path.read_text(encoding="utf8"))


if __name__ == "__main__":
    main()
