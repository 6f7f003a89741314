"""Profiles: a whole run in one YAML file, checked against what the notebooks declare.

``data/profiles/common.yaml`` holds every value; smoke, laptop, gpu and paper override some of it.
A key that no notebook declares, or a value of another type, is refused with the nearest valid name.

    profile = load_profile("laptop", overrides=["04_train_junior.epochs=2"])
    profile.stages["04_train_junior"]["epochs"]

Paper: the values of paper.yaml carry their section.
"""

from __future__ import annotations

import ast
import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT_DIR = Path(__file__).parent.parent
NOTEBOOKS_DIR = ROOT_DIR / "notebooks"
PROFILES_DIR = ROOT_DIR / "data" / "profiles"
RUN_PARAMETER = "run"  # every notebook declares it; the runner sets it
BUDGET_SECTION = "teacher"  # of a profile: limits for the whole run, no stage's parameters
BUDGET_TYPES = {"budget_usd": "float", "budget_calls": "int"}


class SettingsError(ValueError):
    """A profile, a parameter or a stage name is not valid; the message names the nearest one."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: ``name: type = default  # help``."""

    name: str
    type: str
    default: object
    help: str


@dataclass(frozen=True)
class Profile:
    """A resolved profile: parameters by stage, complete and type-checked."""

    name: str
    about: str
    stages: dict[str, dict[str, object]]
    budget: dict[str, float]  # of the teacher: budget_usd, budget_calls; 0 for no limit


def stage_names() -> list[str]:
    """The stages in order: the stems of the numbered notebooks."""
    return sorted(path.stem for path in NOTEBOOKS_DIR.glob("[0-9][0-9]_*.ipynb"))


def find_stage(name: str) -> str:
    """The full stage name for a name, a number ("4", "04") or the part after the number.

    Raises:
        SettingsError: no such stage; names the nearest.
    """
    names = stage_names()
    for stage in names:
        number, _, rest = stage.partition("_")
        if name in (stage, number, rest, number.lstrip("0") or "0"):
            return stage
    raise SettingsError(f"unknown stage {name!r}{_nearest(name, names)}")


@cache
def notebook_parameters(stage: str) -> dict[str, Parameter]:
    """The parameters that a stage's notebook declares, in order.

    Raises:
        SettingsError: no notebook, no parameters cell, or a line that is no typed literal.
    """
    path = NOTEBOOKS_DIR / f"{stage}.ipynb"
    if not path.is_file():
        raise SettingsError(f"unknown stage {stage!r}{_nearest(stage, stage_names())}")
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise SettingsError(f"{path.name} needs one cell tagged 'parameters', has {len(tagged)}")
    source = "".join(tagged[0]["source"])
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            raise SettingsError(f"{path.name}: parameters are written `name: type = literal`")
        comment = lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip("# ")
        found[node.target.id] = Parameter(
            node.target.id, ast.unparse(node.annotation), ast.literal_eval(node.value), comment
        )
    return found


def load_profile(
    name_or_path: str | Path = "laptop", overrides: list[str] | None = None
) -> Profile:
    """Read a profile over common.yaml, apply ``stage.key=value`` overrides, check everything.

    Raises:
        SettingsError: no such profile, unknown stage or key, or a value of the wrong type.
    """
    path = _profile_path(name_or_path)
    merged = _read_yaml(PROFILES_DIR / "common.yaml")
    own = _read_yaml(path) if path.name != "common.yaml" else {}
    about = str(own.pop("about", merged.pop("about", "")))
    merged.pop("about", None)
    _merge(merged, own, path.name)
    for text in overrides or []:
        target, equals, value = text.partition("=")
        stage, dot, key = target.strip().partition(".")
        if not equals or not dot:
            raise SettingsError(f"-p {text!r}: write stage.key=value, as 04_train_junior.epochs=2")
        stage = stage if stage in ("shared", BUDGET_SECTION) else find_stage(stage)
        _merge(merged, {stage: {key: yaml.safe_load(value)}}, f"-p {text}")
    budget = _budget(merged.pop(BUDGET_SECTION, {}))
    return Profile(path.stem, about, _resolve(merged), budget)


def coerce(value: object, type_name: str, where: str) -> object:
    """The value as the declared type; int for float and numeric text for numbers are accepted.

    Raises:
        SettingsError: the value is of another type.
    """
    options = [option.strip() for option in type_name.split("|")]
    if value is None and "None" in options:
        return None
    if isinstance(value, str) and value.lower() == "none" and "None" in options:
        return None
    for option in options:
        if option == "float" and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
        if option == "int" and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option == "bool" and isinstance(value, bool):
            return value
        if option == "str" and isinstance(value, str):
            return value
        if option.startswith("list") and isinstance(value, list):
            return value
    raise SettingsError(f"{where}: {value!r} is not {type_name}")


def _budget(given: dict) -> dict[str, float]:
    for key in given:
        if key not in BUDGET_TYPES:
            raise SettingsError(f"{BUDGET_SECTION} has no {key!r}{_nearest(key, BUDGET_TYPES)}")
    where = f"{BUDGET_SECTION}."
    return {k: coerce(given.get(k, 0), kind, where + k) for k, kind in BUDGET_TYPES.items()}


def _resolve(merged: dict) -> dict[str, dict[str, object]]:
    shared = merged.pop("shared", {})
    declared_anywhere: set[str] = set()
    resolved = {}
    for stage in stage_names():
        parameters = notebook_parameters(stage)
        declared_anywhere |= set(parameters)
        given = merged.pop(stage, {})
        for key in given:
            if key not in parameters or key == RUN_PARAMETER:
                valid = [name for name in parameters if name != RUN_PARAMETER]
                raise SettingsError(f"{stage} has no parameter {key!r}{_nearest(key, valid)}")
        values = {}
        for name, parameter in parameters.items():
            if name == RUN_PARAMETER:
                continue
            value = given.get(name, shared.get(name, parameter.default))
            values[name] = coerce(value, parameter.type, f"{stage}.{name}")
        resolved[stage] = values
    if merged:
        stage = next(iter(merged))
        raise SettingsError(f"unknown stage {stage!r}{_nearest(stage, stage_names())}")
    for key in shared:
        if key not in declared_anywhere:
            raise SettingsError(
                f"shared.{key}: no notebook declares it{_nearest(key, declared_anywhere)}"
            )
    return resolved


def _profile_path(name: str | Path) -> Path:
    for path in (PROFILES_DIR / f"{name}.yaml", Path(name)):
        if path.is_file() and path.suffix in (".yaml", ".yml"):
            return path
    known = sorted(p.stem for p in PROFILES_DIR.glob("*.yaml") if p.stem != "common")
    raise SettingsError(f"no profile {str(name)!r}{_nearest(str(name), known)} (or a .yaml file)")


def _read_yaml(path: Path) -> dict:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf8")) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise SettingsError(f"{path} must map stages to parameters")
    return value


def _merge(base: dict, over: dict, where: str) -> None:
    for stage, values in over.items():
        if not isinstance(values, dict):
            raise SettingsError(f"{where}: {stage} must hold key: value pairs")
        base.setdefault(stage, {})
        base[stage] = {**base[stage], **values}


def _nearest(name: str, valid: object) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(valid))}"
