"""Kill -9 at random moments of 03 and 09, run again, and compare with an undisturbed run.

python tests/benchmarks/kill9.py [--tries 30]

A server on loopback is the teacher of 03 and serves the generators of 09. Prints one JSON object:
kills, lost (answers that were in a store after a kill, and in none at the end), asked_again
(questions sent again after a kill although their answer was in the store), artifacts_equal.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT_DIR = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT_DIR), str(ROOT_DIR / "tests")]

import psutil  # noqa: E402
from fake_openai import FakeOpenAI  # noqa: E402

STAGES = ("03_write_seed_data", "09_synthesize")
ARTIFACTS = {
    "03_write_seed_data": ("answers.jsonl", "seed.jsonl"),
    "09_synthesize": ("senior.jsonl", "revisor.jsonl", "examples.jsonl"),
}
RUN_SECONDS = (3.0, 15.0)  # a run is killed after a time in this range
_asked: Counter[str] = Counter()  # requests by the mark of their question


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=30)
    options = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = "sk-benchmark"
    server = FakeOpenAI(latency=0.6, answer=_marked_answer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder / "calm", server)
        shutil.copytree(folder / "calm", folder / "killed")
        n_kills = n_lost = n_again = 0
        for stage in STAGES:
            _run(folder / "calm", server, "--only", stage)
            _asked.clear()
            rng = random.Random(stage)
            tries_when_stored: dict[str, int] = {}
            for _ in range(options.tries // len(STAGES)):
                seconds = rng.uniform(*RUN_SECONDS)
                n_kills += _run(folder / "killed", server, "--only", stage, seconds=seconds)
                for mark in _stored(folder / "killed", stage):
                    tries_when_stored.setdefault(mark, _asked[mark])
            _run(folder / "killed", server, "--only", stage)
            stored = _stored(folder / "killed", stage)
            n_lost += len(set(tries_when_stored) - stored)
            n_again += sum(_asked[mark] > before for mark, before in tries_when_stored.items())
        equal = all(
            _artifact(folder / "calm", stage, file) == _artifact(folder / "killed", stage, file)
            for stage, files in ARTIFACTS.items()
            for file in files
        )
        result = {
            "kills": n_kills,
            "lost": n_lost,
            "asked_again": n_again,
            "artifacts_equal": equal,
        }
    server.close()
    print(json.dumps(result))


def _marked_answer(body: dict) -> str:
    """A valid answer that names its question, so that stores tell what was asked."""
    keys = body["response_format"]["json_schema"]["schema"]["properties"]
    # The seed tells two prompts with the same words apart; two in 600 are such a pair.
    question = f"{body['seed']} {body['messages'][-1]['content']}"
    mark = hashlib.sha256(question.encode()).hexdigest()[:16]
    _asked[mark] += 1
    return json.dumps({key: f"{key} for question {mark}" for key in keys})


def _stored(outputs: Path, stage: str) -> set[str]:
    """Marks of the questions whose answers the stage's stores hold."""
    found = set()
    for file in ARTIFACTS[stage][:-1]:
        path = outputs / "runs" / "kill" / "artifacts" / stage / file
        if path.exists():
            found |= set(re.findall(rb"question ([0-9a-f]{16})", path.read_bytes()))
    return {mark.decode() for mark in found}


def _prepare(outputs: Path, server: FakeOpenAI) -> None:
    """Stages 01 and 02, and what 09 reads of the stages between: adapters that no one loads."""
    _run(outputs, server, "--to", "02")
    for stage in ("06_train_senior", "08_train_revisor"):
        adapter = outputs / "runs" / "kill" / "artifacts" / stage / "training" / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text("{}")


def _run(outputs: Path, server: FakeOpenAI, *arguments: str, seconds: float | None = None) -> bool:
    """Run stages; with ``seconds``, kill them then. Whether they were killed."""
    command = [
        *(sys.executable, "-m", "speed_utils", "run", "--profile", "smoke", "--run", "kill"),
        *("-p", f"03_write_seed_data.teacher=openai:m@{server.url}"),
        *("-p", "03_write_seed_data.n_examples=600"),
        *("-p", f"09_synthesize.engine=openai@{server.url}"),
        *("-p", "09_synthesize.n_examples=600", *arguments),
    ]
    errors_path = outputs.with_suffix(".stderr")  # a pipe would fill with progress bars, and block
    with errors_path.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT_DIR,
            env={**os.environ, "SPEED_OUTPUTS": str(outputs)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        for other in psutil.process_iter(["environ"]):  # the kernel is in a group of its own
            if (other.info["environ"] or {}).get("SPEED_OUTPUTS") == str(outputs):
                other.kill()
        process.wait()
        return True
    assert process.returncode == 0, errors_path.read_text()[-2000:]
    return False


def _artifact(outputs: Path, stage: str, file: str) -> bytes:
    return (outputs / "runs" / "kill" / "artifacts" / stage / file).read_bytes()


if __name__ == "__main__":
    main()
