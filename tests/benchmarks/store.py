"""Open a store of a million completions: seconds and memory.

python tests/benchmarks/store.py [--completions 1000000]

Prints one JSON object: completions, file_mib, open_seconds, peak_mib (of the process that opens it,
Python and imports included), lookups_per_second.
"""

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT_DIR = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT_DIR))

from speed_utils.engines import Completion  # noqa: E402
from speed_utils.store import Store  # noqa: E402

N_LOOKUPS = 20_000


def main() -> None:
    """Write a store, open it in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--completions", type=int, default=1_000_000)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        _open(options.open, options.completions)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.jsonl"
        _write(path, options.completions)
        command = [sys.executable, __file__, "--open", str(path)]
        command += ["--completions", str(options.completions)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def _key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def _write(path: Path, n_completions: int) -> None:
    text = json.dumps({"user_query": "q " * 8, "positive_document": "some words of text " * 18})
    with path.open("w") as file:
        for i in range(n_completions):
            completion = Completion(_key(i), f"r{i}", text, "stop", 200, 120)
            file.write(json.dumps(asdict(completion)) + "\n")


def _open(path: Path, n_completions: int) -> None:
    started = time.perf_counter()
    store = Store(path)
    seconds = time.perf_counter() - started
    assert len(store) == n_completions
    rng = random.Random(0)
    wanted = [_key(rng.randrange(n_completions)) for _ in range(N_LOOKUPS)]
    started = time.perf_counter()
    assert all(store.get(key) is not None for key in wanted)
    lookups = N_LOOKUPS / (time.perf_counter() - started)
    result = {
        "completions": n_completions,
        "file_mib": round(path.stat().st_size / 2**20),
        "open_seconds": round(seconds, 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "lookups_per_second": round(lookups),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
