"""What a profile will ask, cost, compute and write, before anything is spent.

    for row in plan_rows(load_profile("paper")): ...

Tokens follow from the prompts themselves: a sample of each kind is drawn and rendered, and answers
are as long as their slots ask. Hours follow from measured throughput: the effective FLOP/s of the
reference run's own stages, or a figure of yours.

Paper: Table 5 and Section 4.5 (45,000 calls, 32 million tokens, brainstorming not counted).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from speed_utils.ledger import load_price
from speed_utils.prompts import (
    brainstorm_prompt,
    evaluation_prompt,
    judge_prompt,
    messages,
    prompt_of,
    sample_slots,
    words_bound,
)
from speed_utils.records import Prompted
from speed_utils.settings import ROOT_DIR, Profile
from speed_utils.teacher import BRAINSTORMED_KINDS, kind_counts, teacher_model

REFERENCE_DIR = ROOT_DIR / "outputs" / "reference"
SAMPLES = 400  # prompts rendered to estimate tokens
CHARS_PER_TOKEN = 4.4  # of English
TOKENS_PER_WORD = 1.35
TASK_WORDS = 22  # of a brainstormed task, about five tasks an answer
REASON_WORDS = 60  # of a judgement or an evaluation
SHORT_FIELD_WORDS = 8  # a query or a label
SENTENCE_WORDS = 15  # STS, short matching, and what no slot bounds
BYTES_PER_STORED_TOKEN = 6  # text, its prompt's share and the JSON around it


class PlanError(ValueError):
    """A plan cannot be made."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: calls and tokens of the teacher, tokens of the own models, and what they take.

    Attributes:
        stage: its name.
        teacher_calls, teacher_tokens: prompt and completion tokens together.
        usd: at list price; None when the model's price is not known, 0 for the recorded teacher.
        model_tokens: that the study's own models read and write.
        hours: of compute for model_tokens; None without a measured throughput.
        disk_gib: of stores and records.
    """

    stage: str
    teacher_calls: int
    teacher_tokens: int
    usd: float | None
    model_tokens: int
    hours: float | None
    disk_gib: float


def plan_rows(profile: Profile, flops: dict[str, float] | None = None) -> list[StagePlan]:
    """One row per stage that asks, generates or trains, and a last one for the sum.

    Args:
        profile: what would be run.
        flops: effective FLOP/s by kind of work (generate, train); see measured_flops.

    Raises:
        PlanError: the size of a model does not follow from its name.
    """
    stages = profile.stages
    generator = model_parameters(stages["09_synthesize"]["generator_model"])
    sizes_of = dict.fromkeys(stages, generator)
    sizes_of["11_train_embedder"] = model_parameters(stages["11_train_embedder"]["embedder_model"])
    rows = []

    def add(stage: str, calls: int, prompt: float, answer: float, work: str, tokens: float) -> None:
        teacher = str(stages[stage].get("teacher", ""))
        usd = _usd(teacher, calls, prompt, answer)
        n_flops = tokens * sizes_of[stage] * (6 if work == "train" else 2) if tokens else 0.0
        hours = n_flops / flops[work] / 3600 if flops and tokens else None if tokens else 0.0
        written = calls * (prompt + answer) + tokens
        disk = written * BYTES_PER_STORED_TOKEN / 2**30
        n_teacher = round(calls * (prompt + answer))
        rows.append(StagePlan(stage, calls, n_teacher, usd, round(tokens), hours, disk))

    n_topics = stages["01_sample_topics"]["n_topics"]
    prompt = fmean(_tokens(brainstorm_prompt(k, "Arts/Movies/Titles")) for k in BRAINSTORMED_KINDS)
    n_calls = n_topics * len(BRAINSTORMED_KINDS)
    add("02_brainstorm_tasks", n_calls, prompt, 5 * TASK_WORDS * TOKENS_PER_WORD, "generate", 0)

    seed = stages["03_write_seed_data"]
    sizes = _sizes(seed["document_words_max"])
    add("03_write_seed_data", seed["n_examples"], sizes.prompt, sizes.answer, "generate", 0)
    n_seed = seed["n_examples"]
    add(
        "04_train_junior",
        0,
        0,
        0,
        "train",
        n_seed * sizes.both * stages["04_train_junior"]["epochs"],
    )

    lists = stages["05_build_preferences"]
    sizes = _sizes(lists["document_words_max"])
    n_texts = lists["n_candidates"]
    judged = _tokens(judge_prompt("", [])) + sizes.prompt + n_texts * sizes.answer
    generated = lists["n_lists"] * n_texts * sizes.both
    judgement = REASON_WORDS * TOKENS_PER_WORD
    add("05_build_preferences", lists["n_lists"], judged, judgement, "generate", generated)
    # Two texts a pair, each through the policy and through the frozen reference (a third of the
    # policy's cost): 2 x 4/3.
    pairs = lists["n_lists"] * sizes.both * stages["06_train_senior"]["epochs"] * 8 / 3
    add("06_train_senior", 0, 0, 0, "train", pairs)

    n_revisions = stages["07_write_revisions"]["n_revisions"]
    evaluated = _tokens(evaluation_prompt("", "")) + sizes.both
    answer = judgement + sizes.answer
    add("07_write_revisions", n_revisions, evaluated, answer, "generate", 0)
    revised = n_revisions * (sizes.both + sizes.answer) * stages["08_train_revisor"]["epochs"]
    add("08_train_revisor", 0, 0, 0, "train", revised)

    synthesis = stages["09_synthesize"]
    sizes = _sizes(synthesis["document_words_max"])
    n_tokens = synthesis["n_examples"] * (2 * sizes.both + sizes.answer)  # senior, then revisor
    add("09_synthesize", 0, 0, 0, "generate", n_tokens)
    # The cached loss encodes once more than a plain one: 4/3.
    encoded = synthesis["n_examples"] * sizes.answer * stages["11_train_embedder"]["epochs"] * 4 / 3
    add("11_train_embedder", 0, 0, 0, "train", encoded)
    return [*rows, _sum(rows)]


def model_parameters(name: str) -> float:
    """The number of parameters that a model's name states, as 8e9 for "Meta-Llama-3-8B".

    Raises:
        PlanError: the name states none.
    """
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([MB])(?![a-z])", name, re.IGNORECASE)
    if not found:
        raise PlanError(f"the name {name!r} does not say how many parameters the model has")
    number, unit = found[-1]
    return float(number) * (1e9 if unit.upper() == "B" else 1e6)


def measured_flops(folder: Path = REFERENCE_DIR) -> dict[str, float] | None:
    """Effective FLOP/s of a finished run's generation and training; None when there is none.

    Args:
        folder: a run's folder or an exported one, with its stages.
    """
    try:
        records = [
            json.loads((folder / "stages" / f"{stage}.json").read_text(encoding="utf8"))
            for stage in ("09_synthesize", "04_train_junior")
        ]
    except (OSError, ValueError):
        return None
    if any(record["status"] != "done" for record in records):
        return None
    synthesis, junior = records[0]["metrics"], records[1]
    parameters = model_parameters(junior["parameters"]["generator_model"])
    sizes = _sizes(junior["parameters"].get("document_words_max", 50))
    seconds = synthesis["senior_seconds"] + synthesis["revisor_seconds"]
    n_generated = synthesis["completion_tokens"] * (2 * sizes.both + sizes.answer)
    generate = 2 * parameters * n_generated / (2 * sizes.answer) / seconds
    trained = junior["metrics"]["n_rows"] * junior["parameters"]["epochs"] * sizes.both
    train = 6 * parameters * trained / junior["metrics"]["train_seconds"]
    return {"generate": generate, "train": train}


def print_plan(rows: list[StagePlan], write: Callable[[str], object] = print) -> None:
    """The rows as a table."""
    write(
        f"{'stage':24s}{'calls':>11s}{'teacher tokens':>17s}{'US$':>11s}{'model tokens':>17s}"
        f"{'hours':>11s}{'GiB':>8s}"
    )
    for row in rows:
        usd = "unknown" if row.usd is None else f"{row.usd:,.2f}"
        hours = "unknown" if row.hours is None else f"{row.hours:,.1f}"
        write(
            f"{row.stage:24s}{row.teacher_calls:11,d}{row.teacher_tokens:17,d}{usd:>11s}"
            f"{row.model_tokens:17,d}{hours:>11s}{row.disk_gib:8.2f}"
        )


@dataclass(frozen=True)
class _Sizes:
    """Mean tokens of a data prompt and of its answer."""

    prompt: float
    answer: float

    @property
    def both(self) -> float:
        return self.prompt + self.answer


def _sizes(document_words_max: int | None) -> _Sizes:
    prompts, answers = [], []
    for kind, count in kind_counts(SAMPLES).items():
        for i in range(count):
            slots = sample_slots(kind, f"plan|{i}", document_words_max or None)
            task = "x" * round(TASK_WORDS * TOKENS_PER_WORD * CHARS_PER_TOKEN)
            prompted = Prompted(id=str(i), kind=kind, topic="A/B/C", task=task, slots=slots)
            prompts.append(_tokens(prompt_of(prompted)))
            answers.append(_answer_words(kind, slots) * TOKENS_PER_WORD + 12)  # 12: keys, quotes
    return _Sizes(fmean(prompts), fmean(answers))


def _answer_words(kind: str, slots: dict) -> int:
    least, most = words_bound(slots.get("num_words"))
    asked = least if most is None else (least + most) // 2
    if kind == "retrieval":
        return SHORT_FIELD_WORDS + 2 * asked
    if kind == "classification":
        return asked + SHORT_FIELD_WORDS
    if kind == "matching_long":
        return 2 * asked
    return (3 if kind == "sts" else 2) * SENTENCE_WORDS


def _tokens(prompt: str) -> float:
    return sum(len(message["content"]) for message in messages(prompt)) / CHARS_PER_TOKEN


def _usd(teacher: str, calls: int, prompt: float, answer: float) -> float | None:
    model = teacher_model(teacher) if teacher else None
    if not calls or model is None:
        return 0.0
    price = load_price(model)
    if price is None:
        return None
    discount = price.batch_discount if teacher.startswith("openai-batch") else 0.0
    return calls * price.usd(prompt, answer) * (1 - discount)


def _sum(rows: list[StagePlan]) -> StagePlan:
    columns = {name: [asdict(row)[name] for row in rows] for name in asdict(rows[0])}
    columns.pop("stage")
    totals = {k: None if None in values else sum(values) for k, values in columns.items()}
    return StagePlan(stage="sum", **totals)
