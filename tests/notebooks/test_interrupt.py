"""Ctrl-C in the runner while a live teacher answers: what is under way is waited for, and kept."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fake_openai import FakeOpenAI

from speed_utils.settings import ROOT_DIR
from speed_utils.store import read_completions

pytestmark = pytest.mark.chain


def test_answers_under_way_are_kept_and_not_asked_again(tmp_path):
    server = FakeOpenAI(latency=5.0)  # longer than a kernel is otherwise given to end
    command = [
        *(sys.executable, "-m", "speed_utils", "run", "--profile", "smoke", "--to", "03"),
        *("-p", f"03_write_seed_data.teacher=openai:m@{server.url}"),
    ]
    environment = {**os.environ, "SPEED_OUTPUTS": str(tmp_path), "OPENAI_API_KEY": "sk-canary-51"}
    process = subprocess.Popen(
        command,
        cwd=ROOT_DIR,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts with & ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not server.in_flight:
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors[-2000:]
    stage = tmp_path / "runs" / "smoke" / "artifacts" / "03_write_seed_data"
    kept = list(read_completions(stage / "answers.jsonl"))
    assert 0 < len(kept) == server.calls
    server.latency = 0.0
    done = subprocess.run(command, cwd=ROOT_DIR, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert server.asked_after_good == 0
    server.close()
