"""The whole chain at smoke size through the real runner, with real models (minutes).

The tests build on one another in order: run, look at the records, run again, kill and resume.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speed_utils import runs
from speed_utils.records import Example, read_records
from speed_utils.settings import ROOT_DIR, load_profile, stage_names

pytestmark = pytest.mark.chain
CANARY = "sk-canary-51c3a9"
COMMAND = [sys.executable, "-m", "speed_utils", "run", "--profile", "smoke"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "SPEED_OUTPUTS": str(folder), "OPENAI_API_KEY": CANARY}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT_DIR,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )


def record(folder: Path, stage: str) -> dict:
    return json.loads((folder / "runs" / "smoke" / "stages" / f"{stage}.json").read_text())


def test_kill_9_in_the_middle_of_09_loses_nothing(folder):
    """Everything up to 09 runs, 09 is killed while the senior writes."""
    process = subprocess.Popen(
        [*COMMAND, "-p", "09_synthesize.batch_size=3"],
        cwd=ROOT_DIR,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    store = folder / "runs" / "smoke" / "artifacts" / "09_synthesize" / "senior.jsonl"
    while process.poll() is None and not (store.exists() and store.stat().st_size):
        time.sleep(0.2)
    assert process.poll() is None, f"the run ended before 09: {process.stderr.read()[-3000:]}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _kill_kernels_of(folder)
    before = store.read_bytes()
    n_asked = load_profile("smoke").stages["09_synthesize"]["n_examples"]
    assert 0 < before.count(b"\n") < n_asked, "it was not killed in the middle"
    assert not (folder / "runs" / "smoke" / "stages" / "09_synthesize.json").exists()
    result = run(folder, "-p", "09_synthesize.batch_size=3")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    after = store.read_bytes()
    whole_lines = before[: before.rfind(b"\n") + 1].splitlines()
    assert set(whole_lines) <= set(after.splitlines()), "finished requests were asked again"
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    assert len(keys) == len(set(keys)) == n_asked
    assert "up to date" in result.stdout, "stages before 09 were executed again"


def _kill_kernels_of(folder: Path) -> None:
    """The kernel is a process of its own group: end it as a power cut would."""
    import psutil

    for process in psutil.process_iter(["cmdline", "environ"]):
        variables = process.info["environ"] or {}
        if variables.get("SPEED_OUTPUTS") == str(folder):
            process.kill()


def test_every_stage_left_a_complete_record(folder):
    for stage in stage_names():
        found = record(folder, stage)
        assert found["status"] == "done" and found["seconds"] > 0
        assert found["peak_memory_gib"] < 8
        assert all(isinstance(v, int | float | None) for v in found["metrics"].values())
        assert all(item["sha256"] for item in found["inputs"] + found["outputs"])
        assert set(found["teacher"]) == set(runs.NO_TEACHER)
        assert (folder / "runs" / "smoke" / "notebooks" / f"{stage}.ipynb").is_file()


def test_the_stages_did_their_work(folder):
    junior = record(folder, "04_train_junior")["metrics"]
    assert junior["heldout_loss"] < junior["heldout_loss_base"]
    assert abs(record(folder, "06_train_senior")["metrics"]["first_loss"] - 0.693) < 0.05
    written = record(folder, "09_synthesize")["metrics"]
    assert written["constrained_valid_share"] >= 0.5
    path = folder / "runs" / "smoke" / "artifacts" / "10_deduplicate" / "dataset.jsonl"
    examples = read_records(path, Example)
    assert {"classification", "retrieval", "sts"} <= {example.kind for example in examples}
    assert {example.source for example in examples} <= {"senior", "revisor"}
    for stage in ("02_brainstorm_tasks", "03_write_seed_data", "05_build_preferences"):
        teacher = record(folder, stage)["teacher"]
        assert teacher["calls"] == teacher["cached"] > 0 and teacher["usd"] == 0


def test_three_models_were_scored_by_mteb(folder):
    path = folder / "runs" / "smoke" / "artifacts" / "12_evaluate_mteb" / "scores.json"
    rows = json.loads(path.read_text())
    assert [r["task"] for r in rows] == ["SpeedBenchSTS", "mean"]
    for row in rows:
        assert {"base", "trained", "reference", "gain"} <= set(row)
        assert row["reference"] > row["base"]


def test_a_second_run_executes_nothing_and_is_quick(folder):
    started = time.time()
    result = run(folder, "-p", "09_synthesize.batch_size=3")
    assert result.returncode == 0
    assert f"0 stages executed, {len(stage_names())} up to date" in result.stdout
    assert time.time() - started < 15


def test_no_secret_is_in_any_file_of_the_run(folder):
    for path in (folder / "runs" / "smoke").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert CANARY.encode() not in path.read_bytes(), path


def test_a_failing_cell_names_notebook_cell_and_cause(folder):
    result = run(
        folder, "--run", "broken", "--only", "01", "-p", "01_sample_topics.odp_path=no.tsv"
    )
    assert result.returncode == 1
    assert "01_sample_topics failed" in result.stderr and "no.tsv" in result.stderr
    assert "code cell" in result.stderr and "Traceback" not in result.stderr
    failed = json.loads(
        (folder / "runs" / "broken" / "stages" / "01_sample_topics.json").read_text()
    )
    assert failed["status"] == "failed" and "no.tsv" in failed["error"]
    executed = folder / "runs" / "broken" / "notebooks" / "01_sample_topics.ipynb"
    assert "no.tsv" in executed.read_text()
    refused = run(folder, "-p", "09_synthesize.n_example=5")
    assert refused.returncode == 2 and "did you mean 'n_examples'" in refused.stderr
