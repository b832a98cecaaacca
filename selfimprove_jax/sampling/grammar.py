"""Constraints on a completion: a JSON schema, a list of choices, a regular expression.

Built on llguidance, which computes for each state of a grammar the mask of allowed next tokens.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfimprove_jax.data.tokenizer import Tokenizer

# The separators of `json.dumps`. With flexible whitespace a small model that once starts a run of
# blanks may never end it.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
  """Compiles grammars for one model's vocabulary; takes seconds to construct, so keep it."""

  def __init__(self, tokenizer: Tokenizer, *, eos_ids: Sequence[int], vocab_size: int):
    """Args:
      eos_ids: tokens that end a completion and are not part of its text.
      vocab_size: number of the model's logits; those beyond the tokenizer's are never allowed.

    Raises:
      ValueError: the tokenizer has more tokens than `vocab_size`, or lacks one of `eos_ids`.
      ImportError: llguidance is not installed.
    """
    try:
      import llguidance
    except ImportError:
      raise ImportError(
        "grammars need the package llguidance: pip install 'selfimprove_jax[grammar]'"
      ) from None
    if vocab_size < tokenizer.vocab_size:
      raise ValueError(f"vocab_size={vocab_size}; the tokenizer has {tokenizer.vocab_size} tokens")
    if not eos_ids or not all(0 <= token < tokenizer.vocab_size for token in eos_ids):
      raise ValueError(
        f"eos_ids={eos_ids}; the tokenizer has tokens 0 to {tokenizer.vocab_size - 1}"
      )
    self._matcher = llguidance.LLMatcher
    self._tokens = llguidance.LLTokenizer(
      tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(eos_ids)
    )
    self._num_tokens = tokenizer.vocab_size
    self._num_words = -(-vocab_size // 32)

  def json_schema(self, schema: dict[str, Any]) -> "Grammar":
    """Compiles a JSON schema: JSON formatted as by `json.dumps`, keys in the schema's order.

    `{"type": "object"}` allows any JSON object.

    Raises:
      ValueError: the schema is invalid, matches nothing, or uses a keyword that llguidance cannot
        enforce (such as `not` or `uniqueItems`).
    """
    definition = self._matcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_FORM)
    return self._compile(definition, f"JSON schema {_shortened(json.dumps(schema))}")

  def choices(self, choices: Sequence[str]) -> "Grammar":
    """Compiles a list of allowed texts.

    Raises:
      ValueError: the list or one of the texts is empty.
    """
    if not choices or not all(choices):
      raise ValueError(f"choices are {choices!r}; at least one is needed, and none may be empty")
    lark = "start: " + " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices))
    return self._compile(self._matcher.grammar_from_lark(lark), f"choices {_shortened(choices)}")

  def regex(self, pattern: str) -> "Grammar":
    """Compiles a regular expression for the whole text (Rust's `regex` syntax: no look-around).

    Raises:
      ValueError: the expression is invalid.
    """
    definition = self._matcher.grammar_from_regex(pattern)
    return self._compile(definition, f"regular expression {_shortened(pattern)}")

  def token_bytes(self, token: int) -> bytes:
    """Returns a token's bytes, perhaps part of a character; for a special token, its name.

    A token beyond the tokenizer's vocabulary has no bytes.
    """
    return self._tokens.decode_bytes([token]) if token < self._num_tokens else b""

  def _compile(self, definition: str, name: str) -> "Grammar":
    matcher = self._matcher(self._tokens, definition, log_level=0)
    if matcher.is_error():
      raise ValueError(f"{name} cannot be enforced: {matcher.get_error().strip()}")
    grammar = Grammar(matcher, self._num_words)
    first = np.zeros(self._num_words, np.uint32)
    try:
      grammar.start().allow(first)
    except RuntimeError as error:
      raise ValueError(f"{name} cannot be enforced: {error}") from error
    if not first.any():
      raise ValueError(f"{name} allows no text at all")
    return grammar


class Grammar:
  """A compiled grammar; any number of completions may use it at once."""

  def __init__(self, matcher: Any, num_words: int):
    self._matcher = matcher
    self._num_words = num_words

  @property
  def num_words(self) -> int:
    """Number of 32-bit words in a mask over the vocabulary."""
    return self._num_words

  def start(self) -> "Matcher":
    """Returns a matcher for one completion, at its beginning."""
    return Matcher(self._matcher.deep_copy(), self._num_words)


class Matcher:
  """The state of one completion within its grammar."""

  def __init__(self, matcher: Any, num_words: int):
    self._matcher = matcher
    self._num_words = num_words

  @property
  def is_finished(self) -> bool:
    """Whether only the end of sequence may follow."""
    return self._matcher.is_stopped()

  def allow(self, row: np.ndarray) -> None:
    """Writes the mask of tokens that may come next: bit `i % 32` of word `i // 32` for token `i`.

    The end of sequence is among them wherever the text may end.

    Args:
      row: contiguous uint32, one bit per token of the vocabulary; overwritten.

    Raises:
      RuntimeError: the grammar's state exceeds llguidance's limits.
    """
    assert row.dtype == np.uint32 and row.shape == (self._num_words,) and row.flags.c_contiguous
    self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    self._check()

  def accept(self, token: int) -> None:
    """Advances by a token that `allow` allowed.

    Raises:
      RuntimeError: it was not allowed, or the grammar's state exceeds llguidance's limits.
    """
    self._matcher.consume_token(token)
    self._check()

  def _check(self) -> None:
    if self._matcher.is_error():
      reason = self._matcher.get_error().strip().splitlines()[0]
      raise RuntimeError(f"the completion has left its grammar: {reason}")


def _shortened(value: Any) -> str:
  text = repr(value) if not isinstance(value, str) else value
  return text if len(text) <= 200 else text[:200] + "..."
