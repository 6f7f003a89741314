"""A run as something to hand on: executed notebooks as HTML, figures, stage records, scores.

Reads a run folder, writes a folder that needs neither Jupyter nor this package to be read.

    export_run("laptop", Path("outputs/reference"))

Paper: not stated; ours, so that a reader can compare a run with the one that the README reports.
"""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

from speed_utils import runs
from speed_utils.settings import ROOT_DIR, stage_names

SMALL_ARTIFACTS = {"12_evaluate_mteb": ("scores.json", "mteb_scores.json")}


def export_run(run: str, folder: Path) -> list[Path]:
    """Write notebooks/*.html, figures/*.png, stages/*.json, manifest.json and the scores.

    Args:
        run: name of the run; stages that it does not have are left out.
        folder: where to write; folders of an earlier export in it are replaced.

    Returns:
        The files written.

    Raises:
        RunError: no such run, or nothing executed in it yet.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    source = runs.run_dir(run)
    executed = [
        path
        for stage in stage_names()
        if (path := source / "notebooks" / f"{stage}.ipynb").is_file()
    ]
    if not executed:
        raise runs.RunError(
            f"run {run!r} has no executed notebook; make one with: "
            f"python -m speed_utils run --run {run}"
        )
    for name in ("notebooks", "figures", "stages"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    exporter = HTMLExporter(template_name="basic", preprocessors=[CoalesceStreamsPreprocessor])
    written = []
    for path in executed:
        notebook = nbformat.read(path, as_version=4)
        body, _ = exporter.from_notebook_node(notebook)
        body = body.replace(f"{ROOT_DIR}/", "")  # warnings name files of the machine
        written.append(folder / "notebooks" / f"{path.stem}.html")
        written[-1].write_text(_page(path.stem, body), encoding="utf8")
        for number, png in enumerate(_figures(notebook), 1):
            written.append(folder / "figures" / f"{path.stem}_{number}.png")
            written[-1].write_bytes(png)
        record = runs.record_path(run, path.stem)
        if record.is_file():
            written.append(Path(shutil.copy(record, folder / "stages" / record.name)))
        for name in SMALL_ARTIFACTS.get(path.stem, ()):
            artifact = source / "artifacts" / path.stem / name
            if artifact.is_file():
                written.append(Path(shutil.copy(artifact, folder / name)))
    written.append(Path(shutil.copy(source / "manifest.json", folder / "manifest.json")))
    return written


def _figures(notebook: object) -> list[bytes]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    return [base64.b64decode(image) for image in images]


def _page(title: str, body: str) -> str:
    style = (
        "body{max-width:60rem;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif}"
        "pre{overflow-x:auto;background:#f6f6f6;padding:.6rem;font-size:13px;white-space:pre-wrap}"
        "table{border-collapse:collapse;font-size:14px}td,th{padding:.2rem .6rem;text-align:left}"
        "img{max-width:100%}.jp-InputPrompt,.jp-OutputPrompt,.prompt{display:none}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head><body>{body}</body></html>\n"
    )
