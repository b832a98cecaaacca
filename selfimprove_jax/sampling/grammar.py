"""What a completion must match: a JSON schema, a list of choices, a regular expression.

Built on llguidance, which says of each token of a vocabulary whether the text may go on with it.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfimprove_jax.data.tokenizer import Tokenizer

# As `json.dumps` writes. White space of any length would be allowed otherwise, and a small model
# that has once begun a row of it goes on with it.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
  """Makes grammars for the tokens of one model; takes seconds to make, so keep it."""

  def __init__(self, tokenizer: Tokenizer, *, eos_id: int | Sequence[int], vocab_size: int):
    """Args:
      eos_id: the token, or tokens, of which one ends a completion; no text has them.
      vocab_size: rows of the model's logits; those beyond the tokenizer's are never allowed.

    Raises:
      ValueError: the tokenizer has more tokens than `vocab_size`, or lacks an `eos_id`.
      ImportError: llguidance is not installed.
    """
    try:
      import llguidance
    except ImportError:
      raise ImportError(
        "grammars need the package llguidance: pip install 'selfimprove_jax[grammar]'"
      ) from None
    eos_ids = [eos_id] if isinstance(eos_id, int) else list(eos_id)
    if vocab_size < tokenizer.vocab_size:
      raise ValueError(f"vocab_size={vocab_size}; the tokenizer has {tokenizer.vocab_size} tokens")
    if not eos_ids or not all(0 <= token < tokenizer.vocab_size for token in eos_ids):
      raise ValueError(f"eos_id={eos_id}; the tokenizer has tokens 0 to {tokenizer.vocab_size - 1}")
    self._matcher = llguidance.LLMatcher
    self._tokens = llguidance.LLTokenizer(
      tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=eos_ids
    )
    self._num_tokens = tokenizer.vocab_size
    self._num_words = -(-vocab_size // 32)

  def json_schema(self, schema: dict[str, Any]) -> "Grammar":
    """JSON of a schema, written as `json.dumps` does, keys in the schema's order.

    `{"type": "object"}` is any JSON object.

    Raises:
      ValueError: the schema is none, matches nothing, or says what llguidance cannot enforce (such
        as `not` or `uniqueItems`); with the reason.
    """
    definition = self._matcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_FORM)
    return self._compile(definition, f"JSON schema {_shortened(json.dumps(schema))}")

  def choices(self, choices: Sequence[str]) -> "Grammar":
    """One of some texts.

    Raises:
      ValueError: there is none, or one is empty.
    """
    if not choices or not all(choices):
      raise ValueError(f"choices are {choices!r}; at least one is needed, and none may be empty")
    lark = "start: " + " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices))
    return self._compile(self._matcher.grammar_from_lark(lark), f"choices {_shortened(choices)}")

  def regex(self, pattern: str) -> "Grammar":
    """A whole text that a regular expression matches (of Rust's `regex`: no look-around).

    Raises:
      ValueError: the expression is none; with the reason.
    """
    definition = self._matcher.grammar_from_regex(pattern)
    return self._compile(definition, f"regular expression {_shortened(pattern)}")

  def token_bytes(self, token: int) -> bytes:
    """What a token spells, which may be part of a character; a special token spells its name.

    One beyond the tokenizer's spells nothing.
    """
    return self._tokens.decode_bytes([token]) if token < self._num_tokens else b""

  def _compile(self, definition, name):
    matcher = self._matcher(self._tokens, definition, log_level=0)
    if matcher.is_error():
      raise ValueError(f"{name} cannot be enforced: {matcher.get_error().strip()}")
    return Grammar(matcher, self._num_words)


class Grammar:
  """A compiled grammar; serves any number of completions at once."""

  def __init__(self, matcher: Any, num_words: int):
    self._matcher = matcher
    self._num_words = num_words

  @property
  def num_words(self) -> int:
    """Words of 32 tokens in a mask: it is for models of as large a vocabulary."""
    return self._num_words

  def start(self) -> "Matcher":
    """A matcher for one completion, at its beginning."""
    return Matcher(self._matcher.deep_copy(), self._num_words)


class Matcher:
  """How far one completion has come in its grammar."""

  def __init__(self, matcher: Any, num_words: int):
    self._matcher = matcher
    self._num_words = num_words

  @property
  def is_finished(self) -> bool:
    """Nothing but the end of sequence may follow."""
    return self._matcher.is_stopped()

  def allow(self, row: np.ndarray) -> None:
    """Writes which tokens may come next: bit `i % 32` of word `i // 32` for token `i`.

    The end of sequence is one of them wherever the text may end.

    Args:
      row: contiguous uint32, one bit for each token of the vocabulary; it is overwritten.

    Raises:
      RuntimeError: the text has become too intricate for llguidance's limits.
    """
    assert row.dtype == np.uint32 and row.shape == (self._num_words,) and row.flags.c_contiguous
    self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    self._check()

  def accept(self, token: int) -> None:
    """Goes on by a token that `allow` allowed.

    Raises:
      RuntimeError: it was not allowed, or the text has become too intricate.
    """
    self._matcher.consume_token(token)
    self._check()

  def _check(self):
    if self._matcher.is_error():
      reason = self._matcher.get_error().strip().splitlines()[0]
      raise RuntimeError(f"the completion has left its grammar: {reason}")


def _shortened(value):
  text = repr(value) if not isinstance(value, str) else value
  return text if len(text) <= 200 else text[:200] + "..."
