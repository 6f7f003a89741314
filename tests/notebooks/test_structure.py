"""The rules that every notebook keeps, read from the stored JSON."""

import ast
import json
import re

import papermill
import pytest

from speed_utils.settings import NOTEBOOKS_DIR, notebook_parameters, stage_names

STAGES = stage_names()


def cells_of(stage):
    return json.loads((NOTEBOOKS_DIR / f"{stage}.ipynb").read_text(encoding="utf8"))["cells"]


def sources(stage, kind):
    return ["".join(c["source"]) for c in cells_of(stage) if c["cell_type"] == kind]


def test_the_stages_of_the_plan_are_there():
    assert STAGES == [
        "00_overview",
        "01_sample_topics",
        "02_brainstorm_tasks",
        "03_write_seed_data",
        "04_train_junior",
        "05_build_preferences",
        "06_train_senior",
        "07_write_revisions",
        "08_train_revisor",
        "09_synthesize",
        "10_deduplicate",
        "11_train_embedder",
        "12_evaluate_mteb",
        "15_cost",
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_stored_without_outputs(stage):
    for cell in cells_of(stage):
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert "papermill" not in cell["metadata"]


@pytest.mark.parametrize("stage", STAGES)
def test_it_opens_with_what_it_reads_and_costs(stage):
    head = sources(stage, "markdown")[0]
    assert head.startswith(f"# {stage[:2]} · ")
    for row in ("Reads", "Writes", "Paper", "Time, hardware", "Teacher cost"):
        assert f"| **{row}** |" in head


@pytest.mark.parametrize("stage", STAGES)
def test_its_parameters_are_few_typed_and_explained(stage):
    parameters = notebook_parameters(stage)
    assert 2 <= len(parameters) <= 11 and "run" in parameters
    for parameter in parameters.values():
        assert len(parameter.help) > 5, parameter.name
        assert not re.search("key|secret|token$|password", parameter.name)
    inspected = papermill.inspect_notebook(str(NOTEBOOKS_DIR / f"{stage}.ipynb"))
    assert set(inspected) == set(parameters), "papermill does not see every parameter"


@pytest.mark.parametrize("stage", STAGES)
def test_its_code_calls_and_shows_and_defines_nothing(stage):
    n_import_cells = 0
    for source in sources(stage, "code"):
        assert not re.search(r"^\s*[!%]", source, flags=re.MULTILINE), "shell command or magic"
        tree = ast.parse(source)
        banned = (ast.FunctionDef, ast.ClassDef, ast.Try, ast.AsyncFunctionDef)
        assert not any(isinstance(node, banned) for node in ast.walk(tree))
        n_import_cells += any(isinstance(n, ast.Import | ast.ImportFrom) for n in tree.body)
        if not any(isinstance(n, ast.Import | ast.ImportFrom) for n in tree.body):
            assert len([line for line in source.splitlines() if line.strip()]) <= 25
    assert n_import_cells == 1


@pytest.mark.parametrize("stage", STAGES)
def test_it_ends_with_a_check_a_record_and_what_to_expect(stage):
    code, prose = "\n".join(sources(stage, "code")), "\n".join(sources(stage, "markdown"))
    assert "assert " in code and "stage.finish(" in code and "open_stage(" in code
    for heading in (
        "## What you should see",
        "## Where this differs from the paper",
        "## Exercises",
    ):
        assert heading in prose
    assert 20 <= len(cells_of(stage)) <= 40
    n_markdown = len(sources(stage, "markdown"))
    assert 0.4 <= n_markdown / len(cells_of(stage)) <= 0.7


@pytest.mark.parametrize("stage", STAGES)
def test_links_between_notebooks_exist(stage):
    for target in re.findall(r"\]\(([^)]+\.ipynb)\)", "\n".join(sources(stage, "markdown"))):
        assert (NOTEBOOKS_DIR / target).is_file()
