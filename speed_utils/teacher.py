"""The teacher: any OpenAI-compatible endpoint, or signals recorded in data/teacher.

A recorded teacher answers what was recorded, so the stages take from it the prompts that it can
answer; a live teacher answers whatever is sampled. Both are engines, so that their answers go
through the same store and the same parsing.

    teacher = open_teacher("recorded")
    wanted = seed_prompts(tasks, n_examples=150, seed=42, teacher="recorded")
    answers = generate(seed_requests(wanted), teacher, store_path)

Paper: Sections 3.2.1-3.2.4, Appendix B (temperature 1.0; 0.0 for judging), Section 4.5 (cost).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from speed_utils.engines import Completion, Engine, EngineError, Request, request_seed
from speed_utils.ledger import run_budget
from speed_utils.parsing import (
    ParseError,
    parse_example,
    parse_preference,
    parse_revision,
    parse_tasks,
    prompt_fields,
    unusable,
)
from speed_utils.prompts import (
    JUDGE_SCHEMA,
    REVISION_SCHEMA,
    answer_schema,
    brainstorm_prompt,
    evaluation_prompt,
    judge_prompt,
    messages,
    prompt_of,
    sample_slots,
    words_bound,
)
from speed_utils.records import (
    KIND_WEIGHTS,
    KINDS,
    STS_TASK,
    Candidates,
    Example,
    Preference,
    Prompted,
    Rejection,
    Revision,
    Task,
    Topic,
    example_text,
    record_id,
)
from speed_utils.settings import ROOT_DIR
from speed_utils.shards import current_shard

TEACHER_DIR = ROOT_DIR / "data" / "teacher"
BRAINSTORMED_KINDS = tuple(kind for kind in KINDS if kind != "sts")
ANSWER_TOKENS_MAX = 2048  # of a teacher's answer; the longest prompts ask for two 500-word texts
CHARS_PER_TOKEN = 4.4  # English in GPT-4o's vocabulary, to estimate the tokens of recorded answers


def open_teacher(teacher: str, run_dir: Path | None = None) -> Engine:
    """The teacher as an engine.

    Args:
        teacher: "recorded", "openai:MODEL" or "openai:MODEL@BASE_URL" for any OpenAI-compatible
            server, "openai-batch:..." for its Batch API. The key comes from the environment
            (OPENAI_API_KEY) alone.
        run_dir: the run that pays; what it has paid so far counts against the budget that the
            profile sets (teacher.budget_usd, teacher.budget_calls). None for no budget.

    Raises:
        EngineError: another text, or no key in the environment.
    """
    if teacher == "recorded":
        return RecordedTeacher()
    kind, _, rest = teacher.partition(":")
    model, _, base_url = rest.partition("@")
    if kind not in ("openai", "openai-batch") or not model:
        raise EngineError(
            f"unknown teacher {teacher!r}; write recorded, openai:MODEL, openai:MODEL@BASE_URL, "
            "or openai-batch: for half the price within a day"
        )
    budget = run_budget(model, run_dir)
    if kind == "openai":
        from speed_utils.engine_openai import OpenAIEngine

        return OpenAIEngine(model=model, base_url=base_url, budget=budget)
    if run_dir is None:
        raise EngineError("openai-batch needs a run folder, where it notes what it sent")
    from speed_utils.engine_openai_batch import OpenAIBatchEngine

    shard = current_shard()
    part = f"-{shard.name}" if shard else ""
    state_path = run_dir / f"teacher_batches{part}.jsonl"  # of one process each
    return OpenAIBatchEngine(model=model, base_url=base_url, state_path=state_path, budget=budget)


def teacher_model(teacher: str) -> str | None:
    """The model name of a live teacher, or None for the recorded one."""
    return None if teacher == "recorded" else teacher.partition(":")[2].partition("@")[0]


class RecordedTeacher:
    """Answers requests from data/teacher by their id; token counts are estimated from the text."""

    atomic_batches = False

    def __init__(self, folder: Path = TEACHER_DIR):
        self._answers = _recorded_answers(folder)
        digest = record_id(sorted(self._answers.items()))
        self.name = f"recorded|{digest}"

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """All requests at once."""
        return [list(requests)] if requests else []

    def complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Look every request up.

        Raises:
            EngineError: a request that was not recorded.
        """
        for request in batch:
            answer = self._answers.get(request.id)
            if answer is None:
                raise EngineError(
                    f"the recorded teacher has no answer to request {request.id}; use "
                    "teacher=openai:MODEL for prompts of your own"
                )
            n_chars = sum(len(message["content"]) for message in request.messages)
            yield Completion(
                key=request.key(self.name),
                id=request.id,
                text=answer,
                finish_reason="stop",
                prompt_tokens=round(n_chars / CHARS_PER_TOKEN),
                completion_tokens=round(len(answer) / CHARS_PER_TOKEN),
                cached=True,
            )

    def progress(self, _n_done: int, _n_total: int) -> str:
        """Nothing: a recorded answer costs no money."""
        return ""

    def close(self) -> None:
        """Nothing to free."""


def recorded_topics() -> set[str]:
    """The (truncated) topics for which tasks were recorded."""
    return {row["topic"] for row in _rows(TEACHER_DIR / "brainstorm.jsonl")}


def brainstorm_requests(topics: Sequence[Topic], *, temperature: float = 1.0) -> list[Request]:
    """One request per topic and brainstormed kind (Section 3.2.1); STS needs none."""
    return [
        Request(
            id=brainstorm_id(topic.path, kind),
            messages=tuple(messages(brainstorm_prompt(kind, topic.path))),
            max_tokens=ANSWER_TOKENS_MAX,
            temperature=temperature,
        )
        for topic in topics
        for kind in BRAINSTORMED_KINDS
    ]


def brainstorm_id(topic: str, kind: str) -> str:
    """The id of the request for tasks of one topic and kind."""
    return record_id("brainstorm", topic, kind)


def read_brainstorm(
    topics: Sequence[Topic], answers: Sequence[Completion], stage: str
) -> tuple[dict[tuple[str, str], list[str]], list[Rejection]]:
    """The proposed tasks by (topic path, kind), and a rejection for each unreadable answer."""
    proposed, rejections = {}, []
    pairs = [(topic.path, kind) for topic in topics for kind in BRAINSTORMED_KINDS]
    for pair, answer in zip(pairs, answers, strict=True):
        rejection = unusable(answer, answer.id, stage=stage)
        if rejection is not None:
            rejections.append(rejection)
            continue
        try:
            proposed[pair] = parse_tasks(answer.text)
        except ParseError as error:
            rejections.append(
                Rejection(id=answer.id, stage=stage, reason=str(error), raw=answer.text)
            )
    return proposed, rejections


def sts_task(topic: str) -> Task:
    """The fixed STS task of a topic (Section C.1)."""
    return Task(id=record_id("task", topic, "sts"), topic=topic, kind="sts", text=STS_TASK)


def seed_prompts(
    tasks: Sequence[Task],
    *,
    n_examples: int,
    seed: int,
    document_words_max: int | None,
    teacher: str,
) -> list[Prompted]:
    """The data prompts for seed data, 7:7:7:2 over the kinds.

    A live teacher gets sampled prompts; for the recorded one they are taken from its recordings,
    as far as topics and document lengths allow.
    """
    if teacher != "recorded":
        return sample_prompts(
            tasks, n_examples, seed=f"seed|{seed}", document_words_max=document_words_max
        )
    topics = {task.topic for task in tasks}
    rows = [
        row
        for row in _rows(TEACHER_DIR / "seed.jsonl")
        if row["topic"] in topics and _fits(row["slots"], document_words_max)
    ]
    return _take_by_kind([recorded_prompt(row) for row in rows], n_examples, seed)


def sample_prompts(
    tasks: Sequence[Task], n_prompts: int, *, seed: object, document_words_max: int | None
) -> list[Prompted]:
    """Sample data prompts 7:7:7:2 over the kinds, tasks in turn, slots at random.

    Tasks of a kind are used evenly; a task that is used again gets other slots.

    Raises:
        EngineError: a kind has no task.
    """
    prompted = []
    for kind, count in kind_counts(n_prompts).items():
        pool = [task for task in tasks if task.kind == kind]
        if not pool and count:
            raise EngineError(f"no {kind} tasks to write prompts from; check the brainstorming")
        random.Random(f"{kind}|{seed}").shuffle(pool)
        for index in range(count):
            task = pool[index % len(pool)]
            slot_seed = f"{seed}|{task.id}|{index // len(pool)}"
            prompted.append(
                Prompted(
                    id=record_id(slot_seed),
                    kind=task.kind,
                    topic=task.topic,
                    task=task.text,
                    slots=sample_slots(task.kind, slot_seed, document_words_max),
                )
            )
    return prompted


def kind_counts(n_total: int) -> dict[str, int]:
    """Split a number over the kinds in the paper's proportion, largest remainders first."""
    total = sum(KIND_WEIGHTS.values())
    shares = {kind: n_total * weight / total for kind, weight in KIND_WEIGHTS.items()}
    counts = {kind: int(share) for kind, share in shares.items()}
    by_remainder = sorted(shares, key=lambda kind: counts[kind] - shares[kind])
    for kind in by_remainder[: n_total - sum(counts.values())]:
        counts[kind] += 1
    return counts


def seed_requests(prompts: Sequence[Prompted], *, temperature: float = 1.0) -> list[Request]:
    """Ask the teacher to write the examples of these prompts (Section 3.2.2)."""
    return [
        Request(
            id=prompt.id,
            messages=tuple(messages(prompt_of(prompt))),
            max_tokens=ANSWER_TOKENS_MAX,
            temperature=temperature,
            seed=request_seed("seed", prompt.id),
            schema=answer_schema(prompt.kind),
        )
        for prompt in prompts
    ]


def judge_requests(lists: Sequence[Candidates]) -> list[Request]:
    """Ask the teacher for the best and worst of each list, at temperature 0 (Section 3.2.3)."""
    return [
        Request(
            id=judge_id(candidates.id),
            messages=tuple(messages(judge_prompt(prompt_of(candidates), candidates.texts))),
            max_tokens=ANSWER_TOKENS_MAX,
            temperature=0.0,
            schema=JUDGE_SCHEMA,
        )
        for candidates in lists
    ]


def revision_requests(
    roots: Sequence[tuple[Prompted, str]], *, temperature: float = 1.0
) -> list[Request]:
    """Ask the teacher to evaluate and revise root examples (Section 3.2.4)."""
    return [
        Request(
            id=revision_id(prompted.id),
            messages=tuple(messages(evaluation_prompt(prompt_of(prompted), text))),
            max_tokens=ANSWER_TOKENS_MAX,
            temperature=temperature,
            seed=request_seed("revise", prompted.id),
            schema=REVISION_SCHEMA,
        )
        for prompted, text in roots
    ]


def judge_id(candidates_id: str) -> str:
    """The id of the request that judges a candidate list."""
    return record_id("judge", candidates_id)


def revision_id(root_id: str) -> str:
    """The id of the request that revises a root example."""
    return record_id("revise", root_id)


def read_preferences(
    lists: Sequence[Candidates], answers: Sequence[Completion], stage: str
) -> tuple[list[Preference], list[Rejection]]:
    """Judgements as preferences; unreadable, undecided or equal ones as rejections."""
    preferences, rejections = [], []
    for candidates, answer in zip(lists, answers, strict=True):
        parsed = unusable(answer, candidates.id, stage=stage) or parse_preference(
            answer.text, candidates, stage=stage
        )
        (preferences if isinstance(parsed, Preference) else rejections).append(parsed)
    return preferences, rejections


def read_revisions(
    roots: Sequence[tuple[Prompted, str]], answers: Sequence[Completion], stage: str
) -> tuple[list[Revision], list[Rejection]]:
    """Evaluations as revisions; unreadable or invalid ones as rejections."""
    revisions, rejections = [], []
    for (prompted, root), answer in zip(roots, answers, strict=True):
        parsed = unusable(answer, prompted.id, stage=stage) or parse_revision(
            answer.text, prompted, root, stage=stage
        )
        (revisions if isinstance(parsed, Revision) else rejections).append(parsed)
    return revisions, rejections


def recorded_candidates(n_lists: int, document_words_max: int | None) -> list[Candidates]:
    """The candidate lists that the recorded teacher judged; written by a junior of this study.

    Those whose prompts ask for more words than ``document_words_max`` are left out (None: none).
    """
    rows = _mixed_rows(TEACHER_DIR / "preferences.jsonl", document_words_max)[:n_lists]
    return [Candidates(**prompt_fields(recorded_prompt(row)), texts=row["texts"]) for row in rows]


def recorded_roots(n_roots: int, document_words_max: int | None) -> list[tuple[Prompted, str]]:
    """The root examples that the recorded teacher revised; written by a junior of this study.

    Those whose prompts ask for more words than ``document_words_max`` are left out (None: none).
    """
    rows = _mixed_rows(TEACHER_DIR / "revisions.jsonl", document_words_max)[:n_roots]
    return [(recorded_prompt(row), row["root"]) for row in rows]


def roots_of(lists: Sequence[Candidates], seed: int) -> list[tuple[Prompted, str]]:
    """Valid examples of the candidate lists in random order, each with its prompt.

    Several texts of a list are used; each gets an id of its own.
    """
    roots = []
    for item in lists:
        for index, text in enumerate(item.texts):
            prompted = Prompted(**{**prompt_fields(item), "id": record_id(item.id, index)})
            parsed = parse_example(text, prompted, "junior", stage="roots")
            if isinstance(parsed, Example):
                roots.append((prompted, example_text(parsed)))
    random.Random(f"roots|{seed}").shuffle(roots)
    return roots


def changed_share(revisions: Sequence[Revision]) -> dict[str, float]:
    """By kind, the share of root examples that their revision changed, 0 to 1."""
    by_kind: dict[str, list[bool]] = {}
    for revision in revisions:
        by_kind.setdefault(revision.kind, []).append(revision.root != revision.revision)
    return {kind: sum(changed) / len(changed) for kind, changed in by_kind.items()}


@cache
def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise EngineError(f"{path} is missing; restore data/teacher, or use teacher=openai:MODEL")
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines() if line]


def _mixed_rows(path: Path, document_words_max: int | None) -> list[dict]:
    rows = [row for row in _rows(path) if _fits(row["slots"], document_words_max)]
    return sorted(rows, key=lambda row: row["id"])  # ids are hashes: kinds are mixed


def _recorded_answers(folder: Path) -> dict[str, str]:
    answers = {
        brainstorm_id(row["topic"], row["kind"]): json.dumps(row["tasks"], ensure_ascii=False)
        for row in _rows(folder / "brainstorm.jsonl")
    }
    for filename, make_id in (
        ("seed.jsonl", str),
        ("preferences.jsonl", judge_id),
        ("revisions.jsonl", revision_id),
    ):
        for row in _rows(folder / filename):
            answers[make_id(row["id"])] = json.dumps(row["answer"], ensure_ascii=False)
    return answers


def recorded_prompt(row: dict) -> Prompted:
    """The data prompt that a row of data/teacher (seed, preferences, revisions) answers."""
    return Prompted(**{name: row[name] for name in Prompted.model_fields})


def _fits(slots: dict, document_words_max: int | None) -> bool:
    return (
        document_words_max is None or words_bound(slots.get("num_words"))[0] <= document_words_max
    )


def _take_by_kind(prompts: list[Prompted], n_examples: int, seed: int) -> list[Prompted]:
    taken = []
    for kind, count in kind_counts(n_examples).items():
        pool = [prompt for prompt in prompts if prompt.kind == kind]
        random.Random(f"take|{kind}|{seed}").shuffle(pool)
        taken += pool[:count]
    return taken
