"""An exported run can be read without Jupyter, and says when there is nothing to export."""

import base64
import json

import nbformat
import pytest

from speed_utils import runs
from speed_utils.export import export_run
from speed_utils.settings import ROOT_DIR

PNG = base64.b64encode(b"\x89PNG not really").decode()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_OUTPUTS", str(tmp_path / "outputs"))
    folder = tmp_path / "outputs" / "runs" / "mine"
    runs.write_json(folder / "manifest.json", {"profile": "smoke"})
    runs.write_json(folder / "stages" / "12_evaluate_mteb.json", {"status": "done"})
    runs.write_json(folder / "artifacts" / "12_evaluate_mteb" / "scores.json", [{"task": "STS"}])
    shown = f"<script>alert(1)</script> {ROOT_DIR}/speed_utils/sft.py:1: a warning"
    text = nbformat.v4.new_output("display_data", {"text/plain": shown})
    image = nbformat.v4.new_output("display_data", {"image/png": PNG})
    cell = nbformat.v4.new_code_cell("plot()", outputs=[text, image])
    (folder / "notebooks").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, folder / "notebooks" / "12_evaluate_mteb.ipynb")
    return "mine"


def test_notebooks_figures_records_and_scores_are_written(run, tmp_path):
    (tmp_path / "out" / "figures").mkdir(parents=True)
    (tmp_path / "out" / "figures" / "old.png").write_bytes(b"of an earlier export")
    written = export_run(run, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert names == {
        "notebooks/12_evaluate_mteb.html",
        "figures/12_evaluate_mteb_1.png",
        "stages/12_evaluate_mteb.json",
        "scores.json",
        "manifest.json",
    }
    assert not (tmp_path / "out" / "figures" / "old.png").exists()
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == [{"task": "STS"}]
    page = (tmp_path / "out" / "notebooks" / "12_evaluate_mteb.html").read_text()
    assert PNG in page and "<script>alert" not in page
    assert str(ROOT_DIR) not in page and "speed_utils/sft.py:1: a warning" in page


def test_a_run_without_notebooks_is_refused_with_a_command(run, tmp_path):
    with pytest.raises(runs.RunError, match="python -m speed_utils run --run other"):
        export_run("other", tmp_path / "out")
