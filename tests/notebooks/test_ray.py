"""Stages on a local Ray cluster of two workers, one of which is killed in the middle.

Slow: python -m pytest -m slow tests/notebooks/test_ray.py (pip install "ray>=2.60,<3" first).
"""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
from fake_openai import FakeOpenAI

from speed_utils.settings import ROOT_DIR

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ARTIFACTS = ("answers.jsonl", "seed.jsonl")


@pytest.fixture
def cluster(tmp_path):
    """A head of two logical processors on this machine."""
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    start = [*ray, "start", "--head", "--port", "0", "--num-cpus", "2"]
    start += ["--include-dashboard", "false", "--disable-usage-stats"]
    started = subprocess.run(start, env=environment, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    yield
    subprocess.run([*ray, "stop", "--force"], env=environment, capture_output=True)


def run(outputs, server, *arguments):
    command = [
        *(sys.executable, "-m", "speed_utils", "run", "--profile", "smoke", "--run", "r"),
        *("-p", f"03_write_seed_data.teacher=openai:m@{server.url}"),
        *("-p", "03_write_seed_data.n_examples=120", *arguments),
    ]
    environment = {**os.environ, "SPEED_OUTPUTS": str(outputs), "OPENAI_API_KEY": "sk-none"}
    done = subprocess.run(command, cwd=ROOT_DIR, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def kill_one_worker(server, killed):
    """Kill a Ray worker as soon as a few answers have been given."""
    while server.calls < 10:
        time.sleep(0.1)
    for process in psutil.process_iter(["cmdline"]):
        if "ray::run_shard" in " ".join(process.info["cmdline"] or []):
            process.kill()
            killed.append(process.pid)
            return


def test_a_dead_worker_loses_nothing_and_the_result_is_that_of_one_process(cluster, tmp_path):
    server = FakeOpenAI(latency=0.4)
    run(tmp_path / "one", server, "--to", "03")
    server.tries.clear()
    server.calls = 0
    killed = []
    killer = threading.Thread(target=kill_one_worker, args=(server, killed), daemon=True)
    killer.start()
    shown = run(tmp_path / "many", server, "--to", "03", "--ray", "auto", "--shards", "2")
    killer.join(timeout=5)
    assert killed and "2 shards on the cluster" in shown
    for name in ARTIFACTS:
        paths = [
            tmp_path / k / "runs" / "r" / "artifacts" / "03_write_seed_data" / name
            for k in ("one", "many")
        ]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    server.close()
