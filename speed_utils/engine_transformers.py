"""Batched, constrained, reproducible decoding with plain transformers, on CPU or GPU.

Each request samples with its own random generator, batches are cut the same way every time, and
rows that are done leave the batch. Attention over the cache shares each key head among its query
heads without copying it, and the cache grows in place: on two CPU cores together about twice as
fast as ``generate`` (tests/benchmarks/decode.py measures it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from speed_utils.constraints import Constraint, compile_constraint
from speed_utils.engines import Completion, Request
from speed_utils.models import device_and_dtype, folder_fingerprint, render_chat

CACHE_STEP_TOKENS = 64  # the cache buffer grows by this many positions
SHRINK_SHARE = 0.75  # rows that are done are dropped once at most this share is still running


class TransformersEngine:
    """Engine over one causal language model; a LoRA adapter is merged into it on loading."""

    atomic_batches = True

    def __init__(self, model_dir: Path | str, adapter_dir: Path | None = None, *, batch_size: int):
        self.device, dtype = device_and_dtype()
        self.batch_size = batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        if adapter_dir is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, adapter_dir).merge_and_unload()
        self.model.to(self.device).eval()
        _use_grouped_attention(self.model)
        adapter = folder_fingerprint(adapter_dir) if adapter_dir else "base"
        self.name = f"transformers|{folder_fingerprint(model_dir)}|{adapter}"
        self._compiled: dict[str, Constraint] = {}

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Batches of similar length, so that little is padded and rows end together."""

        def length(request: Request) -> tuple[int, int, str, int]:
            n_chars = sum(len(message["content"]) for message in request.messages)
            return request.max_tokens, n_chars, request.id, request.seed

        ordered = sorted(requests, key=length)
        size = self.batch_size
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    @torch.inference_mode()
    def complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Decode one batch; completions come in the batch's order."""
        prompts = [render_chat(self.tokenizer, request.messages) for request in batch]
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
        samplers = [self._sampler(request) for request in batch]
        answers = self._decode(encoded["input_ids"], encoded["attention_mask"], batch, samplers)
        n_prompt = encoded["attention_mask"].sum(1).tolist()
        for request, ids, prompt_tokens in zip(batch, answers, n_prompt, strict=True):
            ended = bool(ids) and ids[-1] in self._eos_ids()
            text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
            yield Completion(
                key=request.key(self.name),
                id=request.id,
                text=text,
                finish_reason="stop" if ended else "length",
                prompt_tokens=prompt_tokens,
                completion_tokens=len(ids),
            )

    def close(self) -> None:
        """Free the model."""
        self.model = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _decode(self, ids, mask, batch, samplers) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in batch]
        rows = list(range(len(batch)))  # rows[k]: which request row k of the tensors decodes
        done: set[int] = set()
        cache = _growing_cache(self.model.config.num_hidden_layers)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        while True:
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            tokens = self._sample(logits, [samplers[i] for i in rows], [i in done for i in rows])
            for token, i in zip(tokens, rows, strict=True):
                if i not in done:
                    answers[i].append(token)
                    if token in self._eos_ids() or len(answers[i]) >= batch[i].max_tokens:
                        done.add(i)
            keep = [k for k, i in enumerate(rows) if i not in done]
            if not keep:
                return answers
            ids = torch.tensor(tokens, device=self.device)[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if len(keep) <= SHRINK_SHARE * len(rows):
                index = torch.tensor(keep, device=self.device)
                cache.batch_select_indices(index)
                ids, positions, mask = ids[index], positions[index], mask[index]
                rows = [rows[k] for k in keep]

    def _sample(self, logits, samplers, is_done) -> list[int]:
        logits = logits.float()
        for k, sampler in enumerate(samplers):
            if not is_done[k]:
                sampler.prepare(logits[k])
        tokens = logits.argmax(-1).tolist()
        for sampler, token, skip in zip(samplers, tokens, is_done, strict=True):
            if not skip:
                sampler.accept(token)
        return tokens

    def _sampler(self, request: Request) -> _Sampler:
        constraint = None
        if request.schema is not None:
            key = str(request.schema)
            if key not in self._compiled:
                self._compiled[key] = compile_constraint(self.tokenizer, request.schema)
            constraint = self._compiled[key].start()
        generator = torch.Generator().manual_seed(request.seed)
        return _Sampler(request, constraint, generator)

    def _eos_ids(self) -> set[int]:
        ids = self.model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}


class _Sampler:
    """Turns one row of logits into a sample by the Gumbel-max trick, in place.

    argmax(logits / T + Gumbel noise) is an exact sample of softmax(logits / T), and the noise comes
    from the request's own generator: what other rows do has no influence.
    """

    def __init__(self, request: Request, constraint, generator: torch.Generator):
        self.request, self.constraint, self.generator = request, constraint, generator

    def prepare(self, row: torch.Tensor) -> None:
        if self.constraint is not None:
            self.constraint.mask(row)
        if self.request.temperature <= 0:
            return
        row /= self.request.temperature
        if self.request.top_p < 1:
            ordered, index = row.sort(descending=True)
            probabilities = ordered.softmax(-1)
            outside = probabilities.cumsum(-1) - probabilities > self.request.top_p
            row[index[outside]] = -torch.inf
        noise = torch.empty(row.shape).exponential_(generator=self.generator)
        row -= noise.log().to(row.device)

    def accept(self, token: int) -> None:
        if self.constraint is not None:
            self.constraint.accept(token)


class _GrowingLayer(DynamicLayer):
    """A cache layer that writes into a buffer instead of joining tensors at every token."""

    def update(self, key_states, value_states, *_args, **_kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._length, self._buffers = 0, [None, None]
        start, self._length = self._length, self._length + key_states.shape[-2]
        views = []
        for slot, new in enumerate((key_states, value_states)):
            buffer = self._buffers[slot]
            if buffer is None or buffer.shape[-2] < self._length:
                batch, heads, _, width = new.shape
                grown = new.new_empty(batch, heads, self._length + CACHE_STEP_TOKENS, width)
                if start:
                    grown[..., :start, :] = buffer[..., :start, :]
                self._buffers[slot] = buffer = grown
            buffer[..., start : self._length, :] = new
            views.append(buffer[..., : self._length, :])
        self.keys, self.values = views
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self.keys, self.values = (buffer[..., : self._length, :] for buffer in self._buffers)


def _growing_cache(n_layers: int) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [_GrowingLayer() for _ in range(n_layers)]
    return cache


def _grouped_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention of one new token: query heads are folded onto their shared key head.

    Shapes: query (batch, heads, 1, width), key and value (batch, key heads, length, width).
    """
    batch, heads, n_query, width = query.shape
    if n_query != 1 or heads == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling") or width**-0.5
    folded = query.view(batch, key.shape[1], heads // key.shape[1], width)
    scores = folded @ key.transpose(-1, -2) * scale
    if attention_mask is not None:
        is_bool = attention_mask.dtype == torch.bool
        scores = (
            scores.masked_fill(~attention_mask, -torch.inf) if is_bool else scores + attention_mask
        )
    output = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    return output.view(batch, 1, heads, width), None


def _use_grouped_attention(model) -> None:
    AttentionInterface.register("speed_grouped", _grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("speed_grouped", sdpa_mask)
    if model.config.model_type in ("llama", "mistral", "qwen2", "qwen3"):
        model.set_attn_implementation("speed_grouped")
