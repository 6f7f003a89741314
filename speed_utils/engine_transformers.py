"""Batched, constrained, reproducible decoding with plain transformers, on CPU or GPU.

Each request samples with its own random generator, batches are cut the same way every time, and
rows that are done leave the batch. Attention over the cache shares each key head among its query
heads without copying it, and the cache grows in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from speed_utils.constraints import (
    Constraint,
    ConstraintState,
    compile_constraint,
    mask_logits,
)
from speed_utils.engines import Completion, Request
from speed_utils.models import device_and_dtype, folder_fingerprint, render_chat

CACHE_STEP_TOKENS = 64  # the cache buffer grows by this many positions
TOP_TOKENS = 128  # enough for nearly every nucleus; a wider one is sorted in full
FEW_ROWS_MAX = 128  # up to here a CPU multiplies weight by input faster than input by weight
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
        if self.device == "cpu":
            _use_few_rows_linear(self.model)
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

    def progress(self, _n_done: int, _n_total: int) -> str:
        """Nothing: local generation costs no money."""
        return ""

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

    def _sample(self, logits: torch.Tensor, samplers: list[_Sampler], is_done: list[bool]):
        """One token per row. Shape of logits (rows, vocabulary); rows that are done get any."""
        logits = logits.float()
        mask_logits(
            logits, [None if d else s.state for s, d in zip(samplers, is_done, strict=True)]
        )
        tokens = _draw(logits, samplers)
        for sampler, token, skip in zip(samplers, tokens, is_done, strict=True):
            if not skip and sampler.state is not None:
                sampler.state.accept(token)
        return tokens

    def _sampler(self, request: Request) -> _Sampler:
        state = None
        if request.schema is not None:
            key = str(request.schema)
            if key not in self._compiled:
                self._compiled[key] = compile_constraint(self.tokenizer, request.schema)
            state = self._compiled[key].start()
        return _Sampler(request, state, torch.Generator().manual_seed(request.seed))

    def _eos_ids(self) -> set[int]:
        ids = self.model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}


class _Sampler:
    """What one row samples with: its request, its constraint's state and its own generator."""

    def __init__(self, request: Request, state: ConstraintState | None, generator: torch.Generator):
        self.request, self.state, self.generator = request, state, generator


def _draw(logits: torch.Tensor, samplers: list[_Sampler]) -> list[int]:
    """Sample a token per row by inverting the cumulative distribution.

    The only randomness is one uniform number per row from the row's own generator, so what other
    rows do has no influence. Temperature 0 takes the likeliest token.
    """
    requests = [sampler.request for sampler in samplers]
    heat = torch.tensor([r.temperature or 1.0 for r in requests], device=logits.device)
    uniform = torch.stack([torch.rand(1, generator=s.generator) for s in samplers])
    uniform = uniform.to(logits.device)
    probabilities = (logits / heat[:, None]).softmax(-1)
    tokens = _invert(probabilities, uniform)
    for top_p in {request.top_p for request in requests if request.top_p < 1}:
        rows = [k for k, request in enumerate(requests) if request.top_p == top_p]
        for k, token in zip(rows, _draw_nucleus(probabilities, uniform, rows, top_p), strict=True):
            tokens[k] = token
    likeliest = logits.argmax(-1).tolist()
    pairs = zip(tokens, likeliest, requests, strict=True)
    return [best if request.temperature <= 0 else token for token, best, request in pairs]


def _draw_nucleus(
    probabilities: torch.Tensor, uniform: torch.Tensor, rows: list[int], top_p: float
) -> list[int]:
    """Sample rows within the smallest set of likeliest tokens that holds ``top_p``."""
    index = torch.tensor(rows, device=probabilities.device)
    chosen, drawn = probabilities[index], uniform[index]
    ordered, order = chosen.topk(min(TOP_TOKENS, chosen.shape[1]), -1)
    tokens = _invert(_nucleus(ordered, top_p), drawn, order)
    for k in (ordered.sum(-1) < top_p).nonzero().flatten().tolist():  # a wide nucleus: sort it all
        ordered_row, order_row = chosen[k : k + 1].sort(-1, descending=True)
        tokens[k] = _invert(_nucleus(ordered_row, top_p), drawn[k : k + 1], order_row)[0]
    return tokens


def _nucleus(ordered: torch.Tensor, top_p: float) -> torch.Tensor:
    return ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0.0)


def _invert(weights: torch.Tensor, uniform: torch.Tensor, order: torch.Tensor | None = None):
    """The tokens at which the cumulative weights pass the uniform numbers. Shape (rows, tokens)."""
    cumulative = weights.cumsum(-1)
    place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    place = place.clamp(max=cumulative.shape[1] - 1)
    return (place if order is None else order.gather(1, place)).squeeze(1).tolist()


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


def _use_few_rows_linear(model) -> None:
    """Let linear layers compute few rows as (W x^T)^T: the library then does not repack the weight.

    Repacking costs more than the product itself where there are few rows to multiply.
    """

    def few_rows(layer):
        def forward(inputs):
            rows = inputs.reshape(-1, inputs.shape[-1])
            if layer.bias is not None or not 1 < len(rows) <= FEW_ROWS_MAX:
                return torch.nn.functional.linear(inputs, layer.weight, layer.bias)
            product = torch.mm(layer.weight, rows.t()).t().contiguous()
            return product.view(*inputs.shape[:-1], -1)

        return forward

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.forward = few_rows(layer)
