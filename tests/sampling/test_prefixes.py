"""Shared parts of prompts: computed once, and of no effect on any score or completion."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from selfimprove_jax.models import llama
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.sampling import prefixes
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Request, SamplingConfig, ScoreRequest

WINDOW, V = 64, 96
CONFIG = llama.LlamaConfig(
  vocab_size=V,
  num_layers=2,
  embed_dim=16,
  mlp_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  tie_embeddings=False,
  dtype="float32",
)
GREEDY = SamplingConfig(temperature=0.0)


@functools.cache
def _params():
  init = jax.jit(functools.partial(llama.init_params, llama.Llama(CONFIG)))
  params = nn.unbox(init(jax.random.key(0)))
  return params | {"embedding_VD": 50 * params["embedding_VD"]}


@pytest.fixture(scope="module")
def make_engine(one_device_mesh):
  def make(mesh=one_device_mesh, params=None, **options):
    params = jax.device_put(params or _params(), partitioning.replicated(mesh))
    options = dict(eos_ids=(), pad_id=0, num_slots=8, max_length=WINDOW) | options
    return Engine(llama.Llama(CONFIG), params, mesh, **options)

  return make


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
  return make_engine()


def _tokens(length, *seed):
  return np.random.default_rng([length, *seed]).integers(0, V - 1, length).tolist()


def _questions(number=7):
  """Choices of questions that follow one of two texts; every fourth has choices of one token."""
  for i in range(number):
    text, question = _tokens(30, i % 2), _tokens(9 + 3 * i, i)
    prompt = text + question
    for a in range(5):
      yield ScoreRequest(
        prompt=prompt,
        continuation=_tokens(1 if i % 4 == 0 else 2 + a + 7 * (i == 3), i, a),
        shared=(len(text), len(prompt)),
      )


@pytest.fixture(scope="module")
def scores(engine):
  return list(engine.score(_questions()))


def _whole(requests):
  return [type(r)(**{**vars(r), "shared": ()}) for r in requests]


def _spent(engine, before, name):
  return engine.stats().get(name, 0) - before.get(name, 0)


def test_scores_are_those_of_whole_prompts(engine, scores):
  whole = list(engine.score(_whole(_questions())))
  for score, other in zip(scores, whole, strict=True):
    np.testing.assert_allclose(score.logprobs, other.logprobs, atol=2e-5)
    assert score.is_greedy == other.is_greedy and score.error is None


def test_scores_are_the_same_to_the_bit_alone_in_any_order_and_after_others(make_engine, scores):
  engine = make_engine()
  requests = list(_questions())
  for i in (0, 3, 7, 22, 34):
    (alone,) = engine.score([requests[i]])
    np.testing.assert_array_equal(alone.logprobs, scores[i].logprobs)
  for score, other in zip(engine.score(reversed(requests)), reversed(scores), strict=True):
    np.testing.assert_array_equal(score.logprobs, other.logprobs)
  # In another engine's company, where the first part alone is shared already.
  list(engine.score([ScoreRequest(prompt=_tokens(30, 1), continuation=[1], shared=[30])]))
  for score, other in zip(engine.score(requests), scores, strict=True):
    np.testing.assert_array_equal(score.logprobs, other.logprobs)


@pytest.mark.parametrize("is_letter", [True, False])
def test_each_part_is_computed_once(make_engine, is_letter):
  engine = make_engine()
  shots = _tokens(32)
  questions = [_tokens(10 + i % 3, i) for i in range(30)]
  requests = [
    ScoreRequest(
      prompt=shots + q,
      continuation=[a] if is_letter else [a, 1],
      shared=(len(shots),) if is_letter else (len(shots), len(shots + q)),
    )
    for q in questions
    for a in range(4)
  ]
  assert len(list(engine.score(requests))) == 120
  found = engine.stats()
  if is_letter:  # what differs is never read, so a question is one row
    assert found["prefilled_tokens"] == len(shots)
    assert found["scored_tokens"] == sum(map(len, questions))
  else:  # the last token of a question predicts its choices, so it is computed with them
    assert found["prefilled_tokens"] == len(shots) + sum(len(q) - 1 for q in questions)
    assert found["scored_tokens"] == 2 * 120


def _relations(number=9, **options):
  document = _tokens(28, 7)
  for i in range(number):
    relation = _tokens(1 + 4 * (i // 2), i // 2)
    yield Request(
      prompt=document + relation,
      max_new_tokens=6,
      record_id=i,
      shared=[len(document)],
      **options,
    )


@pytest.fixture(scope="module")
def completions(engine):
  return engine.generate(list(_relations()))


def test_completions_are_those_of_whole_prompts(engine):
  requests = list(_relations(sampling=GREEDY, top_logprobs=0))
  found, whole = engine.generate(requests), engine.generate(_whole(requests))
  for completion, other in zip(found, whole, strict=True):
    assert completion.tokens == other.tokens
    logprobs = [[step.logprob for step in c.logprobs] for c in (completion, other)]
    np.testing.assert_allclose(*logprobs, atol=2e-5)


def test_completions_are_the_same_alone_in_another_order_and_after_others(make_engine, completions):
  engine = make_engine()
  requests = list(_relations())
  engine.generate([Request(prompt=_tokens(34, i), max_new_tokens=1, shared=[28]) for i in range(5)])
  for i in (0, 4, 8):
    assert engine.generate([requests[i]])[0].tokens == completions[i].tokens
  found = engine.generate(requests[::-1])
  assert [c.tokens for c in found] == [c.tokens for c in completions[::-1]]


def test_a_document_is_prefilled_once_for_all_its_requests(make_engine):
  engine = make_engine()
  requests = list(_relations())
  engine.generate(requests)
  relations = {tuple(request.prompt[28:-1]) for request in requests}
  # Two requests of one prompt that are admitted in different steps prefill their rest twice.
  most = 28 + sum(len(request.prompt) - 29 for request in requests)
  assert 28 + sum(map(len, relations)) <= engine.stats()["prefilled_tokens"] <= most


def test_long_parts_are_cut_and_still_shared(make_engine, monkeypatch, scores):
  monkeypatch.setitem(prefixes._MAX_SEGMENT, "cpu", 8)
  engine = make_engine()
  for score, other in zip(engine.score(_questions()), scores, strict=True):
    np.testing.assert_allclose(score.logprobs, other.logprobs, atol=2e-5)
  expected = 2 * 30 + sum(9 + 3 * i - 1 for i in range(7))
  assert engine.stats()["prefilled_tokens"] == expected


def test_a_mesh_gives_the_scores_of_one_device(make_engine, scores):
  sharded = make_engine(partitioning.make_mesh(data=2, fsdp=2, tensor=2))
  for score, other in zip(sharded.score(_questions(1)), scores):
    np.testing.assert_allclose(score.logprobs, other.logprobs, atol=2e-5)


def test_a_cache_that_follows_the_load_gives_the_same_greedy_tokens(make_engine, engine):
  served = make_engine(batch_invariant=False)
  requests = list(_relations(sampling=GREEDY))
  found = [completion.tokens for completion in served.generate(requests)]
  assert found == [completion.tokens for completion in engine.generate(requests)]


def test_a_part_that_is_not_a_number_fails_its_own_requests_alone(make_engine, scores):
  poison = V - 1
  params = _params() | {"embedding_VD": _params()["embedding_VD"].at[poison].set(np.nan)}
  # With two slots there is one entry, which every chain takes over from another.
  engine = make_engine(params=params, num_slots=2)
  text = [*_tokens(50), poison]  # behind what the next chain writes
  broken = [ScoreRequest(prompt=[*text, 3], continuation=[a], shared=[51]) for a in (1, 2)]
  for _ in range(2):
    assert all("NaN" in score.error for score in engine.score(broken))
    for score, other in zip(engine.score(_questions(2)), scores):
      assert score.error is None
      np.testing.assert_allclose(score.logprobs, other.logprobs, atol=2e-5)


def test_many_short_parts_and_then_long_ones_are_held_in_turn(make_engine):
  engine = make_engine(num_slots=8, max_length=200)  # 4 of 200 positions, or 12 of 64
  lengths = [20] * 11 + [150, 20, 150, 20, 150, 150, 150, 20]
  requests = [
    ScoreRequest(prompt=[i, *_tokens(length, i)], continuation=[1, 2], shared=[length])
    for i, length in enumerate(lengths)
  ]
  together = list(engine.score(requests))
  for request, score in zip(requests, together, strict=True):
    (alone,) = engine.score([request])
    np.testing.assert_array_equal(alone.logprobs, score.logprobs)


def test_a_part_may_end_at_the_prompts_end_or_behind_it_but_not_before_its_start(engine):
  prompt = _tokens(9)
  ends = ((), (9,), (8,), (100, 0), (4, 4, 8))
  requests = [ScoreRequest(prompt=prompt, continuation=[1, 2], shared=shared) for shared in ends]
  first, *rest = (score.logprob for score in engine.score(requests))
  assert rest == pytest.approx([first] * 4, abs=2e-5)
  (score,) = engine.score([ScoreRequest(prompt=prompt, continuation=[1], shared=[-1])])
  assert "shared holds -1" in score.error
  with pytest.raises(ValueError, match="shared holds -1"):
    engine.submit(Request(prompt=prompt, max_new_tokens=1, shared=[-1]))
