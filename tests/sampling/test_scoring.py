"""Scores of given continuations, against the full pass and the engine's own greedy tokens."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.models import llama
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.sampling import scoring
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Request, SamplingConfig, ScoreRequest

WINDOW, V = 160, 96
CONFIG = llama.LlamaConfig(
  vocab_size=V,
  num_layers=1,
  embed_dim=16,
  mlp_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  tie_embeddings=False,
  dtype="float32",
)


@functools.cache
def _params():
  init = jax.jit(functools.partial(llama.init_params, llama.Llama(CONFIG)))
  params = nn.unbox(init(jax.random.key(0)))
  return params | {"embedding_VD": 50 * params["embedding_VD"]}


@pytest.fixture(scope="module")
def make_engine(one_device_mesh):
  # So small that continuations need several blocks of logits, the last of them cut.
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(scoring._LOGITS_ROWS, "cpu", 24)

    def make(mesh=one_device_mesh, **changes):
      params = jax.device_put(_params() | changes, partitioning.replicated(mesh))
      options = dict(eos_ids=(), pad_id=0, num_slots=4, max_length=WINDOW)
      return Engine(llama.Llama(CONFIG), params, mesh, **options)

    yield make


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
  return make_engine()


def _requests():
  """More than a call takes, of all three buckets."""
  rng = np.random.default_rng(0)
  lengths = [(1, 1), (5, 9), (20, 3), (1, 39), (30, 10), (39, 1), (3, 30), (9, 7)]
  lengths += [(2, 4 + i % 3) for i in range(20)] + [(50, 60), (100, 2), (1, 159), (120, 30)]
  return [
    ScoreRequest(
      prompt=rng.integers(0, V, prompt).tolist(), continuation=rng.integers(0, V, new).tolist()
    )
    for prompt, new in lengths
  ]


@pytest.fixture(scope="module")
def scores(engine):
  return list(engine.score(_requests()))


@jax.jit
def _log_softmax(params, tokens_BT):
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
  logits_BTV = llama.Llama(CONFIG).apply({"params": params}, tokens_BT, positions_BT)[0]
  return jax.nn.log_softmax(logits_BTV, axis=-1)


def test_log_probabilities_are_those_of_the_stacked_models_full_pass(scores):
  requests = _requests()
  rows = [[*request.prompt, *request.continuation] for request in requests]
  tokens = np.array([row + [0] * (WINDOW - len(row)) for row in rows])
  expected = np.asarray(_log_softmax(_params(), tokens))
  for row, request, score in zip(expected, requests, scores, strict=True):
    first = len(request.prompt) - 1
    at = np.arange(first, first + len(request.continuation))
    np.testing.assert_allclose(score.logprobs, row[at, list(request.continuation)], atol=1e-5)
    assert score.logprobs.dtype == np.float32
    assert score.logprob == pytest.approx(np.sum(score.logprobs, dtype=np.float64))
    assert score.is_greedy == (np.argmax(row[at], axis=-1) == request.continuation).all()
    assert score.error is None


def test_a_greedy_completion_is_greedy_and_one_with_another_token_is_not(engine):
  prompts = [request.prompt for request in _requests() if len(request.prompt) <= 30]
  options = dict(max_new_tokens=6, sampling=SamplingConfig(temperature=0.0))
  found = engine.generate([Request(prompt=prompt, **options) for prompt in prompts])
  requests = []
  for prompt, completion in zip(prompts, found):
    requests.append(ScoreRequest(prompt=prompt, continuation=completion.tokens))
    for place in (0, len(completion.tokens) - 1):
      other = completion.tokens.copy()
      other[place] = (other[place] + 1) % V
      requests.append(ScoreRequest(prompt=prompt, continuation=other))
  flags = [score.is_greedy for score in engine.score(requests)]
  assert flags == [True, False, False] * len(prompts)


def test_of_equally_likely_tokens_the_first_is_greedy(make_engine):
  engine = make_engine(head_DV=np.zeros_like(_params()["head_DV"]))
  found = engine.score([ScoreRequest(prompt=[5], continuation=c) for c in ([0, 0], [0, 1], [7])])
  assert [score.is_greedy for score in found] == [True, False, False]


def test_a_score_is_the_same_to_the_bit_alone_and_in_another_order(engine, scores):
  requests = _requests()
  for i in (1, 4, 12, 29, 30):
    (alone,) = engine.score([requests[i]])
    np.testing.assert_array_equal(alone.logprobs, scores[i].logprobs)
  for score, other in zip(engine.score(reversed(requests)), reversed(scores), strict=True):
    np.testing.assert_array_equal(score.logprobs, other.logprobs)
  assert engine._scorer.num_compilations == 3  # one for each bucket


def test_a_mesh_gives_the_scores_of_one_device(make_engine, scores):
  sharded = make_engine(partitioning.make_mesh(data=2, fsdp=2, tensor=2))
  # Short ones only: each bucket would be compiled.
  for score, other in zip(sharded.score(_requests()[8:]), scores[8:], strict=True):
    np.testing.assert_allclose(score.logprobs, other.logprobs, atol=1e-5)
    assert score.is_greedy == other.is_greedy


def test_requests_that_cannot_be_scored_fail_alone_and_in_their_place(engine, scores):
  good = _requests()
  bad = {
    0: (ScoreRequest(prompt=[], continuation=[1]), "a prompt has 0 tokens"),
    3: (ScoreRequest(prompt=[1], continuation=[]), "a continuation has 0 tokens"),
    4: (ScoreRequest(prompt=[1] * 80, continuation=[2] * 81), "have 161 tokens; .* 160"),
    9: (ScoreRequest(prompt=[1], continuation=[V]), f"holds token {V}; the model has 0 to {V - 1}"),
  }
  requests = list(good)
  for place, (request, _) in bad.items():
    requests.insert(place, request)
  found = list(engine.score(iter(requests)))
  for place, (_, message) in sorted(bad.items(), reverse=True):
    failed = found.pop(place)
    assert re.search(message, failed.error)
    assert failed.logprobs.size == 0 and not failed.is_greedy
  for score, other in zip(found, scores, strict=True):
    np.testing.assert_array_equal(score.logprobs, other.logprobs)


def test_logits_that_are_not_numbers_fail_their_own_request(make_engine, scores):
  poison = V - 1
  engine = make_engine(embedding_VD=_params()["embedding_VD"].at[poison].set(np.nan))
  requests = [r for r in _requests() if poison not in [*r.prompt, *r.continuation]][:6]
  known = [s for r, s in zip(_requests(), scores) if poison not in [*r.prompt, *r.continuation]]
  broken = ScoreRequest(prompt=[3, poison], continuation=[4])
  first, *rest = engine.score([broken, *requests])
  assert "NaN" in first.error
  for score, other in zip(rest, known):
    np.testing.assert_array_equal(score.logprobs, other.logprobs)


def test_requests_are_read_lazily(engine, monkeypatch):
  monkeypatch.setattr(scoring, "_LOOK_AHEAD", 5)
  taken = []

  def endless():
    while True:
      taken.append(1)
      yield ScoreRequest(prompt=[1], continuation=[2])

  found = engine.score(endless())
  assert next(found).error is None
  assert len(taken) == 5
