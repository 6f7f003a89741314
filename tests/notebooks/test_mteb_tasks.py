"""A real MTEB task by name, through a hub: a local mirror where one lies beside the repository."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from speed_utils.settings import ROOT_DIR

MIRROR_DIR = ROOT_DIR.parent / "shared" / "hub"
pytestmark = pytest.mark.skipif(not MIRROR_DIR.is_dir(), reason="no local mirror of the hub")
SCRIPT = textwrap.dedent(
    """
    import json, sys
    from sentence_transformers import SentenceTransformer
    from speed_utils.evaluation import evaluate, find_tasks, plain
    from speed_utils.models import resolve_model

    folder = resolve_model("sentence-transformers/all-MiniLM-L6-v2")
    model = plain(SentenceTransformer(str(folder), device="cpu"), "reference", "1")
    table = evaluate(model, find_tasks(["STSBenchmark", "STS13"]), sys.argv[1], batch_size=64)
    print(json.dumps(table.to_dict("records")))
    """
)


@pytest.fixture
def hub_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(MIRROR_DIR / "serve.py"), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.kill()


def test_the_reference_encoder_has_its_published_score(hub_url, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "results")],
        cwd=ROOT_DIR,
        env={**os.environ, "HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = {row["task"]: row for row in json.loads(result.stdout.splitlines()[-1])}
    assert rows["STSBenchmark"]["score"] == pytest.approx(82.03, abs=0.1)
    assert rows["STS13"]["error"], "the mirror has no STS13: that must be said, not raised"
