import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax import partitioning
from selfimprove_jax.models import llama
from selfimprove_jax.sampling import engine, sampler
from selfimprove_jax.training import train_step

EOS, PAD, MAX_NEW = 3, 0, 6
BUCKETS = (4, 8)
CONFIG = llama.LlamaConfig(
  vocab_size=32,
  num_layers=2,
  embed_dim=16,
  mlp_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  tie_embeddings=False,
  dtype="float32",
)
MODEL = llama.Llama(CONFIG)
GREEDY = sampler.SamplingConfig(temperature=0.0)
DRAWN = sampler.SamplingConfig(temperature=1.0, top_p=0.95)


@functools.cache
def _params():
  """Embeddings as large as what the layers add, so that greedy completions differ."""
  params = nn.unbox(jax.jit(functools.partial(train_step.init_params, MODEL))(jax.random.key(0)))
  return params | {"embedding_VD": 50 * params["embedding_VD"]}


@functools.cache
def _engine(mesh, sampling=DRAWN, batch_size=4, buckets=BUCKETS):
  return engine.Engine(
    MODEL,
    jax.device_put(_params(), partitioning.replicated(mesh)),
    mesh,
    sampling=sampling,
    eos_id=EOS,
    pad_id=PAD,
    batch_size=batch_size,
    prompt_buckets=buckets,
    max_new_tokens=MAX_NEW,
  )


def _prompts(count=11):
  """Of both buckets, mixed."""
  r = np.random.default_rng(0)
  return [r.integers(4, 32, r.integers(1, 9)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def completions(one_device_mesh):
  prompts = _prompts()
  return _engine(one_device_mesh).generate(prompts, seed=5, record_ids=range(len(prompts)))


def test_a_completion_ends_before_the_end_of_sequence_or_at_the_most_tokens(completions):
  for completion in completions:
    assert EOS not in completion.tokens
    if completion.finish_reason == "length":
      assert len(completion.tokens) == MAX_NEW
    else:
      assert completion.finish_reason == "stop"
      assert len(completion.tokens) < MAX_NEW
  assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_a_completion_depends_on_neither_order_nor_batch_mates(one_device_mesh, completions):
  prompts, sampled = _prompts(), _engine(one_device_mesh)
  order = np.random.default_rng(1).permutation(len(prompts)).tolist()
  shuffled = sampled.generate([prompts[i] for i in order], seed=5, record_ids=order)
  assert shuffled == [completions[i] for i in order]
  for i in (0, 7):
    assert sampled.generate([prompts[i]], seed=5, record_ids=[i]) == [completions[i]]


def test_seed_and_record_id_choose_the_draw(one_device_mesh, completions):
  sampled = _engine(one_device_mesh)
  prompt = next(p for p, c in zip(_prompts(), completions) if c.finish_reason == "length")
  draws = {
    (seed, record): tuple(sampled.generate([prompt], seed=seed, record_ids=[record])[0].tokens)
    for seed in (0, 1)
    for record in (0, 1, 2**32 - 1)
  }
  assert len(set(draws.values())) == 6
  twice = sampled.generate([prompt] * 2, seed=0, record_ids=[1, 1])
  assert tuple(twice[0].tokens) == tuple(twice[1].tokens) == draws[0, 1]


def test_a_mesh_gives_the_completions_of_one_device(completions):
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  prompts = _prompts()
  found = _engine(mesh).generate(prompts, seed=5, record_ids=range(len(prompts)))
  assert found == completions


def test_greedy_completions_are_the_teacher_forced_argmax_of_the_model(one_device_mesh):
  prompts = _prompts()
  greedy = _engine(one_device_mesh, GREEDY)
  found = greedy.generate(prompts, seed=0, record_ids=range(len(prompts)))
  apply = jax.jit(MODEL.apply)
  for prompt, completion in zip(prompts, found, strict=True):
    tokens = [*prompt, *completion.tokens]
    if completion.finish_reason == "stop":
      tokens.append(EOS)
    row = jnp.array([tokens + [PAD] * (16 - len(tokens))], jnp.int32)
    logits, _ = apply({"params": _params()}, row, jnp.arange(16, dtype=jnp.int32)[None])
    predicted = np.argmax(logits[0], axis=-1)
    assert predicted[len(prompt) - 1 : len(tokens) - 1].tolist() == tokens[len(prompt) :]
  assert len({tuple(completion.tokens) for completion in found}) > 3


def test_it_compiles_once_for_each_bucket_that_occurs(one_device_mesh):
  fresh = _engine(one_device_mesh, GREEDY, buckets=(8, 4, 500))
  assert fresh.num_compilations == 0
  for length in (1, 2, 4, 3):
    fresh.generate([[5] * length] * length, seed=length, record_ids=range(length))
  assert fresh.num_compilations == 1
  for lengths in ((5, 1, 8), (2, 6), (4, 7) * 9):
    prompts = [[6] * length for length in lengths]
    fresh.generate(prompts, seed=0, record_ids=range(len(prompts)))
  assert fresh.num_compilations == 2


def test_progress_is_told_after_every_batch(one_device_mesh, completions):
  told = []
  prompts = _prompts()
  _engine(one_device_mesh).generate(
    prompts,
    seed=5,
    record_ids=range(len(prompts)),
    on_batch=lambda *numbers: told.append(numbers),
  )
  short = sum(len(prompt) <= BUCKETS[0] for prompt in prompts)
  assert len(told) == -(-short // 4) + -(-(len(prompts) - short) // 4)
  assert max(count for count, _ in told) == 4
  totals = [sum(numbers) for numbers in zip(*told)]
  assert totals == [len(prompts), sum(len(completion.tokens) for completion in completions)]


def test_nothing_is_made_of_no_prompts(one_device_mesh):
  assert _engine(one_device_mesh).generate([], seed=0, record_ids=[]) == []


@pytest.mark.parametrize("length", [0, 9])
def test_an_empty_or_too_long_prompt_is_refused(one_device_mesh, length):
  with pytest.raises(ValueError, match=rf"prompt has {length} tokens.*between 1 and 8"):
    _engine(one_device_mesh).generate([[5], [5] * length], seed=0, record_ids=[0, 1])


def test_record_ids_must_be_as_many_as_prompts(one_device_mesh):
  with pytest.raises(ValueError, match="2 prompts, but 3 record_ids"):
    _engine(one_device_mesh).generate([[5], [6]], seed=0, record_ids=[0, 1, 2])


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused():
  mesh = partitioning.make_mesh(data=8, fsdp=1, tensor=1)
  with pytest.raises(ValueError, match="batch_size=4 does not divide over 8 shards"):
    _engine(mesh)
