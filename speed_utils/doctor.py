"""What this machine can run, what is missing, and how to get it; and the map of stages.

for row in machine_report(): print(row["what"], row["status"], row["advice"])
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import sys

from speed_utils.runs import read_record
from speed_utils.settings import NOTEBOOKS_DIR, ROOT_DIR, load_profile, stage_names

PYTHON_RANGE = ((3, 11), (3, 13))
DISK_NEEDED_GIB = 6  # models, checkpoints and one laptop run
MEMORY_NEEDED_GIB = 7
PACKAGES = {
    "torch": "always",
    "transformers": "always",
    "trl": "always",
    "peft": "always",
    "sentence_transformers": "always",
    "mteb": "always",
    "datasketch": "always",
    "llguidance": "always",
    "papermill": "always",
    "vllm": "fast generation",
    "ray": "clusters",
}


ADVICE = {"vllm": "make setup-vllm", "ray": 'pip install "ray>=2.60,<3"'}


def machine_report() -> list[dict[str, str]]:
    """One row per check: what, status (ok or missing), found, needed (always or for), advice."""
    rows = [_python_row(), _memory_row(), _disk_row(), _gpu_row()]
    for package, needed in PACKAGES.items():
        is_there = importlib.util.find_spec(package) is not None
        advice = "make setup" if needed == "always" else ADVICE[package]
        rows.append(_row(package, is_there, "installed" if is_there else "-", needed, advice))
    key = bool(os.environ.get("OPENAI_API_KEY"))
    rows.append(
        _row(
            "teacher key",
            key,
            "set" if key else "-",
            "a live teacher",
            "export OPENAI_API_KEY; the recorded teacher needs none",
        )
    )
    n_recorded = len(list((ROOT_DIR / "data" / "teacher").glob("*.jsonl")))
    rows.append(
        _row(
            "recorded teacher",
            n_recorded >= 4,
            f"{n_recorded} files",
            "always",
            "git checkout data/teacher",
        )
    )
    return rows


def stage_map(run: str) -> list[dict[str, object]]:
    """One row per notebook: stage, what it reads and writes, seconds of its last time in a run."""
    rows = []
    for stage in stage_names():
        cells = json.loads((NOTEBOOKS_DIR / f"{stage}.ipynb").read_text(encoding="utf8"))["cells"]
        head = "".join(cells[0]["source"])
        rows.append(
            {
                "stage": stage,
                "reads": _header_field(head, "Reads"),
                "writes": _header_field(head, "Writes"),
                "paper": _header_field(head, "Paper"),
                "seconds": _last_seconds(run, stage),
            }
        )
    return rows


def profile_sizes() -> list[dict[str, object]]:
    """One row per profile: what it is, its teacher and how much it writes."""
    rows = []
    for name in ("smoke", "laptop", "gpu", "paper"):
        profile = load_profile(name)
        stages = profile.stages
        rows.append(
            {
                "profile": name,
                "about": profile.about,
                "teacher": stages["03_write_seed_data"]["teacher"],
                "seed": stages["03_write_seed_data"]["n_examples"],
                "preferences": stages["05_build_preferences"]["n_lists"],
                "revisions": stages["07_write_revisions"]["n_revisions"],
                "synthesized": stages["09_synthesize"]["n_examples"],
            }
        )
    return rows


def _header_field(head: str, name: str) -> str:
    match = re.search(rf"\| \*\*{name}\*\* \| (.*?) \|$", head, flags=re.MULTILINE)
    return match.group(1).replace("`", "") if match else ""


def _last_seconds(run: str, stage: str) -> float | None:
    record = read_record(run, stage)
    return record["seconds"] if record and record["status"] == "done" else None


def _row(what: str, is_ok: bool, found: str, needed: str, advice: str) -> dict[str, str]:
    status = "ok" if is_ok else "missing"
    return {
        "what": what,
        "status": status,
        "found": found,
        "needed": needed,
        "advice": "" if is_ok else advice,
    }


def _python_row() -> dict[str, str]:
    low, high = PYTHON_RANGE
    is_ok = low <= sys.version_info[:2] <= high
    return _row("Python", is_ok, platform.python_version(), "always", "use Python 3.11 to 3.13")


def _memory_row() -> dict[str, str]:
    import psutil

    gib = psutil.virtual_memory().total / 2**30
    advice = "use the smoke profile, or a machine with more memory"
    return _row("memory", gib >= MEMORY_NEEDED_GIB, f"{gib:.1f} GiB", "laptop profile", advice)


def _disk_row() -> dict[str, str]:
    gib = shutil.disk_usage(ROOT_DIR).free / 2**30
    advice = f"free {DISK_NEEDED_GIB} GiB, or set SPEED_OUTPUTS to another disk"
    return _row("disk", gib >= DISK_NEEDED_GIB, f"{gib:.0f} GiB free", "laptop profile", advice)


def _gpu_row() -> dict[str, str]:
    import torch

    is_there = torch.cuda.is_available()
    found = torch.cuda.get_device_name(0) if is_there else "-"
    return _row("GPU", is_there, found, "gpu and paper profiles", "a CUDA GPU and environment.yml")
