"""vLLM as an engine: one loaded base, LoRA adapters, structured output by the same schema.

Written for vllm 0.32 on a GPU. It follows vllm's documented interface; the study's own CPU runs do
not exercise it (see outputs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from speed_utils.constraints import JSON_FORM
from speed_utils.engines import Completion, Request
from speed_utils.models import folder_fingerprint, render_chat

BATCH_ROUNDS = 8  # a batch holds this many times the concurrent sequences, so that none waits long


class VllmEngine:
    """Engine over vllm's offline LLM."""

    atomic_batches = False  # every request samples with its own seed

    def __init__(self, model_dir: Path | str, adapter_dir: Path | None = None, *, batch_size: int):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.batch_size = batch_size
        self._llm = LLM(
            model=str(model_dir),
            max_num_seqs=batch_size,
            enable_prefix_caching=True,
            enable_lora=adapter_dir is not None,
            max_lora_rank=64,
            structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
        )
        self._lora = None
        if adapter_dir is not None:
            self._lora = LoRARequest(Path(adapter_dir).parent.parent.name, 1, str(adapter_dir))
        self.tokenizer = self._llm.get_tokenizer()
        adapter = folder_fingerprint(adapter_dir) if adapter_dir else "base"
        self.name = f"vllm|{folder_fingerprint(model_dir)}|{adapter}"

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Slices that keep the engine busy; vllm schedules within them."""
        size = self.batch_size * BATCH_ROUNDS
        return [list(requests[start : start + size]) for start in range(0, len(requests), size)]

    def complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Answer one batch."""
        prompts = [render_chat(self.tokenizer, request.messages) for request in batch]
        outputs = self._llm.generate(
            prompts,
            [_sampling(request) for request in batch],
            lora_request=self._lora,
            use_tqdm=False,
        )
        for request, output in zip(batch, outputs, strict=True):
            answer = output.outputs[0]
            yield Completion(
                key=request.key(self.name),
                id=request.id,
                text=answer.text,
                finish_reason=answer.finish_reason or "stop",
                prompt_tokens=len(output.prompt_token_ids or ()),
                completion_tokens=len(answer.token_ids),
            )

    def close(self) -> None:
        """Free the model and its cache."""
        import gc

        import torch

        self._llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _sampling(request: Request) -> object:
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
