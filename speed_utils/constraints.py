"""Constrained decoding: a JSON schema as a mask over the next token, by llguidance.

The allowed text is exactly what ``json.dumps`` with default separators would write, keys in schema
order: the same form that the training targets have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import llguidance
import llguidance.hf
import llguidance.numpy as bitmasks
import numpy as np
import torch

JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """A compiled schema; ``start()`` gives the state of one answer."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str):
        self._tokenizer, self._grammar = tokenizer, grammar

    def start(self) -> ConstraintState:
        """A fresh state, at the beginning of an answer."""
        return ConstraintState(self._tokenizer, self._grammar)


class ConstraintState:
    """Follows one answer token by token.

    Raises:
        ValueError: a token that the mask did not allow was accepted.
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str):
        self.matcher = llguidance.LLMatcher(tokenizer, grammar)

    def accept(self, token: int) -> None:
        """Advance by the token that was chosen."""
        if not self.matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here: {self.matcher.get_error()}")


def mask_logits(logits: torch.Tensor, states: Sequence[ConstraintState | None]) -> None:
    """Set the logits of tokens that cannot follow to minus infinity, in place.

    Args:
        logits: of each answer's next token. Shape (answers, vocabulary), float32.
        states: one per answer; None where anything may follow.
    """
    if not any(states):
        return
    bits = bitmasks.allocate_token_bitmask(len(states), logits.shape[1])
    for index, state in enumerate(states):
        if state is not None:
            bitmasks.fill_next_token_bitmask(state.matcher, bits, index)
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]]
    logits.masked_fill_(torch.from_numpy(allowed == 0).to(logits.device), -torch.inf)


_TOKENIZERS: dict[int, tuple[object, llguidance.LLTokenizer]] = {}


def compile_constraint(tokenizer: object, schema: dict) -> Constraint:
    """Compile a JSON schema for one (fast) tokenizer.

    Raises:
        ValueError: the schema is not one that llguidance accepts.
    """
    if id(tokenizer) not in _TOKENIZERS:  # about a second per tokenizer
        _TOKENIZERS[id(tokenizer)] = (tokenizer, llguidance.hf.from_tokenizer(tokenizer))
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps({**schema, "x-guidance": JSON_FORM})
    )
    error = llguidance.LLMatcher.validate_grammar(grammar)
    if error:
        raise ValueError(f"schema not accepted: {error}")
    return Constraint(_TOKENIZERS[id(tokenizer)][1], grammar)
