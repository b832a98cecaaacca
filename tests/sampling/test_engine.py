"""The engine on tiny random models: the completion of a request, whatever else is sampled."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.models import llama
from selfimprove_jax.models.llama import init_params
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.sampling import decode
from selfimprove_jax.sampling import engine as engine_lib
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Request, SamplingConfig
from selfimprove_jax.training import losses

SLOTS, WINDOW, V = 4, 40, 336
GREEDY = SamplingConfig(temperature=0.0)
# Untied, so that a NaN in an embedding matters in prompts only, not in the logits of all.
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
MODEL = llama.Llama(CONFIG)


@functools.cache
def _params():
  """Scales embeddings to the size of the layers' outputs, and the head so that tokens differ."""
  params = nn.unbox(jax.jit(functools.partial(init_params, MODEL))(jax.random.key(0)))
  return params | {
    "embedding_VD": 50 * params["embedding_VD"],
    "head_DV": 2 * params["head_DV"],
  }


@pytest.fixture(scope="module")
def tokenizer() -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.train_bpe(["the cat sat on the mat, red green blue"] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def make_engine(one_device_mesh, tokenizer):
  def make(params=None, mesh=one_device_mesh, config=CONFIG, **options):
    options = {
      "eos_ids": (tokenizer.eos_id,),
      "pad_id": tokenizer.pad_id,
      "num_slots": SLOTS,
      "max_length": WINDOW,
      "decode_text": tokenizer.decode,
      **options,
    }
    params = jax.device_put(_params() if params is None else params, partitioning.replicated(mesh))
    return Engine(llama.Llama(config), params, mesh, **options)

  return make


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
  """One engine for most tests, so that each follows the requests of others."""
  return make_engine()


def _prompt(length, seed=0):
  return np.random.default_rng([length, seed]).integers(4, 300, length).tolist()


def _requests(**options):
  """Makes more requests than slots, in three buckets, and one of a single token."""
  lengths = [5, 1, 17, 9, 30, 12, 16, 2, 22]
  options = {"max_new_tokens": 8, "seed": 5, **options}
  return [
    Request(prompt=_prompt(length), record_id=record, **options)
    for record, length in enumerate(lengths)
  ]


@pytest.fixture(scope="module")
def completions(engine):
  return engine.generate(_requests())


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, tokens_BT, config):
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
  model = llama.Llama(config)
  hidden = model.apply({"params": params}, tokens_BT, positions_BT, logits=False)[0]
  head_VD = llama.output_head(params).astype(hidden.dtype)
  logits = jnp.einsum("BTD,VD->BTV", hidden, head_VD, preferred_element_type=jnp.float32)
  return logits, losses.next_token_nll(hidden, head_VD, tokens_BT)


def _full_pass(requests, completions, config=CONFIG):
  """Returns the stacked model's logits and the trainer's loss for each token of each request."""
  rows = [[*r.prompt, *c.tokens] for r, c in zip(requests, completions, strict=True)]
  tokens = np.zeros((9, WINDOW), np.int32)  # a fixed size, to compile once
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  logits, nll = map(np.asarray, _forward(_params(), tokens, config))
  spans = [slice(len(r.prompt), len(row)) for r, row in zip(requests, rows)]
  return [(logits[i, span.start - 1 : span.stop - 1], nll[i, span]) for i, span in enumerate(spans)]


# Drawn tokens.


def test_greedy_completions_are_the_teacher_forced_argmax_of_the_stacked_model(engine):
  requests = _requests(sampling=GREEDY)
  found = engine.generate(requests)
  for (logits, _), completion in zip(_full_pass(requests, found), found, strict=True):
    assert completion.tokens == np.argmax(logits, axis=-1).tolist()
  assert len({tuple(completion.tokens) for completion in found}) == len(found)
  assert len({token for completion in found for token in completion.tokens}) > 15


def test_logprobs_are_the_trainers_and_the_likeliest_are_those_of_the_full_pass(engine):
  requests = [
    dataclasses.replace(request, top_logprobs=top)
    for request, top in zip(_requests(sampling=SamplingConfig(temperature=0.7)), [0, 3, 20] * 3)
  ]
  found = engine.generate(requests)
  for request, completion, (logits, nll) in zip(requests, found, _full_pass(requests, found)):
    values = np.array([entry.logprob for entry in completion.logprobs])
    np.testing.assert_allclose(values, -nll, atol=1e-5)
    expected = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    for row, entry, token in zip(expected, completion.logprobs, completion.tokens):
      assert entry.logprob == pytest.approx(row[token], abs=1e-5)
      likeliest = np.argsort(-row, kind="stable")[: request.top_logprobs]
      assert [token for token, _ in entry.top] == likeliest.tolist()
      np.testing.assert_allclose([value for _, value in entry.top], row[likeliest], atol=1e-5)
  assert engine.generate(_requests()[:1])[0].logprobs is None


@pytest.mark.slow
def test_in_bfloat16_logprobs_are_the_trainers_to_within_its_rounding(make_engine):
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  requests = [r for r in _requests(top_logprobs=0) if len(r.prompt) <= 17]  # one bucket
  found = make_engine(config=config).generate(requests)
  values = np.array([[entry.logprob for entry in c.logprobs] for c in found])
  trainers = -np.array([nll for _, nll in _full_pass(requests, found, config)])
  exact = -np.array([nll for _, nll in _full_pass(requests, found)])
  # Logits of standard deviation 2 have steps of 1/64 and are sums of 16 rounded numbers.
  assert np.abs(values - trainers).max() < 0.2
  assert np.std(values - trainers) < 0.05
  assert 1e-3 < np.std(values - exact) < 2 * np.std(trainers - exact)


def test_a_temperature_draws_as_often_as_the_full_pass_says(engine):
  request = Request(
    prompt=_prompt(5), max_new_tokens=1, sampling=SamplingConfig(temperature=0.8, top_k=5)
  )
  requests = [dataclasses.replace(request, sample=sample) for sample in range(200)]
  found = engine.generate(requests)
  drawn = [completion.tokens[0] for completion in found]
  logits = _full_pass([request], found[:1])[0][0][0] / 0.8
  likeliest = np.argsort(-logits)[:5]
  weights = np.exp(logits[likeliest] - logits.max())
  counts = np.array([drawn.count(token) for token in likeliest])
  assert counts.sum() == 200
  deviation = np.sqrt(200 * weights / weights.sum() * (1 - weights / weights.sum()))
  assert (np.abs(counts - 200 * weights / weights.sum()) < 4 * deviation + 1).all()


def test_penalties_count_the_prompt_and_all_tokens_drawn_across_calls(make_engine, engine):
  c = SamplingConfig(
    temperature=0.0, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.5
  )
  # 20 tokens are more than one call draws; the second request repeats tokens, so counts matter.
  requests = [Request(prompt=_prompt(n), max_new_tokens=20, sampling=c) for n in (6, 13)]
  found = engine.generate(requests)
  for request, completion, (logits, _) in zip(requests, found, _full_pass(requests, found)):
    for step, row in enumerate(logits):
      drawn = completion.tokens[:step]
      row = row.copy()
      seen = sorted({*request.prompt, *drawn})
      row[seen] = np.where(row[seen] > 0, row[seen] / 1.4, row[seen] * 1.4)
      for token in set(drawn):
        row[token] -= 0.3 + 0.5 * drawn.count(token)
      assert completion.tokens[step] == np.argmax(row)
  free = engine.generate([dataclasses.replace(r, sampling=GREEDY) for r in requests])
  assert [c.tokens for c in free] != [c.tokens for c in found]


# Independence of other requests.


def test_a_completion_is_the_same_alone_in_another_order_and_as_a_stream(engine, completions):
  requests = _requests()
  for i in (0, 4, 7):
    assert engine.generate([requests[i]]) == [completions[i]]
  assert engine.generate(requests[::-1]) == completions[::-1]
  assert dict(engine.stream(iter(requests))) == dict(enumerate(completions))
  assert len({tuple(completion.tokens) for completion in completions}) == len(completions)


def test_a_completion_is_the_same_beside_requests_that_ask_for_all_else(engine, completions):
  company = [
    Request(
      prompt=_prompt(3 + i),
      max_new_tokens=1 + 3 * i,
      seed=99,
      sample=i,
      sampling=SamplingConfig(
        temperature=0.2 + i, top_k=3, top_p=0.8, repetition_penalty=1.2, frequency_penalty=0.1
      ),
      min_new_tokens=2,
      top_logprobs=2,
    )
    for i in range(4)
  ]
  requests = _requests()
  mixed = [company[0], requests[3], company[1], requests[0], company[2], company[3], requests[4]]
  found = engine.generate(mixed)
  assert [found[i] for i in (1, 3, 6)] == [completions[i] for i in (3, 0, 4)]


def test_samples_of_one_prompt_share_its_prefill_and_are_what_each_is_alone(engine):
  request = Request(prompt=_prompt(11), max_new_tokens=6, seed=2)
  requests = [dataclasses.replace(request, sample=sample) for sample in range(6)]
  before = engine.stats()
  together = engine.generate(requests)
  now = engine.stats()
  # One prefill of ten tokens fills all slots; others refill two of them.
  assert now["prompt_tokens"] - before["prompt_tokens"] == 66
  assert now["prefilled_tokens"] - before["prefilled_tokens"] <= 30
  assert [engine.generate([r])[0] for r in requests] == together
  assert len({tuple(completion.tokens) for completion in together}) == 6


@pytest.mark.parametrize("name", ["seed", "record_id", "sample"])
def test_the_seed_the_record_and_the_sample_choose_the_draw_each(engine, completions, name):
  first = _requests()[0]
  values = [2**32 - 1, 7] + ([2**32 + 7, 2**64 - 1] if name == "record_id" else [])
  others = [dataclasses.replace(first, **{name: value}) for value in values]
  found = [tuple(c.tokens) for c in engine.generate([first, *others])]
  assert list(found[0]) == completions[0].tokens
  assert len(set(found)) == len(found)


@pytest.mark.slow
def test_a_mesh_gives_the_completions_of_one_device(make_engine, completions, engine):
  sharded = make_engine(mesh=partitioning.make_mesh(data=4, fsdp=1, tensor=2))
  assert sharded.generate(_requests()[:4]) == completions[:4]
  greedy = _requests(sampling=GREEDY)[:4]
  assert sharded.generate(greedy) == engine.generate(greedy)


def test_prefills_that_are_not_padded_give_the_same_greedy_tokens(make_engine, engine):
  served = make_engine(batch_invariant=False)
  requests = _requests(sampling=GREEDY)
  assert served.generate(requests) == engine.generate(requests)
  assert served.stats()["prefills"] < engine.stats()["prefills"]


@pytest.mark.slow
def test_shapes_that_follow_the_load_give_the_same_greedy_tokens(make_engine, monkeypatch):
  monkeypatch.setattr(engine_lib, "_LEAST_CACHE", 8)
  monkeypatch.setattr(decode, "_PREFILL_TOKENS", 34)  # one prompt per prefill
  monkeypatch.setattr(decode, "STEPS_PER_CALL", 4)
  # Programs of this config are compiled with 16 steps.
  config = dataclasses.replace(CONFIG, scan_unroll=2)
  served = make_engine(config=config, batch_invariant=False, prompt_buckets=(34,))
  assert served._cache_length == 8
  short = Request(prompt=_prompt(5), max_new_tokens=3, sampling=GREEDY)
  long = Request(prompt=_prompt(35), max_new_tokens=5, sampling=GREEDY)
  middle = Request(prompt=_prompt(9), max_new_tokens=8, sampling=GREEDY)
  alone = served.generate([short])
  assert served._cache_length == 16
  # Later prefills need less, and do not shorten the cache of the first one.
  requests = [long, middle, short]
  together = served.generate(requests)
  assert served._cache_length == WINDOW
  assert alone == together[2:]
  for (logits, _), completion in zip(_full_pass(requests, together), together, strict=True):
    assert completion.tokens == np.argmax(logits, axis=-1).tolist()
  assert served.generate([short]) == alone
  assert served._cache_length == 16


@pytest.mark.slow
def test_number_of_programs_depends_on_the_buckets_not_on_the_lengths(make_engine):
  # A config of its own, because engines of one config share their programs.
  fresh = make_engine(config=dataclasses.replace(CONFIG, norm_eps=1e-4))
  assert fresh.num_compilations == 0
  for count in (1, 3, 9):
    for lengths in ([1], [2, 16, 17], [18, 33], [39, 34], [1, 2, 33], range(1, 40, 5)):
      prompts = [_prompt(length) for length in lengths]
      fresh.generate(
        [
          Request(prompt=prompt, max_new_tokens=1 + sample % 3, sample=sample)
          for prompt in prompts
          for sample in range(count)
        ]
      )
  # At most two numbers of requests for each of three buckets; one without a prefill; and `draw`.
  assert fresh.num_compilations <= 3 * 2 + 1 + 1


# Ends.


def test_a_completion_ends_at_its_own_limit_or_where_the_window_is_full(engine):
  requests = [
    Request(prompt=_prompt(n), max_new_tokens=m, ignore_eos=True)
    for n, m in [(3, 1), (4, 17), (30, 99)]
  ]
  found = engine.generate(requests)
  assert [len(completion.tokens) for completion in found] == [1, 17, 10]
  assert {completion.finish_reason for completion in found} == {"length"}
  (whole,) = engine.generate([Request(prompt=_prompt(39), max_new_tokens=5, ignore_eos=True)])
  assert len(whole.tokens) == 1 and whole.finish_reason == "length"


def test_stop_tokens_end_it_and_are_left_out(engine, make_engine, completions):
  request, whole = _requests()[2], completions[2].tokens
  at = whole.index(whole[3])
  (found,) = engine.generate([dataclasses.replace(request, stop_ids=(1, whole[3]))])
  assert (found.tokens, found.stop) == (whole[:at], whole[3])
  assert found.finish_reason == "stop"
  # The end of sequence is a stop token too.
  other = make_engine(eos_ids=(whole[3],))
  assert other.generate([request]) == [found]
  (nothing,) = engine.generate([dataclasses.replace(request, stop_ids=(whole[0],))])
  assert (nothing.tokens, nothing.text, nothing.finish_reason) == ([], "", "stop")


def test_no_stop_token_is_drawn_before_min_new_tokens_nor_an_ignored_eos(
  make_engine,
):
  # Its likely tokens all end it.
  request = dataclasses.replace(_requests()[2], max_new_tokens=20)
  likely = make_engine().generate([request])[0].tokens
  eos, stop_ids = likely[0], tuple(dict.fromkeys(likely[1:]))[:8]
  ending = make_engine(eos_ids=(eos,))
  request = dataclasses.replace(request, stop_ids=stop_ids)
  requests = [
    dataclasses.replace(request, min_new_tokens=least, sample=sample)
    for least in (0, 5, 9)
    for sample in range(4)
  ]
  found = ending.generate(requests)
  for request_, completion in zip(requests, found):
    assert len(completion.tokens) >= request_.min_new_tokens
    assert not {eos, *stop_ids} & set(completion.tokens)
  assert found[0].tokens == []  # the first token of `likely` ends it
  endless = dataclasses.replace(requests[0], stop_ids=(), ignore_eos=True)
  (found,) = ending.generate([endless])
  assert (len(found.tokens), found.finish_reason) == (20, "length")
  assert eos not in found.tokens


def test_stop_strings_end_it_wherever_tokens_begin_and_the_text_is_cut_before(engine, tokenizer):
  request = dataclasses.replace(_requests()[3], max_new_tokens=20)
  (whole,) = engine.generate([request])
  assert whole.text == tokenizer.decode(whole.tokens)
  text = whole.text
  stop = next(
    text[i : i + 3]
    for i in range(4, len(text) - 3)
    if "\N{REPLACEMENT CHARACTER}" not in text[i : i + 3] and text.find(text[i : i + 3]) == i
  )
  company = [dataclasses.replace(request, sample=i) for i in (1, 2)]
  cut, *others = engine.generate(
    [dataclasses.replace(request, stop_strings=("no such", stop)), *company]
  )
  assert (cut.text, cut.stop, cut.finish_reason) == (text[: text.index(stop)], stop, "stop")
  # Its tokens end with the one that completed the string.
  assert cut.tokens == whole.tokens[: len(cut.tokens)]
  assert stop in tokenizer.decode(cut.tokens)
  assert stop not in tokenizer.decode(cut.tokens[:-1])
  assert others == engine.generate(company)


def test_a_grammar_holds_for_its_own_request_alone(engine, tokenizer, completions):
  pytest.importorskip("llguidance")
  from selfimprove_jax.sampling.grammar import GrammarCompiler

  compiler = GrammarCompiler(tokenizer, eos_ids=(tokenizer.eos_id,), vocab_size=V)
  choices = compiler.choices(["red", "green", "blue mat"])
  hot = SamplingConfig(temperature=8.0)
  constrained = [
    Request(prompt=_prompt(7), max_new_tokens=20, sample=sample, grammar=choices, sampling=hot)
    for sample in range(8)
  ]
  plain = _requests()
  found = engine.generate([*constrained[:3], *plain[:3], *constrained[3:]])
  assert found[3:6] == completions[:3]
  texts = [completion.text for completion in found[:3] + found[6:]]
  assert set(texts) <= {"red", "green", "blue mat"} and len(set(texts)) > 1
  assert {completion.finish_reason for completion in found[:3] + found[6:]} == {"stop"}
  # It could end after the first word, but the end of sequence is never drawn.
  bound = dataclasses.replace(constrained[0], grammar=compiler.regex("red( red)?"), ignore_eos=True)
  longer, fine = engine.generate([bound, plain[0]])
  assert (longer.text, longer.finish_reason) == ("red red", "stop")
  assert fine == completions[0]


# Submit, step, cancel.


def test_updates_of_a_request_add_up_to_its_completion(engine, completions):
  requests = _requests(top_logprobs=1)
  updates = {}
  tickets = [
    engine.submit(request, updates.setdefault(i, []).append) for i, request in enumerate(requests)
  ]
  ended = {}
  while engine.num_running or engine.num_waiting:
    ended.update(engine.step())
  assert engine.step() == []
  assert set(ended) == set(tickets)
  for i, ticket in enumerate(tickets):
    completion, parts = ended[ticket], updates[i]
    assert completion.tokens == completions[i].tokens and completion.text == completions[i].text
    assert [token for part in parts for token in part.tokens] == completion.tokens
    assert "".join(part.text for part in parts) == completion.text
    assert [entry for part in parts for entry in part.logprobs] == completion.logprobs
    assert [part.completion for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].completion == completion
    assert len(parts) > 2 and len(parts[0].tokens) == 1  # the first token is not delayed


def test_a_cancelled_request_leaves_its_slot_or_the_queue_and_the_others_unharmed(
  engine, completions
):
  requests = _requests()
  before = engine.stats().get("cancelled", 0)
  tickets = [engine.submit(request, lambda update: None) for request in requests]
  ended = dict(engine.step())
  assert (engine.num_running, engine.num_waiting) == (SLOTS, len(requests) - SLOTS)
  for i in (1, 3, 6, 8):
    engine.cancel(tickets[i])
  assert (engine.num_running, engine.num_waiting) == (SLOTS - 2, len(requests) - SLOTS - 2)
  while engine.num_running or engine.num_waiting:
    ended.update(engine.step())
  engine.cancel(tickets[0])  # it has ended
  assert ended == {tickets[i]: completions[i] for i in (0, 2, 4, 5, 7)}
  assert engine.stats()["cancelled"] - before == 4


def test_a_request_whose_logits_are_nan_fails_alone_and_leaves_nothing_behind(
  make_engine, completions
):
  poison = 290
  params = _params()
  params = params | {"embedding_VD": params["embedding_VD"].at[poison].set(np.nan)}
  requests = _requests()
  assert all(poison not in [*r.prompt, *c.tokens] for r, c in zip(requests, completions))
  broken = [
    Request(prompt=[*_prompt(20), poison, 5, 6], max_new_tokens=8, record_id=50),
    Request(prompt=[poison], max_new_tokens=8, record_id=51),
  ]
  poisoned = make_engine(params)
  order = [broken[0], *requests[:2], broken[1], *requests[2:]]
  found = poisoned.generate(order)
  for failed in (found[0], found[3]):
    assert (failed.tokens, failed.finish_reason) == ([], "error")
    assert "not numbers" in failed.error
  # Later requests in the slot have shorter prompts, so its keys remain at later positions.
  assert [*found[1:3], *found[4:]] == completions
  assert poisoned.generate(requests) == completions
  assert poisoned.stats()["error"] == 2


def test_requests_are_taken_as_slots_become_free(engine, completions):
  taken = []

  def endless():
    while True:
      for request in _requests():
        taken.append(request)
        yield request

  stream = engine.stream(endless())
  found = {}
  while len(found) < 12:
    assert len(taken) <= len(found) + 3 * SLOTS
    place, completion = next(stream)
    found[place] = completion
  stream.close()
  assert all(completion == completions[place % 9] for place, completion in found.items())
  assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_progress_is_told_and_counted(engine, completions):
  told = []
  before = engine.stats()
  assert dict(engine.stream(_requests(), on_tokens=told.append)) == dict(enumerate(completions))
  counts = {name: value - before.get(name, 0) for name, value in engine.stats().items()}
  new_tokens = sum(len(completion.tokens) for completion in completions)
  assert sum(told) == counts["new_tokens"] == new_tokens
  assert counts["prompt_tokens"] == sum(len(request.prompt) for request in _requests())
  assert counts["requests"] == counts["length"] + counts["stop"] == len(completions)
  assert engine.generate([]) == []


_REFUSED = [
  ({"prompt": []}, r"a prompt has 0 tokens; it must have between 1 and 39"),
  ({"prompt": [5] * 40}, r"a prompt has 40 tokens; it must have between 1 and 39"),
  ({"prompt": [5, V]}, rf"a prompt holds token {V}; the model has 0 to {V - 1}"),
  ({"prompt": [-1]}, r"a prompt holds token -1"),
  ({"max_new_tokens": 0}, r"max_new_tokens=0 must be at least 1"),
  ({"min_new_tokens": -1}, r"min_new_tokens=-1 between 0 and"),
  ({"seed": -1}, r"seed=-1; it must be at least 0 and below 2\*\*32"),
  ({"seed": 2**32}, r"seed=4294967296; .* below 2\*\*32"),
  ({"record_id": 2**64}, r"record_id=18446744073709551616; .* below 2\*\*64"),
  ({"sample": 2**32}, r"sample=4294967296; .* below 2\*\*32"),
  ({"stop_ids": tuple(range(9))}, r"9 stop_ids; at most 8"),
  ({"top_logprobs": 21}, r"top_logprobs=21; it must be between 0 and 20"),
  ({"top_logprobs": -1}, r"top_logprobs=-1; it must be between 0 and 20"),
  ({"stop_strings": ("a", "")}, "stop string"),
]


@pytest.mark.parametrize(("changes", "message"), _REFUSED)
def test_a_request_that_can_never_run_is_refused(engine, changes, message):
  with pytest.raises(ValueError, match=message):
    engine.submit(Request(**{"prompt": [5], "max_new_tokens": 3, **changes}))
  assert engine.num_waiting == 0


def test_in_a_stream_a_request_that_can_never_run_is_an_error_for_itself_alone(engine, completions):
  good = _requests()
  bad = Request(prompt=[], max_new_tokens=3)
  found = engine.generate([bad, *good[:5], bad, *good[5:], bad])
  errors = [found.pop(i) for i in (11, 6, 0)]
  assert found == completions
  for error in errors:
    assert (error.tokens, error.finish_reason) == ([], "error")
    assert "a prompt has 0 tokens" in error.error


def test_stop_strings_need_a_tokenizer_and_without_one_there_is_no_text(make_engine, completions):
  bare = make_engine(decode_text=None)
  with pytest.raises(ValueError, match="stop_strings need an engine with a tokenizer"):
    bare.submit(Request(prompt=[5], max_new_tokens=1, stop_strings=("a",)))
  (found,) = bare.generate(_requests()[:1])
  assert found == dataclasses.replace(completions[0], text=None)


def test_slots_that_do_not_divide_and_a_max_length_of_one_are_refused(make_engine):
  with pytest.raises(ValueError, match="a batch of 4 rows does not divide over 8 batch shards"):
    make_engine(mesh=partitioning.make_mesh(data=8, fsdp=1, tensor=1))
  with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
    make_engine(max_length=1)


@pytest.mark.parametrize(
  "change",
  [
    {"min_new_tokens": 2**31},
    {"stop_ids": (2**31,)},
    {"stop_ids": (-1,)},
  ],
)
def test_a_number_that_no_row_can_hold_is_refused_when_it_is_submitted(make_engine, change):
  with pytest.raises(ValueError, match=next(iter(change))):
    make_engine().submit(Request(prompt=[5], max_new_tokens=2, **change))


@pytest.mark.parametrize("change", [{"top_k": 2**31}, {"temperature": 1e39}, {"top_k": -1}])
def test_sampling_that_the_device_cannot_hold_is_refused(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    SamplingConfig(**change)


def test_a_request_that_fails_on_the_host_fails_alone(make_engine, tokenizer, monkeypatch):
  """In its slot, and on the way to it."""

  def decode(tokens):
    if 11 in tokens:
      raise ZeroDivisionError("no such text")
    return tokenizer.decode(tokens)

  engine = make_engine(decode_text=decode)
  # Whatever a later version forgets to check at submission.
  monkeypatch.setattr(engine_lib, "check_request", lambda *_, **__: None)
  good = Request(prompt=[5, 6], max_new_tokens=3, sampling=GREEDY)
  requests = [
    good,
    Request(prompt=[5, 11], max_new_tokens=3),
    Request(prompt=[5], max_new_tokens=3, min_new_tokens=2**40),
    good,
  ]
  completions = engine.generate(requests)
  reasons = [completion.finish_reason for completion in completions]
  assert reasons[1:3] == ["error", "error"]
  assert "no such text" in completions[1].error
  assert completions[0].tokens == completions[3].tokens == make_engine().generate([good])[0].tokens
  assert engine.generate([good])[0].tokens == completions[0].tokens
