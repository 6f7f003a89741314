"""A run is a folder: artifacts, stage records, executed notebooks and a manifest.

outputs/runs/<run>/manifest.json            profile, versions, hardware, commit
outputs/runs/<run>/artifacts/<stage>/...    what a stage wrote
outputs/runs/<run>/stages/<stage>.json      its record: parameters, inputs, outputs, metrics
outputs/runs/<run>/notebooks/<stage>.ipynb  the executed notebook

stage = open_stage("10_deduplicate", run=run, threshold=threshold)
raw = stage.input("09_synthesize", "examples.jsonl")
write_records(stage.output("dataset.jsonl"), kept)
stage.finish(n_kept=len(kept))
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from speed_utils.records import write_text
from speed_utils.settings import NOTEBOOKS_DIR, ROOT_DIR, notebook_parameters
from speed_utils.shards import SHARDED_STAGES, Shard, current_shard

PACKAGE_DIR = Path(__file__).parent
VERSIONED = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "sentence-transformers",
    "mteb",
    "datasketch",
    "numba",
)
T = TypeVar("T")
NO_TEACHER = {
    **dict.fromkeys(("calls", "cached", "prompt_tokens", "cached_prompt_tokens"), 0),
    **{"completion_tokens": 0, "reasoning_tokens": 0, "usd": 0.0, "models": {}},
}


class RunError(RuntimeError):
    """A run or an artifact is missing or does not fit; the message says which command makes it."""


def outputs_dir() -> Path:
    """Where runs lie: $SPEED_OUTPUTS, or outputs/ in the repository."""
    return Path(os.environ.get("SPEED_OUTPUTS") or ROOT_DIR / "outputs")


def run_dir(run: str) -> Path:
    """The folder of a run by name.

    Raises:
        RunError: the name is not a plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", run):
        raise RunError(f"run name {run!r} may hold letters, digits, '.', '_' and '-' only")
    return outputs_dir() / "runs" / run


def newest_run() -> str | None:
    """The run whose stage records changed last, or None when there is none."""
    manifests = list((outputs_dir() / "runs").glob("*/manifest.json"))

    def changed(manifest: Path) -> float:
        records = (manifest.parent / "stages").glob("*.json")
        return max([manifest.stat().st_mtime, *(path.stat().st_mtime for path in records)])

    return max(manifests, key=changed).parent.name if manifests else None


class Stage:
    """One stage of one run: where it reads and writes, and the record it leaves."""

    def __init__(self, name: str, run: str, parameters: dict[str, object]):
        self.name, self.run, self.parameters = name, run, parameters
        self.run_dir = run_dir(run)
        self.shard = current_shard() if name in SHARDED_STAGES else None
        self.dir = self.run_dir / "artifacts" / name
        if self.shard is not None:
            self.dir /= self.shard.name
        self.dir.mkdir(parents=True, exist_ok=True)
        self._started = time.time()
        self._inputs: dict[str, Path] = {}
        self._outputs: dict[str, Path] = {}
        self._teacher: dict | None = None

    def input(self, stage: str, filename: str) -> Path:
        """The path of another stage's artifact, noted as an input of this one.

        Raises:
            RunError: it does not exist; names the command that makes it.
        """
        path = self.run_dir / "artifacts" / stage / filename
        if not path.exists():
            raise RunError(
                f"{self.name} needs {filename} of stage {stage} in run {self.run!r}. Make it with: "
                f"python -m speed_utils run --run {self.run} --to {stage}"
            )
        return self.external(path)

    def external(self, path: Path | str) -> Path:
        """A file or folder outside the run (data, models), noted as an input.

        Raises:
            RunError: it does not exist.
        """
        path = Path(path)
        path = path if path.is_absolute() else ROOT_DIR / path
        if not path.exists():
            raise RunError(f"{self.name} needs {path}, which does not exist")
        self._inputs[_shown(path)] = path
        return path

    def output(self, filename: str) -> Path:
        """The path for one of this stage's artifacts, noted as an output."""
        path = self.dir / filename
        self._outputs[_shown(path)] = path
        return path

    def part(self, items: Sequence[T], blocks: Mapping[str, int] | None = None) -> list[T]:
        """The items that are this process's share: all, or its shard's (see Shard.part).

        Raises:
            ShardError: the shard has nothing to do.
        """
        return list(items) if self.shard is None else self.shard.part(items, blocks)

    def used_teacher(self, ledger: dict) -> None:
        """Note what the stage asked of the teacher (see speed_utils.ledger)."""
        self._teacher = dict(ledger)

    def finish(self, **metrics: float) -> dict:
        """Write the stage record; metrics are flat, name to number. Returns the record.

        Raises:
            RunError: a declared output was not written.
        """
        for shown, path in self._outputs.items():
            if not path.exists():
                raise RunError(f"{self.name} did not write {shown}")
        record = self.record("done", {k: _number(k, v) for k, v in metrics.items()})
        return record

    def record(self, status: str, metrics: dict, error: str | None = None) -> dict:
        """Write this stage's record with a status, atomically, and return it."""
        existing = {k: p for k, p in self._outputs.items() if p.exists()}
        record = {
            "stage": self.name,
            "status": status,
            "started": datetime.datetime.fromtimestamp(self._started, datetime.UTC).isoformat(),
            "seconds": round(time.time() - self._started, 1),
            "parameters": self.parameters,
            "inputs": [describe(path) for path in self._inputs.values()],
            "outputs": [describe(path) for path in existing.values()],
            "metrics": metrics,
            "teacher": self._teacher or dict(NO_TEACHER),
            "peak_memory_gib": peak_memory_gib(),
            "versions": versions(),
            "device": _device() if "torch" in sys.modules else None,
            "code": code_fingerprint(self.name),
        }
        if error is not None:
            record["error"] = error
        write_json(record_path(self.run, self.name, self.shard), record)
        return record


def open_stage(name: str, *, run: str, **parameters: object) -> Stage:
    """Open a stage for a notebook.

    With ``run`` empty, the newest run is continued. When the parameters differ from those that the
    run was made with (a reader tries another value), the stage works in the run "scratch" instead,
    which begins as a linked copy of that run's earlier artifacts: a finished run is never mixed.

    Raises:
        RunError: no run yet, or parameters that the notebook does not declare.
    """
    declared = [p for p in notebook_parameters(name) if p != "run"]
    if sorted(declared) != sorted(parameters):
        raise RunError(f"{name} declares {declared}, open_stage was given {sorted(parameters)}")
    budget = None
    if not run:
        run = newest_run() or "scratch"
        budget = read_manifest(run).get("budget")
        known = read_record(run, name)
        planned = read_manifest(run).get("parameters", {}).get(name)
        expected = known["parameters"] if known else planned
        if expected is not None and expected != parameters and run != "scratch":
            run = _fork_scratch(run, name)
            print(f"parameters differ from the run's own: working in run {run!r}")
    if not (run_dir(run) / "manifest.json").exists():
        write_json(run_dir(run) / "manifest.json", manifest("scratch", {}, budget))
    stage = Stage(name, run, parameters)
    if parameters.get("teacher") == "recorded":
        stage.external("data/teacher")  # other recordings make the stage run again
    return stage


def is_current(
    run: str, name: str, parameters: dict[str, object], shard: Shard | None = None
) -> tuple[bool, str]:
    """Whether a stage's record still holds: (True, "") or (False, why it must run)."""
    record = read_record(run, name, shard)
    if record is None:
        return False, "not run yet"
    if record["status"] != "done":
        return False, "failed before"
    changed = [k for k in parameters if record["parameters"].get(k) != parameters[k]]
    if changed or set(parameters) != set(record["parameters"]):
        return False, f"parameters changed: {', '.join(changed)}"
    if record["code"] != code_fingerprint(name):
        return False, "code changed"
    for what in ("inputs", "outputs"):
        for item in record[what]:
            path = Path(item["path"])
            path = path if path.is_absolute() else ROOT_DIR / path
            if not path.exists():
                return False, f"{what[:-1]} missing: {item['path']}"
            if fingerprint(path) != item["sha256"]:
                return False, f"{what[:-1]} changed: {item['path']}"
    return True, ""


def record_path(run: str, name: str, shard: Shard | None = None) -> Path:
    """Where the record of a stage, or of one shard of it, lies."""
    folder = run_dir(run) / "stages"
    return folder / f"{name}.json" if shard is None else folder / shard.name / f"{name}.json"


def read_record(run: str, name: str, shard: Shard | None = None) -> dict | None:
    """A stage's record, or None when there is none (or it is unreadable)."""
    try:
        return json.loads(record_path(run, name, shard).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None


def read_manifest(run: str) -> dict:
    """A run's manifest, empty when there is none."""
    try:
        return json.loads((run_dir(run) / "manifest.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}


def manifest(profile_name: str, parameters: dict, budget: dict | None = None) -> dict:
    """What is noted about a run as a whole: profile, budget, versions, commit and hardware."""
    import psutil

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT_DIR, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "profile": profile_name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(),
        "commit": commit or None,
        "versions": versions(),
        "hardware": {
            "cpu_cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "machine": platform.machine(),
        },
        "parameters": parameters,
        "budget": budget or {},
    }


def describe(path: Path) -> dict:
    """A file or folder for a record: path, rows (of .jsonl and .tsv) and sha256."""
    rows = None
    if path.is_file() and path.suffix in (".jsonl", ".tsv"):
        with path.open("rb") as file:
            rows = sum(1 for _ in file) - (path.suffix == ".tsv")
    return {"path": _shown(path), "rows": rows, "sha256": fingerprint(path)}


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{fingerprint(file)}\0".encode())
    return digest.hexdigest()


@cache
def code_fingerprint(stage: str) -> str:
    """SHA-256 of a notebook's code and of every speed_utils module that it imports, in turn."""
    notebook = json.loads((NOTEBOOKS_DIR / f"{stage}.ipynb").read_text(encoding="utf8"))
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    sources = [
        "".join(c["source"]) for c in cells if "parameters" not in c["metadata"].get("tags", [])
    ]
    digest = hashlib.sha256("\n".join(sources).encode())
    waiting, seen = _imported_modules("\n".join(sources)), set()
    while waiting:
        module = waiting.pop()
        path = PACKAGE_DIR / f"{module}.py"
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        waiting |= _imported_modules(path.read_text(encoding="utf8"))
    # display and runs shape what is shown and noted, not what is computed
    for module in sorted(seen - {"display", "runs", "settings"}):
        digest.update((PACKAGE_DIR / f"{module}.py").read_bytes())
    if "prompts" in seen:
        for path in sorted((ROOT_DIR / "data" / "prompts").glob("*.txt")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def peak_memory_gib() -> float:
    """The most memory that this process has held, in GiB (GPU memory where there is one)."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss: bytes on macOS, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        peak = max(peak, sys.modules["torch"].cuda.max_memory_allocated() / 2**30)
    return round(peak, 2)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(*packages: str) -> str:
    """Python, the named packages and, with torch among them, the device: for a notebook's head."""
    known = versions()
    parts = [f"{name} {known.get(name, 'not installed')}" for name in ("python", *packages)]
    if "torch" in packages:
        parts.append(_device())
    return ", ".join(parts)


def _device() -> str:
    """The device and the number format of models, such as "cpu, float32"."""
    from speed_utils.models import device_and_dtype

    device, dtype = device_and_dtype()
    return f"{device}, {str(dtype).removeprefix('torch.')}"


def write_json(path: Path, value: object) -> None:
    """Write JSON in one step, readable and with a final newline."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def _imported_modules(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speed_utils"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("speed_utils.")}
    return found


def _fork_scratch(run: str, name: str) -> str:
    target = run_dir("scratch") / "artifacts"
    target.mkdir(parents=True, exist_ok=True)
    for folder in sorted((run_dir(run) / "artifacts").iterdir()):
        link = target / folder.name
        if folder.name >= name:
            continue
        if link.is_symlink():
            link.unlink()
        if not link.exists():
            link.symlink_to(folder.resolve(), target_is_directory=True)
    own = target / name
    if own.is_symlink():
        own.unlink()
    return "scratch"


def _shown(path: Path) -> str:
    path = Path(path)
    return str(path.relative_to(ROOT_DIR)) if path.is_relative_to(ROOT_DIR) else str(path)


def _number(name: str, value: object) -> float | int | None:
    if value is None or isinstance(value, bool | int | float):
        return value
    if hasattr(value, "item"):
        return value.item()
    raise RunError(f"metric {name} must be a number, is {type(value).__name__}")
