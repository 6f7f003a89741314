"""Prompt templates and the seeded sampling of their slots.

Templates are text files in ``data/prompts`` that a person can read and change; ``$name`` marks a
slot. Slots are drawn with weights from a seed, so that the same seed gives the same prompt.

    slots = sample_slots("retrieval", seed=3, document_words_max=100)
    text = example_prompt("retrieval", topic="Arts/Movies", task="Given a ...", slots=slots)

Paper: Appendix C. Slot values as in E5_mistral, weights as in SPEED's released prompts.
"""

from __future__ import annotations

import json
import random
import re
from functools import lru_cache
from pathlib import Path
from string import Template

from speed_utils.records import KIND_KEYS, KINDS, Prompted

PROMPTS_DIR = Path(__file__).parent.parent / "data" / "prompts"
SYSTEM_MESSAGE = "You are a helpful assistant."  # of the teacher, as in E5's and SPEED's code
LONG_DOCUMENT_WORDS = 300  # "at least 300 words" for long-long matching (E5, Table 13)

Slots = dict[str, str | int | float | None]

# slot -> (values, weights); None as a value leaves the line out of the prompt.
_SLOTS: dict[str, dict[str, tuple[tuple, tuple]]] = {
    "classification": {
        "num_words": (
            ("less than 10", "at least 10", "at least 50", "at least 100", "at least 200"),
            (0.1, 0.3, 0.2, 0.2, 0.2),
        ),
        "clarity": (("clear", "understandable with some effort", "ambiguous"), (0.6, 0.2, 0.2)),
        "difficulty": (("high school", "college", "PhD", None), (1 / 6, 1 / 6, 1 / 6, 1 / 2)),
    },
    "retrieval": {
        "query_type": (("extremely long-tail", "long-tail", "common"), (0.4, 0.5, 0.1)),
        "query_length": (
            ("less than 5 words", "5 to 15 words", "at least 10 words"),
            (0.4, 0.4, 0.2),
        ),
        "clarity": (("clear", "understandable with some effort", "ambiguous"), (0.6, 0.2, 0.2)),
        "num_words": ((50, 100, 200, 300, 400, 500), (1, 1, 1, 1, 1, 1)),
        "difficulty": (("high school", "college", "PhD", None), (1 / 6, 1 / 6, 1 / 6, 1 / 2)),
    },
    "sts": {
        "unit": (("sentence", "phrase", "passage"), (0.9, 0.05, 0.05)),
        "high_score": ((4, 4.5, 5), (1, 1, 1)),
        "low_score": ((2.5, 3, 3.5), (1, 1, 1)),
        "difficulty": (
            ("elementary school", "high school", "college", None),
            (1 / 6, 1 / 6, 1 / 6, 1 / 2),
        ),
    },
    "matching_short": {},
    "matching_long": {"num_words": ((LONG_DOCUMENT_WORDS,), (1,))},
}
_SHUFFLED_KINDS = ("classification", "retrieval")  # SPEED shuffles the rules of these two only


class PromptError(ValueError):
    """A template is missing, or a slot has no value."""


def words_bound(num_words: str | int | None) -> tuple[int, int | None]:
    """The (least, most) number of words that a ``num_words`` slot asks for; most may be None."""
    number = int(re.search(r"\d+", str(num_words)).group()) if num_words is not None else 0
    return (1, number - 1) if str(num_words).startswith("less than") else (number, None)


def sample_slots(kind: str, seed: object, document_words_max: int | None = None) -> Slots:
    """Draw the slots of one data prompt.

    Args:
        kind: one of KINDS.
        seed: anything with a stable ``str``; the same seed gives the same slots.
        document_words_max: leave out (or cut to) longer documents, in words; None as the paper.

    Raises:
        PromptError: unknown kind.
    """
    if kind not in KINDS:
        raise PromptError(f"unknown kind {kind!r}; one of {', '.join(KINDS)}")
    rng = random.Random(f"{kind}|{seed}")
    slots: Slots = {}
    for name, (values, weights) in _SLOTS[kind].items():
        if name == "num_words" and document_words_max is not None:
            values, weights = _cut_num_words(values, weights, document_words_max)
        slots[name] = rng.choices(values, weights)[0]
    slots["language"] = "English"
    slots["order"] = rng.randrange(10**6)
    return slots


def example_prompt(kind: str, *, topic: str, task: str, slots: Slots) -> str:
    """The data prompt ``p`` with task ``t`` filled in.

    Raises:
        PromptError: the template names a slot that is not given.
    """
    values = {**slots, "topic": readable_topic(topic), "task": task}
    if kind == "classification":
        values["clarity_line"] = _line("The text is {} and {}", slots, "clarity", "difficulty")
    else:
        values["difficulty_line"] = _line(_DIFFICULTY[kind], slots, "difficulty")
    text = _fill(f"example_{kind}", values)
    return _shuffle_rules(text, slots["order"]) if kind in _SHUFFLED_KINDS else text


def prompt_of(record: Prompted) -> str:
    """The data prompt that a record was written for."""
    return example_prompt(record.kind, topic=record.topic, task=record.task, slots=record.slots)


def brainstorm_prompt(kind: str, topic: str, n_tasks: int = 5) -> str:
    """The prompt that asks the teacher for tasks (Section 3.2.1). STS has none.

    Raises:
        PromptError: no such template.
    """
    return _fill(f"brainstorm_{kind}", {"topic": readable_topic(topic), "n_tasks": n_tasks})


def judge_prompt(prompt: str, texts: list[str]) -> str:
    """The prompt that asks the teacher for the best and the worst of a list (Section 3.2.3)."""
    listing = "\n".join(f"[{index}] {text}" for index, text in enumerate(texts))
    return _fill("judge", {"prompt": prompt, "outputs": listing})


def evaluation_prompt(prompt: str, output: str) -> str:
    """The prompt that asks the teacher to evaluate and revise one output (Section 3.2.4)."""
    return _fill("evaluate_and_revise", {"prompt": prompt, "output": output})


def revisor_prompt(prompt: str, output: str) -> str:
    """The revisor's own prompt: (p, t, root example) -> revision (Eq. 3)."""
    return _fill("revise", {"prompt": prompt, "output": output})


def messages(prompt: str) -> list[dict[str, str]]:
    """The prompt as a chat: the same two messages for teacher and generators."""
    return [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": prompt}]


def answer_schema(kind: str, length_limit: int | None = None) -> dict:
    """The JSON schema of one kind's answer; drives constrained decoding and validation.

    Args:
        kind: one of KINDS.
        length_limit: most characters of a field; None for no limit.
    """
    field: dict = {"type": "string", "minLength": 1}
    if length_limit is not None:
        field["maxLength"] = length_limit
    return object_schema(dict.fromkeys(KIND_KEYS[kind], field))


def object_schema(properties: dict) -> dict:
    """A flat object schema: all keys required, none else, in the order given."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


JUDGE_SCHEMA = object_schema(
    {"reason": {"type": "string"}, "best": {"type": "integer"}, "worst": {"type": "integer"}}
)
REVISION_SCHEMA = object_schema({"reason": {"type": "string"}, "revision": {"type": "string"}})


def readable_topic(path: str) -> str:
    """An ODP path as words: underscores become blanks, slashes stay."""
    return path.replace("_", " ")


_DIFFICULTY = {
    "retrieval": "Both documents need {} level education to understand",
    "sts": "They need {} level education to understand",
    "matching_short": "",
    "matching_long": "",
}


def _line(template: str, slots: Slots, *names: str) -> str:
    values = [slots.get(name) for name in names]
    if not values or None in values:
        return ""
    if names[-1] == "difficulty" and len(values) > 1:
        values[-1] = f"needs {values[-1]} level education to understand"
    return f"- {template.format(*values)}." if template else ""


def _cut_num_words(values: tuple, weights: tuple, most: int) -> tuple[tuple, tuple]:
    kept = [pair for pair in zip(values, weights, strict=True) if words_bound(pair[0])[0] <= most]
    return tuple(zip(*kept, strict=True)) if kept else ((most,), (1,))


def _shuffle_rules(text: str, order: object) -> str:
    head, rules = text.split("Rules:\n", 1)
    rules, tail = rules.split("\n\n", 1)
    lines = rules.splitlines()
    random.Random(str(order)).shuffle(lines)
    return head + "Rules:\n" + "\n".join(lines) + "\n\n" + tail


@lru_cache(maxsize=64)
def _template_lines(path: Path, _mtime: float) -> list[str]:
    return path.read_text(encoding="utf8").strip().splitlines()


def _fill(name: str, values: dict) -> str:
    path = PROMPTS_DIR / f"{name}.txt"
    if not path.is_file():
        raise PromptError(f"no prompt template {path}")
    # A line that holds nothing but an empty slot is left out.
    lines = _template_lines(path, path.stat().st_mtime)
    kept = [line for line in lines if values.get(line.removeprefix("$")) != ""]
    try:
        return Template("\n".join(kept)).substitute(values)
    except KeyError as error:
        raise PromptError(f"{path} names the slot {error.args[0]!r}, which has no value") from None


def prompts_fingerprint() -> str:
    """All templates as one text, for the hash that decides whether a stage is up to date."""
    texts = {
        path.name: path.read_text(encoding="utf8") for path in sorted(PROMPTS_DIR.glob("*.txt"))
    }
    return json.dumps(texts, sort_keys=True)
