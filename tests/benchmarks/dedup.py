"""Deduplicate a million examples with planted near-copies, and race what one could use instead.

python tests/benchmarks/dedup.py [--examples 1150000] [--peer-examples 50000] [--memory-gib 2]

All read JSON Lines, shingle (5 words), sign (128 permutations), find duplicates at 0.7 and write
the kept lines, each in a process of its own. The peers run on the first --peer-examples (their
rates, not their times, are compared); one that is not installed gives null:
pip install rensa==0.5.0 "datatrove[io,processing]==0.10.1".

Prints one JSON object: examples, seconds, examples_per_second, ratio_to_datasketch,
ratio_to_rensa, ratio_to_datatrove, precision (removed ones, 100,000 at most, whose exact similarity
to the kept one they name reaches the threshold), recall_085 (planted pairs of similarity 0.85 and
above whose later one is gone), peak_gib, time_growth (time per example over that at a tenth).
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from queue import Empty

ROOT_DIR = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT_DIR))

import numpy as np  # noqa: E402

from speed_utils.dedup import DedupPlan, deduplicate_file, jaccard, shingles  # noqa: E402

THRESHOLD = 0.7
N_PERMUTATIONS = 128
PLANTED_SHARE = 0.12
N_WORDS = 40_000
PRECISION_ROWS = 100_000  # removals that are looked at, drawn where there are more
FIELD_WORDS = {  # of query, positive and negative: what the prompts' length slots ask for
    "classification": ((100, 1, 1), 7),
    "sts": ((20, 20, 20), 7),
    "retrieval": ((10, 150, 150), 7),
    "matching_short": ((12, 12, 0), 1),
    "matching_long": ((200, 200, 0), 1),
}
PEERS = ("datasketch", "rensa", "datatrove")


def main() -> None:
    """Make the data, run each in its own process, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=1_150_000)
    parser.add_argument("--peer-examples", type=int, default=50_000)
    parser.add_argument("--memory-gib", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, tenth, few = (folder / f"{part}.jsonl" for part in ("all", "tenth", "few"))
        planted = _write_examples(path, options.examples)
        _head(path, tenth, options.examples // 10)
        _head(path, few, options.peer_examples)
        _apart(_ours, few, folder / "warm.jsonl", options.memory_gib)  # compiles, and caches that
        seconds_tenth, _ = _apart(_ours, tenth, folder / "kept_tenth.jsonl", options.memory_gib)
        seconds, peak_gib = _apart(_ours, path, folder / "kept.jsonl", options.memory_gib)
        rate = options.examples / seconds
        result = {
            "examples": options.examples,
            "seconds": round(seconds, 1),
            "examples_per_second": round(rate),
        }
        for peer in PEERS:
            measured = _apart(globals()[f"_{peer}"], few, folder / f"{peer}.jsonl", folder / peer)
            peer_rate = options.peer_examples / measured[0] if measured else None
            result[f"ratio_to_{peer}"] = round(rate / peer_rate, 1) if peer_rate else None
        result |= _quality(path, folder / "kept.removed", planted)
        result["peak_gib"] = round(peak_gib, 2)
        result["time_growth"] = round(seconds / (10 * seconds_tenth), 2)
    print(json.dumps(result))


def _write_examples(path: Path, n_examples: int) -> list[tuple[str, str, float]]:
    """Write random examples, some of them near copies; return (id, id, Jaccard) of each copy."""
    rng, numbers = random.Random(0), np.random.default_rng(0)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(rng.choices(letters[:20], k=rng.randint(2, 9))) for _ in range(N_WORDS)]
    vocabulary = np.array(words, object)
    kinds = [kind for kind, (_, weight) in FIELD_WORDS.items() for _ in range(weight)]
    originals: dict[str, list[tuple[str, list[list[str]]]]] = {kind: [] for kind in FIELD_WORDS}
    planted = []
    with path.open("w") as file:
        for _ in range(n_examples):
            kind = rng.choice(kinds)
            identifier = f"{rng.getrandbits(48):012x}"
            known = originals[kind]
            if known and rng.random() < PLANTED_SHARE:
                source, texts = rng.choice(known)
                copy = _vary(texts, words, rng)
                planted.append((source, identifier, _similarity(texts, copy)))
                texts = copy
            else:
                lengths = [rng.randint(max(1, n // 2), n * 2) for n in FIELD_WORDS[kind][0] if n]
                texts = [
                    vocabulary[numbers.zipf(1.3, n) % N_WORDS].tolist()
                    if n > 2
                    else rng.choices(words, k=n)
                    for n in lengths
                ]
                if len(known) < 20_000:
                    known.append((identifier, texts))
            fields = [" ".join(text) for text in texts]
            row = {
                "id": identifier,
                "kind": kind,
                "topic": "Arts",
                "task": "a task",
                "slots": {},
                "query": fields[0],
                "positive": fields[1],
                "negative": fields[2] if len(fields) > 2 else None,
                "source": "senior",
            }
            file.write(json.dumps(row) + "\n")
    return planted


def _vary(texts: list[list[str]], words: list[str], rng: random.Random) -> list[list[str]]:
    """Change none to a twelfth of the words."""
    share = rng.choice([0, 0.005, 0.01, 0.02, 0.04, 0.08])
    return [[rng.choice(words) if rng.random() < share else w for w in text] for text in texts]


def _similarity(left: list[list[str]], right: list[list[str]]) -> float:
    return jaccard(*(shingles(" ".join(" ".join(t) for t in texts)) for texts in (left, right)))


def _head(path: Path, part: Path, n_lines: int) -> None:
    with path.open() as source, part.open("w") as target:
        for line, _ in zip(source, range(n_lines), strict=False):
            target.write(line)


def _apart(function, *arguments) -> tuple[float, float] | None:
    """(seconds, peak GiB) of a call in a fresh process; None where its library is missing."""
    os.sync()  # what was written before is not flushed on this one's time
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measured, args=(queue, function, *arguments))
    process.start()
    while True:
        try:
            result = queue.get(timeout=5)
            break
        except Empty:
            if not process.is_alive():
                raise SystemExit(f"{function.__name__[1:]} died: {process.exitcode}") from None
    process.join()
    if isinstance(result, str):
        raise SystemExit(result)
    return result


def _measured(queue, function, *arguments) -> None:
    started = time.perf_counter()
    try:
        function(*arguments)
    except ImportError as error:
        print(f"{function.__name__[1:]}: {error}", file=sys.stderr)
        queue.put(None)
        return
    except BaseException as error:  # the parent waits for an answer
        queue.put(f"{function.__name__[1:]}: {type(error).__name__}: {error}")
        raise
    seconds = time.perf_counter() - started
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    queue.put((seconds, peak_gib))


def _ours(path: Path, kept: Path, memory_gib: float) -> None:
    plan = DedupPlan(THRESHOLD, N_PERMUTATIONS, memory_gib=memory_gib)
    deduplicate_file(path, kept, kept.with_suffix(".removed"), plan)


def _rows(path: Path, ids: set[str] | None = None):
    """(line, kind, id, shingles) of each line, in Python: what a plain script does."""
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            if ids is None or row["id"] in ids:
                texts = [row["query"], row["positive"], row["negative"]]
                yield line, row["kind"], row["id"], shingles(" ".join(t for t in texts if t))


def _datasketch(path: Path, kept: Path, _work_dir: Path) -> None:
    """The library's own loop, without exact verification."""
    from datasketch import MinHash, MinHashLSH

    indexes = {kind: MinHashLSH(THRESHOLD, N_PERMUTATIONS) for kind in FIELD_WORDS}
    with kept.open("w") as file:
        for line, kind, identifier, own in _rows(path):
            signature = MinHash(N_PERMUTATIONS)
            signature.update_batch([shingle.encode() for shingle in own])
            if not indexes[kind].query(signature):
                indexes[kind].insert(identifier, signature)
                file.write(line)


def _rensa(path: Path, kept: Path, _work_dir: Path) -> None:
    """Its deduplicator with LSH, which checks candidates by their signatures."""
    from rensa import RMinHashDeduplicator

    found = {
        kind: RMinHashDeduplicator(threshold=THRESHOLD, num_perm=N_PERMUTATIONS, use_lsh=True)
        for kind in FIELD_WORDS
    }
    with kept.open("w") as file:
        batches: dict[str, list] = {kind: [] for kind in FIELD_WORDS}
        for line, kind, identifier, own in _rows(path):
            batches[kind].append((line, identifier, list(own)))
            if len(batches[kind]) == 2_000:
                _add(found[kind], batches[kind], file)
        for kind, batch in batches.items():
            _add(found[kind], batch, file)


def _add(deduplicator, batch: list, file) -> None:
    keep = deduplicator.add_pairs((identifier, own) for _, identifier, own in batch)
    file.writelines(line for (line, *_), is_kept in zip(batch, keep, strict=True) if is_kept)
    batch.clear()


def _datatrove(path: Path, _kept: Path, work_dir: Path) -> None:
    """Its four steps on the local executor, two tasks; it has no exact verification."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    work_dir.mkdir()
    lines = path.read_text().splitlines(keepends=True)
    source = work_dir / "input"
    source.mkdir()
    for k in range(2):  # two files for two tasks
        (source / f"{k}.jsonl").write_text("".join(lines[k::2]))
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=9)
    folders = {name: str(work_dir / name) for name in ("signs", "buckets", "removed", "kept")}

    def reader():
        return JsonlReader(str(source), adapter=_adapted, glob_pattern="*.jsonl")

    steps = [
        ([reader(), MinhashDedupSignature(folders["signs"], config)], 2),
        ([MinhashDedupBuckets(folders["signs"], folders["buckets"], config=config)], 14),
        ([MinhashDedupCluster(folders["buckets"], folders["removed"], config=config)], 1),
        ([reader(), MinhashDedupFilter(folders["removed"]), JsonlWriter(folders["kept"])], 2),
    ]
    for number, (pipeline, n_tasks) in enumerate(steps):
        logs = str(work_dir / f"logs{number}")
        LocalPipelineExecutor(pipeline, tasks=n_tasks, workers=2, logging_dir=logs).run()


def _adapted(_reader, data: dict, path: str, id_in_file: int | str) -> dict:
    texts = [data["query"], data["positive"], data["negative"]]
    return {"text": " ".join(t for t in texts if t), "id": data["id"], "metadata": {}}


def _quality(path: Path, removed: Path, planted: list[tuple[str, str, float]]) -> dict:
    """Precision of the removals by the definition, recall of the planted copies."""
    removals = {row["id"]: row["duplicate_of"] for row in map(json.loads, removed.open())}
    looked_at = random.Random(0).sample(sorted(removals), min(PRECISION_ROWS, len(removals)))
    wanted = {*looked_at, *(removals[identifier] for identifier in looked_at)}
    sets = {}
    for _, kind, identifier, own in _rows(path, wanted):
        sets[identifier] = kind, {hash(shingle) for shingle in own}
    n_right = 0
    for identifier in looked_at:
        (kind, own), (other, original) = sets[identifier], sets[removals[identifier]]
        n_right += kind == other and jaccard(own, original) >= THRESHOLD
    near = [max(one, two) for one, two, similarity in planted if similarity >= 0.85]
    return {
        "precision": n_right / len(looked_at),
        "recall_085": round(sum(later in removals for later in near) / len(near), 4),
    }


if __name__ == "__main__":
    main()
