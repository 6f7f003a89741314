"""Constrained decoding: a JSON schema as a mask over the next token, by llguidance.

The allowed text is exactly what ``json.dumps`` with default separators would write, keys in schema
order: the same form that the training targets have.
"""

from __future__ import annotations

import json

import llguidance
import llguidance.hf
import llguidance.numpy as bitmasks
import numpy as np
import torch

_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
        self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        self._bits = bitmasks.allocate_token_bitmask(1, tokenizer.vocab_size)

    def mask(self, row: torch.Tensor) -> None:
        """Set the logits of tokens that cannot follow to minus infinity, in place.

        Args:
            row: logits of one answer's next token. Shape (vocabulary,), float32.
        """
        bitmasks.fill_next_token_bitmask(self._matcher, self._bits)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: row.shape[0]]
        allowed = torch.from_numpy(allowed.astype(bool)).to(row.device)
        row[: len(allowed)].masked_fill_(~allowed, -torch.inf)
        row[len(allowed) :] = -torch.inf

    def accept(self, token: int) -> None:
        """Advance by the token that was chosen."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here: {self._matcher.get_error()}")


_TOKENIZERS: dict[int, tuple[object, llguidance.LLTokenizer]] = {}


def compile_constraint(tokenizer: object, schema: dict) -> Constraint:
    """Compile a JSON schema for one (fast) tokenizer.

    Raises:
        ValueError: the schema is not one that llguidance accepts.
    """
    if id(tokenizer) not in _TOKENIZERS:  # about a second per tokenizer
        _TOKENIZERS[id(tokenizer)] = (tokenizer, llguidance.hf.from_tokenizer(tokenizer))
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps({**schema, "x-guidance": _JSON_FORM})
    )
    error = llguidance.LLMatcher.validate_grammar(grammar)
    if error:
        raise ValueError(f"schema not accepted: {error}")
    return Constraint(_TOKENIZERS[id(tokenizer)][1], grammar)
