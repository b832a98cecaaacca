"""Losses of packed rows against documents scored alone."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.data import packing, rows, tokenizer
from selfimprove_jax.evaluation import perplexity
from selfimprove_jax.models import llama
from selfimprove_jax.models.llama import init_params
from selfimprove_jax.runtime import partitioning

TEXTS = ["A café.", "x", "One two three, four.", "日本", "The last one is the longest of them."]
SEQ_LEN = 48


@pytest.fixture(scope="module")
def words():
  return tokenizer.train_bpe(["one two three four last"] * 3, vocab_size=270)


@pytest.fixture(scope="module")
def model(words):
  return llama.Llama(
    llama.LlamaConfig(
      vocab_size=words.vocab_size,
      num_layers=2,
      embed_dim=16,
      mlp_dim=32,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      dtype="float32",
    )
  )


@pytest.fixture(scope="module")
def params(model):
  params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
  return jax.tree.map(
    lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), nn.unbox(params)
  )


def _write(folder, examples):
  packed = list(packing.pack_labeled(examples, seq_len=SEQ_LEN, pad_id=0, num_open_rows=1))
  counts = rows.write_rows(folder / "rows.array_record", (row for row, _ in packed))
  source = rows.RowSource([folder / "rows.array_record"], counts=[counts], seq_len=SEQ_LEN)
  segments = [
    rows.Segment(**record)
    for number, (_, of_row) in enumerate(packed)
    for record in rows.segments(number, of_row)
  ]
  return rows.LabeledRows(source, segments)


def _label(text, id_=None, group="a"):
  return packing.Label(id_ or text, group, len(text.encode()))


@pytest.fixture(scope="module")
def source(words, tmp_path_factory):
  """Documents, and a pair of which only the second half is predicted."""
  examples = [
    packing.document_example(words.encode(text), words, label=_label(text)) for text in TEXTS
  ]
  one, two = words.encode("One"), words.encode("two")
  examples.append(packing.pair_example(one, two, words, label=_label("two")))
  return _write(tmp_path_factory.mktemp("rows"), examples)


@pytest.fixture(scope="module")
def by_hand(words, model, params):
  """(nats, target tokens, bytes) of each document, scored alone and without packing."""

  @jax.jit
  def log_probs(tokens_1T):
    positions_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
    logits, _ = model.apply({"params": params}, tokens_1T, positions_1T)
    return jax.nn.log_softmax(logits)

  def score(tokens, first_target, num_bytes):
    padded = jnp.array([[*tokens, *[0] * (SEQ_LEN - len(tokens))]], jnp.int32)
    found = np.asarray(log_probs(padded)[0], np.float64)
    nats = -sum(found[t - 1, tokens[t]] for t in range(first_target, len(tokens)))
    return nats, len(tokens) - first_target, num_bytes

  scored = [
    score([words.bos_id, *words.encode(text), words.eos_id], 1, len(text.encode()))
    for text in TEXTS
  ]
  d1, d2 = words.encode("One"), words.encode("two")
  pair = [words.bos_id, *d1, words.sep_id, *d2, words.eos_id]
  return [*scored, score(pair, len(d1) + 2, 3)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_document_has_the_loss_tokens_and_bytes_that_it_has_alone(
  source, words, model, params, by_hand, one_device_mesh, batch_size
):
  scorer = perplexity.RowScorer(model, one_device_mesh, source, batch_size=batch_size)
  found = scorer.documents(params)
  # Several documents a row, and a filled-up batch.
  assert len(source.source) > 1 and len(source.source) % 4
  assert found.ids == [*TEXTS, "two"]
  nats, tokens, num_bytes = (np.array(column) for column in zip(*by_hand))
  np.testing.assert_allclose(found.nll_sums, nats, rtol=1e-5)
  np.testing.assert_array_equal(found.token_counts, tokens)
  np.testing.assert_array_equal(found.byte_counts, num_bytes)


def test_the_mean_weighs_every_token_alike_and_leaves_the_filling_out(
  source, model, params, by_hand, one_device_mesh
):
  nats, tokens, _ = (np.array(column) for column in zip(*by_hand))
  for batch_size in (1, 4):
    scorer = perplexity.RowScorer(model, one_device_mesh, source, batch_size=batch_size)
    assert scorer.mean(params) == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)


def test_a_mesh_gives_the_losses_of_one_device(source, words, model, params, one_device_mesh):
  mesh = partitioning.make_mesh(data=2, fsdp=4, tensor=1)
  on_many = jax.device_put(params, partitioning.replicated(mesh))
  found = perplexity.RowScorer(model, mesh, source, batch_size=8).documents(on_many)
  alone = perplexity.RowScorer(model, one_device_mesh, source, batch_size=1)
  expected = alone.documents(params)
  np.testing.assert_allclose(found.nll_sums, expected.nll_sums, rtol=1e-5)


def test_the_pieces_of_a_document_are_one(words, model, params, tmp_path, one_device_mesh):
  """With the bytes of its text, once: Japanese characters are cut between tokens and rows."""
  text = "日本語の長い文章です。" * 5
  ids = words.encode(text)
  assert len(ids) > 2 * SEQ_LEN  # byte by byte
  example = packing.document_example(ids, words, label=_label(text, "long"))
  source = _write(tmp_path, [example])
  scorer = perplexity.RowScorer(model, one_device_mesh, source, batch_size=1)
  found = scorer.documents(params)
  assert found.ids == ["long"]
  num_pieces = len(source.segments)
  assert found.token_counts == len(ids) + 1 - (num_pieces - 1)  # EOS; not the first of a piece
  expected = len(text.encode()) * (1 - (num_pieces - 1) / (len(ids) + 1))
  assert found.byte_counts == pytest.approx(expected)
  mean = scorer.mean(params)
  assert found.nll_sums / found.token_counts == pytest.approx(mean, rel=1e-6)


def test_the_rows_of_a_few_are_of_all_groups(words, model, params, tmp_path, one_device_mesh):
  """One group fills most rows, as a large file does in a corpus."""
  filling = "one two three four " * 3
  groups = ["large"] * 8 + ["small", "other"]
  examples = [
    packing.document_example(words.encode(filling), words, label=_label(filling, str(i), group))
    for i, group in enumerate(groups)
  ]
  source = _write(tmp_path, examples)
  assert len(source.source) == len(groups)
  whole = perplexity.RowScorer(model, one_device_mesh, source, batch_size=1)
  few = perplexity.RowScorer(model, one_device_mesh, source, batch_size=1, max_rows=4)
  found = few.documents(params)
  assert found.ids == ["0", "1", "8", "9"]
  assert found.groups == ["large", "large", "small", "other"]
  assert few.mean(params) == pytest.approx(whole.mean(params), rel=1e-5)
  more = perplexity.RowScorer(model, one_device_mesh, source, batch_size=1, max_rows=99)
  assert more.mean(params) == whole.mean(params)


def test_dropout_is_off(source, model, params, one_device_mesh):
  dropping = llama.Llama(dataclasses.replace(model.c, dropout_rate=0.5))
  scores = [
    perplexity.RowScorer(m, one_device_mesh, source, batch_size=1).mean(params)
    for m in (model, dropping)
  ]
  assert scores[0] == scores[1]


def test_rows_without_a_target_are_refused(tmp_path, model, params, one_device_mesh):
  untargeted = packing.Example(np.ones(5, np.int32), np.zeros(5, bool), _label("x"))
  with pytest.raises(ValueError, match="no target tokens in the 1 rows"):
    perplexity.RowScorer(model, one_device_mesh, _write(tmp_path, [untargeted]), batch_size=1)


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(source, model):
  mesh = partitioning.make_mesh(data=2, fsdp=4, tensor=1)
  with pytest.raises(ValueError, match="batch_size=4 does not divide over 8 shards"):
    perplexity.RowScorer(model, mesh, source, batch_size=4)
