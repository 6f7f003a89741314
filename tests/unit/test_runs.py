import json

import pytest

from speed_utils import runs
from speed_utils.runs import RunError, is_current, open_stage, read_record
from speed_utils.settings import load_profile

PARAMETERS = {"price_model": "gpt-4o-2024-05-13"}


def finished(run="r", content="x"):
    source = runs.run_dir(run) / "artifacts" / "10_deduplicate" / "dataset.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(content)
    stage = open_stage("15_cost", run=run, **PARAMETERS)
    stage.input("10_deduplicate", "dataset.jsonl")
    runs.write_json(stage.output("cost.json"), {"a": 1})
    return stage.finish(n=3)


def test_a_record_holds_what_the_runner_and_a_reader_need(outputs):
    record = finished()
    assert record == read_record("r", "15_cost")
    assert record["status"] == "done" and record["metrics"] == {"n": 3}
    assert record["parameters"] == PARAMETERS
    assert record["inputs"][0]["rows"] == 1 and len(record["inputs"][0]["sha256"]) == 64
    teacher = record["teacher"]
    assert teacher.pop("models") == {}
    assert set(teacher) >= {"calls", "cached", "prompt_tokens", "completion_tokens", "usd"}
    assert not any(teacher.values())
    assert record["seconds"] >= 0 and record["peak_memory_gib"] > 0
    assert "python" in record["versions"]


def test_a_finished_stage_is_current_until_something_changes(outputs):
    finished()
    assert is_current("r", "15_cost", PARAMETERS) == (True, "")
    assert is_current("r", "15_cost", {"price_model": "x"})[1] == "parameters changed: price_model"
    artifacts = runs.run_dir("r") / "artifacts"
    (artifacts / "10_deduplicate" / "dataset.jsonl").write_text("changed")
    assert "input changed" in is_current("r", "15_cost", PARAMETERS)[1]
    finished()
    (artifacts / "15_cost" / "cost.json").unlink()
    assert "output missing" in is_current("r", "15_cost", PARAMETERS)[1]


def test_changed_code_makes_a_stage_run_again(outputs, monkeypatch):
    finished()
    monkeypatch.setattr(runs, "code_fingerprint", lambda stage: "other")
    assert is_current("r", "15_cost", PARAMETERS) == (False, "code changed")


def test_the_code_of_a_stage_includes_what_its_modules_import(outputs):
    source = "from speed_utils.synthesis import read_examples\nimport speed_utils.dedup"
    assert runs._imported_modules(source) == {"synthesis", "dedup"}
    assert runs.code_fingerprint("09_synthesize") != runs.code_fingerprint("10_deduplicate")


def test_a_missing_input_names_the_command_that_makes_it(outputs):
    stage = open_stage("15_cost", run="r", **PARAMETERS)
    with pytest.raises(RunError, match="run --run r --to 10_deduplicate"):
        stage.input("10_deduplicate", "dataset.jsonl")


def test_an_output_that_was_promised_and_not_written_is_an_error(outputs):
    stage = open_stage("15_cost", run="r", **PARAMETERS)
    stage.output("cost.json")
    with pytest.raises(RunError, match="did not write"):
        stage.finish()


def test_metrics_must_be_numbers_and_parameters_as_declared(outputs):
    with pytest.raises(RunError, match="declares"):
        open_stage("15_cost", run="r", price="x")
    with pytest.raises(RunError, match="must be a number"):
        open_stage("15_cost", run="r", **PARAMETERS).finish(name="text")
    with pytest.raises(RunError, match="run name"):
        open_stage("15_cost", run="../escape", **PARAMETERS)


def test_a_reader_with_other_parameters_works_in_a_scratch_run(outputs, capsys):
    finished()
    runs.write_json(
        runs.run_dir("r") / "manifest.json",
        runs.manifest("laptop", load_profile("laptop").stages),
    )
    same = open_stage("15_cost", run="", **PARAMETERS)
    assert same.run == "r"
    other = open_stage("15_cost", run="", price_model="gpt-4o-mini-2024-07-18")
    assert other.run == "scratch" and "scratch" in capsys.readouterr().out
    assert other.input("10_deduplicate", "dataset.jsonl").read_text() == "x"
    runs.write_json(other.output("cost.json"), {"b": 2})
    other.finish()
    assert is_current("r", "15_cost", PARAMETERS) == (True, "")


def test_a_record_is_never_half_written(outputs):
    finished()
    folder = runs.run_dir("r") / "stages"
    assert [path.name for path in folder.iterdir()] == ["15_cost.json"]
    (folder / "15_cost.json").write_text('{"stage": ')
    assert read_record("r", "15_cost") is None
    assert is_current("r", "15_cost", PARAMETERS) == (False, "not run yet")
    assert json.dumps(finished())
