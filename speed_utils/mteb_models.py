"""SentenceTransformers as mteb's models: with task instructions, or without.

    model = instructed(SentenceTransformer(str(folder)), "trained", folder_fingerprint(folder))
    mteb.evaluate(model, tasks)

Paper: Section 4.2; the instructions are those of E5_mistral, Table 15.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from speed_utils.embedder import query_text
from speed_utils.shared_prefix import share_prefix

CQADUPSTACK_FORUMS = (
    "Android English Gaming Gis Mathematica Physics Programmers Stats Tex Unix Webmasters Wordpress"
)
# Instructions of E5_mistral for the tasks to which mteb gives none, or another one.
E5_PROMPTS = {
    **dict.fromkeys(
        [
            "BIOSSES",
            "SICK-R",
            "STS17",
            "STS22",
            "STSBenchmark",
            *(f"STS{n}" for n in range(12, 17)),
        ],
        "Retrieve semantically similar text.",
    ),
    "SummEval": "Given a news summary, retrieve other semantically similar summaries",
    **dict.fromkeys(
        [f"CQADupstack{forum}Retrieval" for forum in CQADUPSTACK_FORUMS.split()],
        "Given a question, retrieve detailed question descriptions from Stackexchange that are "
        "duplicates to the given question",
    ),
}


def instructed(model: object, name: str, revision: str) -> object:
    """Wrap a SentenceTransformer for mteb so that queries carry the task's instruction.

    Symmetric tasks have it on every text, retrieval and reranking on the query only.

    Args:
        model: a loaded SentenceTransformer; from now on it computes a batch's common prefix once.
        name: in mteb's result files; other characters than letters, digits, "._-" become "_".
        revision: fingerprint of the weights; results of another one are never reused.
    """
    from mteb.models.instruct_wrapper import InstructSentenceTransformerModel

    share_prefix(model)
    with _quietly():
        wrapped = InstructSentenceTransformerModel(
            None,
            revision,
            device=str(model.device),
            instruction_template=query_text("{instruction}", ""),
            apply_instruction_to_passages=False,
            prompts_dict=E5_PROMPTS,
            modules=list(model),  # mteb knows names only; these go on to SentenceTransformer
        )
    wrapped.model = model
    wrapped.mteb_model_meta = _model_meta(model, name, revision, uses_instructions=True)
    return wrapped


def plain(model: object, name: str, revision: str) -> object:
    """Wrap a SentenceTransformer for mteb without instructions; arguments as for instructed."""
    from mteb.models import SentenceTransformerEncoderWrapper

    with _quietly():
        wrapped = SentenceTransformerEncoderWrapper(model)
    wrapped.mteb_model_meta = _model_meta(model, name, revision, uses_instructions=False)
    return wrapped


def _model_meta(model: object, name: str, revision: str, *, uses_instructions: bool) -> object:
    """What mteb stores results under: besides the weights, all of ours that changes a score."""
    from mteb.models import ModelMeta

    style = "instructed" if uses_instructions else "plain"
    fields = {
        "name": _safe(name),
        "revision": _safe(f"{revision}-{style}-{model.max_seq_length}"),
        "languages": ["eng-Latn"],
        "max_tokens": model.max_seq_length,
        "embed_dim": model.get_embedding_dimension(),
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "framework": ["Sentence Transformers", "PyTorch"],
        "use_instructions": uses_instructions,
    }
    return ModelMeta.create_empty(fields)


def instruction(task: object) -> str:
    """The instruction that a task's queries carry with instructed, for tables."""
    return E5_PROMPTS.get(task.metadata.name) or str(task.metadata.prompt)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence what mteb's use of names that sentence-transformers has since changed would print."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".") or "unnamed"
