"""More than one machine: shards of a stage, and blocks of the deduplication, as tasks on Ray.

    python -m speed_utils run --profile gpu --ray auto --shards 8

Each shard is the command that a person would type (``run --only STAGE --shard I/N``), so store and
result are those of one process. A task whose worker died is started again, and goes on from the
shard's store. All machines share the file system and the Python environment; a teacher's key is
exported where each machine's `ray start` is typed, since none is sent over the network.

Paper: not stated; ours. Ray is optional: pip install "ray>=2.60,<3".
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from speed_utils import runs
from speed_utils.ray_tasks import RAY_VARIABLE, TRIES, connected_ray
from speed_utils.settings import ROOT_DIR
from speed_utils.shards import SHARDED_STAGES
from speed_utils.study import StudyError, run_study

WAIT_SECONDS = 5.0  # until a shard is tried again that its dead worker's kernel still holds
WAIT_SECONDS_MAX = 300.0  # after which somebody else must hold it
FORWARDED = ("SPEED_CACHE", "SPEED_DTYPE", "SPEED_PRICES", "HF_ENDPOINT", "HF_HOME")  # never a key
GENERATING_STAGES = ("05_build_preferences", "07_write_revisions", "09_synthesize")
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # not loaded after a fork
BUSY_SIGNS = ("is being executed by process", "is being written by another process")


def run_on_ray(
    address: str,
    profile_name: str | None,
    *,
    run: str | None,
    n_shards: int | None,
    stages: Sequence[str],
    overrides: Sequence[str] = (),
) -> Path:
    """Run stages as run_study does; those that can be shared out, as shards on a cluster first.

    Args:
        address: of the cluster; "auto" for the one that this machine belongs to, "local" for a
            new one on this machine alone.
        profile_name: as run_study takes it.
        run: likewise.
        n_shards: parts of a stage; None for one per machine of the cluster.
        stages: names, in order.
        overrides: as run_study takes them.

    Returns:
        The run's folder.

    Raises:
        ClusterError: Ray is not installed, or does not answer.
        StudyError: a shard or a stage failed.
    """
    ray = connected_ray(address)
    n_shards = n_shards or len([node for node in ray.nodes() if node["Alive"]])
    arguments = [f"-p{override}" for override in overrides]
    arguments += ["--profile", profile_name] if profile_name else []
    arguments += ["--run", run] if run else []
    os.environ[RAY_VARIABLE] = ray.get_runtime_context().gcs_address  # for ray_map in the kernels
    try:
        for stage in stages:
            if stage in SHARDED_STAGES:
                _run_shards(ray, stage, arguments, n_shards)
            folder = run_study(profile_name, run=run, only_stage=stage, overrides=list(overrides))
    finally:
        del os.environ[RAY_VARIABLE]
    return folder


def _run_shards(ray: object, stage: str, arguments: list[str], n_shards: int) -> None:
    has_gpu = stage in GENERATING_STAGES and ray.cluster_resources().get("GPU", 0) >= 1
    needs = {"num_gpus": 1} if has_gpu else {"num_cpus": 1}
    environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    environment["SPEED_OUTPUTS"] = str(runs.outputs_dir())
    task = ray.remote(max_retries=TRIES, scheduling_strategy="SPREAD", **needs)(run_shard)
    commands = [
        [*arguments, "--only", stage, "--shard", f"{i}/{n_shards}"] for i in range(n_shards)
    ]
    print(f"  {stage:24s} {n_shards} shards on the cluster", flush=True)
    failures = [text for text in ray.get([task.remote(c, environment) for c in commands]) if text]
    if failures:
        raise StudyError(f"{len(failures)} of {n_shards} shards of {stage} failed\n{failures[0]}")


def run_shard(arguments: list[str], environment: dict[str, str]) -> str:
    """Execute one shard's command on the machine of this worker; empty, or why it failed."""
    command = [sys.executable, "-m", "speed_utils", "run", *arguments]
    environment = {**os.environ, **environment}
    environment.pop("OMP_NUM_THREADS", None)  # Ray's; the shard may use its machine
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while True:
        done = subprocess.run(
            command,
            cwd=ROOT_DIR,
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=_die_with_parent,
        )
        if done.returncode == 0 or "nothing is left for shard" in done.stderr:
            return ""
        is_busy = any(sign in done.stderr for sign in BUSY_SIGNS)
        if not is_busy or time.monotonic() > deadline:
            return done.stderr[-2000:]
        time.sleep(WAIT_SECONDS)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its worker dies: nobody would wait for it."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
