"""From data prompts to examples with the study's own generators: write, check, revise.

    requests = example_requests(prompts, seed=42)
    examples, rejections = read_examples(prompts, generate(requests, engine, path), "senior", stage)

Paper: Section 3.2.3 (root data), Section 3.3 (senior writes, revisor refines in one pass).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from speed_utils.engines import Completion, Request, request_seed
from speed_utils.generation import answer_tokens, bounded_schema
from speed_utils.parsing import (
    has_valid_json,
    is_valid_answer,
    parse_example,
    prompt_fields,
    unusable,
)
from speed_utils.prompts import messages, prompt_of, revisor_prompt
from speed_utils.records import (
    Candidates,
    Example,
    Prompted,
    Rejection,
    Revision,
    example_text,
)


def example_requests(
    prompts: Sequence[Prompted],
    *,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    n_candidates: int = 1,
    is_constrained: bool = True,
) -> list[Request]:
    """Requests for examples: ``n_candidates`` a prompt, one after another, each its own seed.

    Args:
        prompts: what to write.
        seed: of the sampling; every request derives its own from it.
        temperature: of the sampling (paper: 1.0).
        top_p: of the sampling (paper: 1.0).
        n_candidates: answers to each prompt.
        is_constrained: force the kind's JSON schema; False measures what the model does by itself.
    """
    return [
        Request(
            id=prompt.id,
            messages=tuple(messages(prompt_of(prompt))),
            max_tokens=answer_tokens(prompt),
            temperature=temperature,
            top_p=top_p,
            seed=request_seed(seed, prompt.id, candidate),
            schema=bounded_schema(prompt) if is_constrained else None,
        )
        for prompt in prompts
        for candidate in range(n_candidates)
    ]


def revise_requests(
    drafts: Sequence[Example],
    *,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    is_constrained: bool = True,
) -> list[Request]:
    """Requests to the revisor: prompt and draft in, improved example out (Section 3.3)."""
    return [
        Request(
            id=draft.id,
            messages=tuple(messages(revisor_prompt(prompt_of(draft), example_text(draft)))),
            max_tokens=answer_tokens(draft),
            temperature=temperature,
            top_p=top_p,
            seed=request_seed(seed, "revise", draft.id),
            schema=bounded_schema(draft) if is_constrained else None,
        )
        for draft in drafts
    ]


def revision_pair(revision: Revision) -> tuple[str, str]:
    """The revisor's training pair: (prompt with the draft, revised text), Eq. 3."""
    return revisor_prompt(prompt_of(revision), revision.root), revision.revision


def revision_draft(revision: Revision) -> Example:
    """The root of a revision as the draft example that the revisor is given.

    Raises:
        ValueError: the root is not a valid answer.
    """
    draft = parse_example(revision.root, revision, "junior", stage="revise")
    if isinstance(draft, Rejection):
        raise ValueError(f"root {revision.id} is not valid: {draft.reason}")
    return draft


def read_examples(
    prompts: Sequence[Prompted], completions: Sequence[Completion], source: str, stage: str
) -> tuple[list[Example], list[Rejection]]:
    """Parse the answers of these prompts, in order; what is not valid is a rejection.

    An answer that the token limit cut is rejected as such, also where its text would parse.

    Raises:
        ValueError: prompts and completions do not belong together.
    """
    examples, rejections = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        if completion.id != prompt.id:
            raise ValueError(f"completion {completion.id} does not answer prompt {prompt.id}")
        parsed = unusable(completion, prompt.id, stage=stage) or parse_example(
            completion.text, prompt, source, stage=stage
        )
        (examples if isinstance(parsed, Example) else rejections).append(parsed)
    return examples, rejections


def candidate_lists(
    prompts: Sequence[Prompted], completions: Sequence[Completion], n_candidates: int
) -> list[Candidates]:
    """Group ``n_candidates`` consecutive answers of each prompt into its list of root data."""
    return [
        Candidates(
            **prompt_fields(prompt),
            texts=[c.text for c in completions[i * n_candidates : (i + 1) * n_candidates]],
        )
        for i, prompt in enumerate(prompts)
    ]


def apply_revisions(
    drafts: Sequence[Example], revised: Sequence[Example]
) -> tuple[list[Example], int]:
    """The revised examples, with the draft where its revision was rejected.

    Returns:
        Examples in the order of the drafts, and how many drafts were changed by their revision.
    """
    by_id = {example.id: example for example in revised}
    final = [by_id.get(draft.id, draft) for draft in drafts]
    pairs = zip(drafts, final, strict=True)
    return final, sum(example_text(draft) != example_text(new) for draft, new in pairs)


def valid_share(prompts: Sequence[Prompted], completions: Sequence[Completion]) -> float:
    """The share of answers, 0 to 1, that are JSON with the kind's keys, and not cut."""
    return _share(prompts, completions, has_valid_json)


def usable_share(prompts: Sequence[Prompted], completions: Sequence[Completion]) -> float:
    """The share of answers, 0 to 1, that make an example: valid, and no two fields equal."""
    return _share(prompts, completions, is_valid_answer)


def _share(
    prompts: Sequence[Prompted],
    completions: Sequence[Completion],
    is_good: Callable[[str, str], bool],
) -> float:
    good = [
        completion.finish_reason == "stop" and is_good(completion.text, prompt.kind)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return sum(good) / len(good)
