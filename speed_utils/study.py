"""Run the study: execute the notebooks in order with papermill, skip what is up to date.

    run_study("laptop", to_stage="04_train_junior")

Each notebook runs in a kernel of its own; its executed copy is kept in the run folder, also when a
cell fails. A run is locked while it is executed, so that two processes never write the same run.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from speed_utils import runs
from speed_utils.settings import (
    BUDGET_SECTION,
    NOTEBOOKS_DIR,
    PROFILES_DIR,
    ROOT_DIR,
    Profile,
    SettingsError,
    find_stage,
    load_profile,
    stage_names,
)
from speed_utils.shards import SHARD_VARIABLE, SHARDED_STAGES, Shard, ShardError

SAVE_EVERY_SECONDS = 10  # the executed notebook is saved while it runs
INTERRUPT_SECONDS = 150.0  # that a kernel has to end after Ctrl-C; a teacher's call takes up to 120
KERNEL_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # forks after use would dead-lock
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_MININTERVAL": "1",
    # glibc otherwise gives large blocks back to the system after each training step and takes them
    # anew, page by page: keeping them made training about 1.5 times as fast (outputs/LOG.md).
    "MALLOC_MMAP_THRESHOLD_": str(2**34),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}


class StudyError(RuntimeError):
    """A stage failed; the message names notebook, cell and cause."""


def run_study(
    profile_name: str | None = None,
    *,
    run: str | None = None,
    from_stage: str | None = None,
    to_stage: str | None = None,
    only_stage: str | None = None,
    overrides: list[str] | None = None,
    shard: Shard | None = None,
) -> Path:
    """Run the stages of a profile in order; finished ones whose record still holds are skipped.

    Args:
        profile_name: smoke, laptop, gpu, paper or the path of a YAML file; None continues the
            named run with its own parameters, or takes laptop for a new one.
        run: the run's name; None for the profile's name.
        from_stage, to_stage, only_stage: limits, by name or number.
        overrides: "stage.key=value" each.
        shard: do this part of only_stage (one of SHARDED_STAGES); None for the whole.

    Returns:
        The run's folder.

    Raises:
        SettingsError: a name, key or value is not valid.
        StudyError: a stage failed.
        RunError: the run, or this shard of it, is being executed by another process.
        ShardError: a shard of a stage that has none.
    """
    profile, run = _plan(profile_name, run, overrides)
    stages = selected_stages(from_stage, to_stage, only_stage)
    if shard is not None and (only_stage is None or stages[0] not in SHARDED_STAGES):
        raise ShardError(f"--shard needs --only with one of {', '.join(SHARDED_STAGES)}")
    folder = runs.run_dir(run)
    folder.mkdir(parents=True, exist_ok=True)
    variables = {SHARD_VARIABLE: f"{shard.index}/{shard.count}"} if shard else {}
    with _locked(folder, shard), _environment(variables):
        known = runs.read_manifest(run)
        if shard is None and (
            profile.stages != known.get("parameters") or profile.budget != known.get("budget")
        ):
            noted = runs.manifest(profile.name, profile.stages, profile.budget)
            runs.write_json(folder / "manifest.json", noted)
        print(f"run {run!r}, profile {profile.name}: {len(stages)} stages -> {folder}")
        started = time.time()
        n_executed = sum(_run_stage(stage, run, profile.stages[stage], shard) for stage in stages)
        seconds = time.time() - started
        print(
            f"{n_executed} stages executed, {len(stages) - n_executed} up to date, {seconds:.0f} s"
        )
    return folder


def status_rows(run: str) -> list[dict]:
    """One row per stage of a run: stage, status, why it would run again, seconds, rows written.

    Raises:
        RunError: no such run.
    """
    manifest = runs.read_manifest(run)
    if not manifest:
        raise runs.RunError(f"no run {run!r} under {runs.outputs_dir() / 'runs'}")
    rows = []
    for stage in stage_names():
        parameters = manifest["parameters"].get(stage, {})
        record = runs.read_record(run, stage) or {}
        is_done, why = runs.is_current(run, stage, parameters)
        rows.append(
            {
                "stage": stage,
                "status": "up to date" if is_done else why,
                "seconds": record.get("seconds"),
                "peak_gib": record.get("peak_memory_gib"),
                "error": record.get("error"),
            }
        )
    return rows


def expected_seconds(stage: str, profile_name: str) -> float | None:
    """How long the stage took in the reference run or an earlier run of this profile, or None."""
    found: list[tuple[float, float]] = []
    for manifest_path in runs.outputs_dir().glob("**/manifest.json"):
        record_path = manifest_path.parent / "stages" / f"{stage}.json"
        try:
            if json.loads(manifest_path.read_text())["profile"] != profile_name:
                continue
            record = json.loads(record_path.read_text())
        except (OSError, ValueError, KeyError):
            continue
        if record.get("status") == "done":
            found.append((record_path.stat().st_mtime, record["seconds"]))
    return max(found)[1] if found else None


def _plan(
    profile_name: str | None, run: str | None, overrides: list[str] | None
) -> tuple[Profile, str]:
    if profile_name is None and run is not None and runs.read_manifest(run):
        manifest = runs.read_manifest(run)
        known = {**manifest["parameters"]}
        profile = load_profile(
            manifest["profile"] if _is_profile(manifest["profile"]) else "laptop"
        )
        changed = [
            f"{stage}.{key}={json.dumps(value)}"
            for stage, values in known.items()
            if stage in profile.stages
            for key, value in values.items()
            if key in profile.stages[stage] and profile.stages[stage][key] != value
        ]
        changed += [f"{BUDGET_SECTION}.{k}={v}" for k, v in manifest.get("budget", {}).items()]
        name = manifest["profile"]
        profile = load_profile(name if _is_profile(name) else "laptop", changed + (overrides or []))
        return profile, run
    profile = load_profile(profile_name or "laptop", overrides)
    return profile, run or profile.name


def _is_profile(name: str) -> bool:
    return (PROFILES_DIR / f"{name}.yaml").is_file()


def selected_stages(first: str | None, last: str | None, only: str | None) -> list[str]:
    """The stages between two, or one alone; each by name or number.

    Raises:
        SettingsError: an unknown stage, or an empty range.
    """
    stages = stage_names()
    if only is not None:
        return [find_stage(only)]
    start = stages.index(find_stage(first)) if first else 0
    end = stages.index(find_stage(last)) if last else len(stages) - 1
    if start > end:
        raise SettingsError(f"--from {first} comes after --to {last}")
    return stages[start : end + 1]


def _run_stage(
    stage: str, run: str, parameters: dict[str, object], shard: Shard | None = None
) -> bool:
    """Execute one stage, or a shard of it, unless its record holds; True when it was executed."""
    is_done, why = runs.is_current(run, stage, parameters, shard)
    if is_done:
        print(f"  {stage:24s} up to date")
        return False
    expected = None if shard else expected_seconds(stage, runs.read_manifest(run)["profile"])
    hint = f", about {expected:.0f} s last time" if expected else ""
    print(f"  {stage:24s} {f'{shard.name}, ' if shard else ''}{why}{hint}", flush=True)
    executed = runs.run_dir(run) / "notebooks" / (shard.name if shard else "") / f"{stage}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    runs.record_path(run, stage, shard).unlink(missing_ok=True)
    started = time.time()
    try:
        _execute(stage, executed, {"run": run, **parameters})
    except BaseException as error:
        cause = _cause(error)
        seconds = time.time() - started
        _record_failure(stage, run, parameters, cause=cause, seconds=seconds)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise StudyError(
            f"{stage} failed after {seconds:.0f} s, {cause}\n"
            f"  executed notebook: {executed}\n"
            f"  after mending it:  python -m speed_utils run --run {run}"
        ) from None
    record = runs.read_record(run, stage, shard)
    if record is None or record["status"] != "done":
        raise StudyError(f"{stage} ran to its end but wrote no stage record")
    print(f"  {stage:24s} done in {time.time() - started:.0f} s", flush=True)
    return True


def _execute(stage: str, executed: Path, parameters: dict[str, object]) -> None:
    import papermill
    from papermill.engines import NBClientEngine, papermill_engines
    from traitlets.config import Config

    class StudyEngine(NBClientEngine):
        """papermill's own engine, announcing each cell on the terminal."""

        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
            _announce_cells(nb_man, stage)
            return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)

    papermill_engines.register("study", StudyEngine)
    environment = {k: v for k, v in KERNEL_ENVIRONMENT.items() if k not in os.environ}
    path = os.pathsep.join(p for p in (str(ROOT_DIR), os.environ.get("PYTHONPATH")) if p)
    with _environment({**environment, "PYTHONPATH": path}):
        papermill.execute_notebook(
            NOTEBOOKS_DIR / f"{stage}.ipynb",
            executed,
            parameters=parameters,
            engine_name="study",
            kernel_name="python3",
            cwd=str(NOTEBOOKS_DIR),
            progress_bar=False,
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's own notices
            stderr_file=sys.stderr,  # progress bars of training and generation
            autosave_cell_every=SAVE_EVERY_SECONDS,
            # After Ctrl-C a kernel may wait for answers that are paid for.
            config=Config({"KernelManager": {"shutdown_wait_time": 2 * INTERRUPT_SECONDS}}),
        )


def _announce_cells(nb_man, stage: str) -> None:
    code_cells = [i for i, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
    started = time.time()
    cell_start = nb_man.cell_start

    def announce(cell, cell_index=None, **kwargs):
        if cell_index in code_cells:
            position = code_cells.index(cell_index) + 1
            elapsed = time.time() - started
            print(f"    {stage} cell {position}/{len(code_cells)} at {elapsed:.0f} s", flush=True)
        return cell_start(cell, cell_index, **kwargs)

    nb_man.cell_start = announce


def _cause(error: BaseException) -> str:
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        first_line = (error.evalue or "").strip().splitlines() or [""]
        return f"code cell {error.exec_count}: {error.ename}: {first_line[0]}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {error}"


def _record_failure(
    stage: str, run: str, parameters: dict[str, object], *, cause: str, seconds: float
) -> None:
    opened = runs.Stage(stage, run, parameters)
    record = opened.record("failed", {}, error=cause)
    path = runs.record_path(run, stage, opened.shard)
    runs.write_json(path, {**record, "seconds": round(seconds, 1)})


@contextmanager
def _locked(folder: Path, shard: Shard | None = None) -> Iterator[None]:
    """Shards run side by side, each once; a run as a whole has the folder to itself."""
    with ExitStack() as stack:
        files = [(".lock", fcntl.LOCK_SH if shard else fcntl.LOCK_EX)]
        if shard is not None:
            files.append((f".lock-{shard.name}", fcntl.LOCK_EX))
        for name, kind in files:
            file = stack.enter_context((folder / name).open("a+"))
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise runs.RunError(
                    f"run {folder.name!r} is being executed by process {file.read().strip()}; "
                    "wait for it, or use --run with another name"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
