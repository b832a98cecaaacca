"""Token masks: any random walk over allowed tokens spells a text of the grammar."""

import json
import random
import re
import threading

import jsonschema
import numpy as np
import pytest

from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.sampling.grammar import GrammarCompiler

_TEXTS = ['the cat {"name": "Tom", "age": 3, "tags": ["a", "b"]} sat on the mat, true false null']
_EXTRA = 37  # logits beyond the tokenizer's vocabulary

_PERSON = {
  "type": "object",
  "properties": {
    "name": {"type": "string", "maxLength": 12},
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "colour": {"enum": ["red", "grün", "blue"]},
    "scores": {
      "type": "array",
      "items": {"type": "integer", "minimum": -9, "maximum": 99},
      "minItems": 1,
      "maxItems": 3,
    },
    "address": {"$ref": "#/$defs/address"},
  },
  "required": ["name", "age", "colour", "scores", "address"],
  "additionalProperties": False,
  "$defs": {
    "address": {
      "type": "object",
      "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
      "required": ["zip"],
      "additionalProperties": False,
    }
  },
}


@pytest.fixture(scope="module")
def tokenizer() -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.train_bpe(_TEXTS * 3, vocab_size=320)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
  return GrammarCompiler(
    tokenizer, eos_ids=(tokenizer.eos_id,), vocab_size=tokenizer.vocab_size + _EXTRA
  )


def _allowed(matcher, vocab_size):
  row = np.full(-(-vocab_size // 32), 0xDEADBEEF, np.uint32)
  matcher.allow(row)
  return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def _walk(grammar, tokenizer, seed):
  """Returns a text of random allowed tokens, and its prefixes that could have ended there."""
  rng = random.Random(seed)
  matcher, tokens, endings = grammar.start(), [], []
  special = [t for t in (tokenizer.pad_id, tokenizer.sep_id) if t != tokenizer.eos_id]
  for _ in range(500):
    allowed = _allowed(matcher, tokenizer.vocab_size + _EXTRA)
    assert len(allowed) and allowed.max() < tokenizer.vocab_size
    assert not np.isin(special, allowed).any()
    if tokenizer.eos_id in allowed:
      endings.append(tokenizer.decode(tokens))
    assert matcher.is_finished == (allowed.tolist() == [tokenizer.eos_id])
    token = int(rng.choice(allowed))
    matcher.accept(token)
    if token == tokenizer.eos_id:
      return tokenizer.decode(tokens), endings
    tokens.append(token)
  raise AssertionError(f"no end: {tokenizer.decode(tokens)!r}")


def test_random_walks_under_a_schema_are_json_of_the_schema(compiler, tokenizer):
  grammar = compiler.json_schema(_PERSON)
  for seed in range(30):
    text, endings = _walk(grammar, tokenizer, seed)
    value = json.loads(text)
    jsonschema.validate(value, _PERSON)
    assert list(value) == list(_PERSON["properties"])
    assert endings == [text]  # it could not have ended earlier


def test_json_is_written_in_one_form(compiler, tokenizer):
  schema = {"type": "array", "items": {"enum": [1, {"a": 2, "b": True}]}, "maxItems": 4}
  for seed in range(30):
    text, _ = _walk(compiler.json_schema(schema), tokenizer, seed)
    assert text == json.dumps(json.loads(text))


def test_a_schema_does_not_change_how_json_is_written(compiler, tokenizer):
  schema = {"const": [1, 2], "x-guidance": {"whitespace_flexible": True}}
  assert {_walk(compiler.json_schema(schema), tokenizer, s)[0] for s in range(9)} == {"[1, 2]"}


def test_choices_give_one_of_the_choices(compiler, tokenizer):
  choices = ("yes", "yes please", "no", 'a "quoted"\n\\line', "東京", "/x/", "no")
  grammar = compiler.choices(choices)
  walks = dict(_walk(grammar, tokenizer, seed) for seed in range(80))
  assert set(walks) == set(choices)
  assert walks.pop("yes please") == ["yes", "yes please"]
  assert all(endings == [text] for text, endings in walks.items())


def test_text_may_end_where_the_grammar_may_and_go_on(compiler, tokenizer):
  text, endings = _walk(compiler.regex("[ab]{2,}c?/?"), tokenizer, seed=3)
  assert re.fullmatch("[ab]{2,}c?/?", text)
  assert len(endings) > 1 and all(re.fullmatch("[ab]{2,}c?/?", ending) for ending in endings)


def test_grammar_serves_completions_side_by_side(compiler, tokenizer):
  grammar = compiler.json_schema(_PERSON)
  one, other = grammar.start(), grammar.start()
  for token in tokenizer.encode('{"name": "'):
    one.accept(token)
  size = tokenizer.vocab_size + _EXTRA
  fresh = _allowed(grammar.start(), size).tolist()
  assert _allowed(other, size).tolist() == fresh != _allowed(one, size).tolist()


def test_grammar_of_one_thread_serves_another(compiler, tokenizer):
  grammar, texts = compiler.json_schema(_PERSON), []
  threads = [
    threading.Thread(target=lambda seed=s: texts.append(_walk(grammar, tokenizer, seed)[0]))
    for s in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(texts) == sorted(_walk(grammar, tokenizer, seed)[0] for seed in range(4))


def test_any_of_several_ends_of_sequence_may_end(tokenizer):
  compiler = GrammarCompiler(
    tokenizer, eos_ids=[tokenizer.eos_id, tokenizer.sep_id], vocab_size=tokenizer.vocab_size
  )
  matcher = compiler.choices(["a"]).start()
  matcher.accept(tokenizer.encode("a")[0])
  assert _allowed(matcher, tokenizer.vocab_size).tolist() == sorted(
    [tokenizer.sep_id, tokenizer.eos_id]
  )


def test_token_that_was_not_allowed_raises(compiler, tokenizer):
  matcher = compiler.choices(["yes", "no"]).start()
  with pytest.raises(RuntimeError, match="left its grammar"):
    matcher.accept(tokenizer.encode("x")[0])


@pytest.mark.parametrize(
  ("schema", "reason"),
  [
    ({"type": "objct"}, "objct"),
    ({"properties": {"a": {"$ref": "#/nowhere"}}}, "nowhere"),
    ({"type": "string", "pattern": "(("}, "unclosed"),
    ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"properties": 3}, "properties"),
  ],
)
def test_schema_that_cannot_be_enforced_is_refused_with_the_reason(compiler, schema, reason):
  with pytest.raises(ValueError, match=reason):
    compiler.json_schema(schema)


@pytest.mark.parametrize("choices", [(), ("",), ("a", "")])
def test_no_choice_and_an_empty_one_are_refused(compiler, choices):
  with pytest.raises(ValueError, match="choices are"):
    compiler.choices(choices)


def test_broken_regular_expression_is_refused(compiler):
  with pytest.raises(ValueError, match="unclosed group"):
    compiler.regex("(")


def test_bytes_of_tokens_make_up_the_text(compiler, tokenizer):
  text = "the 東京 cat"
  tokens = tokenizer.encode(text)
  assert b"".join(compiler.token_bytes(token) for token in tokens) == text.encode()
  assert compiler.token_bytes(tokenizer.sep_id) == tokenizer.sep_token.encode()
  assert compiler.token_bytes(tokenizer.vocab_size) == b""


def test_vocabularies_that_do_not_fit_are_refused(tokenizer):
  with pytest.raises(ValueError, match="vocab_size=10"):
    GrammarCompiler(tokenizer, eos_ids=(tokenizer.eos_id,), vocab_size=10)
  with pytest.raises(ValueError, match=r"eos_ids=\[9999\]"):
    GrammarCompiler(tokenizer, eos_ids=[9999], vocab_size=10_000)


def test_gpt2_vocabulary_gives_json_too(real_data):
  end = "<|endoftext|>"
  special = tokenizer_lib.SpecialTokens(bos_token=end, eos_token=end, sep_token=end, pad_token=end)
  tokenizer = tokenizer_lib.load_tokenizer(real_data / "models/gpt2_tokenizer", special)
  size = tokenizer.vocab_size
  compiler = GrammarCompiler(tokenizer, eos_ids=(tokenizer.eos_id,), vocab_size=size + _EXTRA)
  grammar = compiler.json_schema(_PERSON)
  jsonschema.validate(json.loads(_walk(grammar, tokenizer, seed=0)[0]), _PERSON)
