"""A checkpoint as a language model: on a fake engine, and on a tiny model."""

import dataclasses
import math
import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.language_models import LanguageModel, ScoreRequest, TextRequest, local
from selfimprove_jax.language_models.chat import PLAIN, ChatTemplate
from selfimprove_jax.models.checkpoints import params_checkpoint
from selfimprove_jax.models.llama import Llama, LlamaConfig, init_params
from selfimprove_jax.sampling.requests import (
  Completion,
  ContinuationScore,
  Request,
  SamplingConfig,
  TokenLogprobs,
)

SCHEMA = {
  "type": "object",
  "properties": {"a": {"enum": ["x", "y"]}},
  "required": ["a"],
  "additionalProperties": False,
}


CONFIG = LlamaConfig(
  vocab_size=300, num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8,
  dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train_bpe(["some words to be cut", '{"a": "x"}'], vocab_size=300)


class FakeEngine:
  """Keeps the engine's contract without a model: ends what is in its slots in a random order.

  A completion tells the request's random numbers; with a grammar it is its first allowed text.
  """

  num_slots = 3
  max_length = 60

  def __init__(self, decode, eos_id):
    self._decode, self._eos_id = decode, eos_id
    self._random = random.Random(0)
    self.asked: list[Request] = []
    self.under_way: dict[int, Request] = {}
    self.cancelled: list[int] = []
    self.scored = []

  def submit(self, request, on_update=None) -> int:
    del on_update
    if len(request.prompt) >= self.max_length:
      raise ValueError(f"the prompt has {len(request.prompt)} tokens; the window {self.max_length}")
    self.asked.append(request)
    self.under_way[len(self.asked)] = request
    return len(self.asked)

  def step(self) -> list[tuple[int, Completion]]:
    running = list(self.under_way)[: self.num_slots]
    if not running:
      return []
    ticket = self._random.choice(running)
    return [(ticket, self._complete(self.under_way.pop(ticket)))]

  def score(self, requests):
    """The log-probability of a token is minus its id; a prompt of one token is refused."""
    for request in requests:
      self.scored.append(request)
      error = "too short" if len(request.prompt) == 1 else None
      values = [] if error else [-float(token) for token in request.continuation]
      yield ContinuationScore(np.array(values, np.float32), len(values) == 1, error)

  def cancel(self, ticket) -> None:
    self.under_way.pop(ticket, None)
    self.cancelled.append(ticket)

  def _complete(self, request):
    if "nan" in self._decode(request.prompt):
      return Completion([], "error", text="", error="a logit is NaN")
    if request.grammar is None:
      text = f"{request.seed} {request.record_id} {request.sample}"
      logprobs = None
      if request.top_logprobs is not None:
        logprobs = [TokenLogprobs(-0.5, ((7, -0.25), (1, -0.5))[: request.top_logprobs])] * 4
      return Completion([1] * 4, "stop", text=text, logprobs=logprobs)
    matcher, tokens = request.grammar.start(), []
    while not matcher.is_finished and len(tokens) < request.max_new_tokens:
      row = np.zeros(-(-300 // 32), np.uint32)
      matcher.allow(row)
      allowed = [t for t in range(300) if row[t // 32] >> np.uint32(t % 32) & 1]
      tokens.append(allowed[0])
      if allowed[0] == self._eos_id:
        break
      matcher.accept(allowed[0])
    reason = "length" if len(tokens) == request.max_new_tokens else "stop"
    return Completion(tokens, reason, text=self._decode(tokens))


@pytest.fixture
def engine(tokenizer):
  return FakeEngine(tokenizer.decode, tokenizer.eos_id)


@pytest.fixture
def model(engine, tokenizer):
  special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
  ends = (tokenizer.eos_id,)
  chat = ChatTemplate(tokenizer, PLAIN, special_tokens=special, eos_ids=ends)
  return local.LocalModel(
    engine,
    name="tiny",
    config=CONFIG,
    tokenizer=tokenizer,
    chat=chat,
    eos_ids=ends,
    prefix_ids=(tokenizer.bos_id,),
    seed=5,
  )


def test_replies_keep_the_order_of_the_requests(model, ask):
  assert isinstance(model, LanguageModel)
  replies = list(model.generate(ask(str(i)) for i in range(40)))
  assert [reply.id for reply in replies] == [str(i) for i in range(40)]
  assert [reply.text for reply in replies] == [
    f"5 {local.record_id(ask(str(i)))} 0" for i in range(40)
  ]
  assert replies[0].usage.completion_tokens == 4 and replies[0].cost_usd == 0


def test_read_ahead_is_bounded(model, engine, ask):
  taken = []

  def endless():
    while True:
      taken.append(len(taken))
      yield ask(str(len(taken)))

  replies = model.generate(endless())
  for _ in range(5):
    next(replies)
  assert len(taken) <= 5 + 4 * engine.num_slots
  replies.close()
  assert not engine.under_way and engine.cancelled


def test_two_generators_share_the_engine(model, ask):
  first = model.generate(ask(f"a{i}") for i in range(20))
  second = model.generate(ask(f"b{i}") for i in range(20))
  ids = [reply.id for pair in zip(first, second) for reply in pair]
  assert ids == [f"{name}{i}" for i in range(20) for name in "ab"]


def test_random_numbers_depend_on_the_id_or_else_on_the_content(model, engine, ask):
  requests = [
    ask("same", id="1"),
    ask("same", id="2"),
    ask("same", id=""),
    ask("same", id="", sample=1),
    ask("other", id=""),
    ask("other", id="1", seed=9),
  ]
  list(model.generate(requests))
  one, two, three, four, five, six = (request.record_id for request in engine.asked)
  assert one == six and three == four and len({one, two, three, five}) == 4
  assert all(0 <= request.record_id < 2**64 for request in engine.asked)
  assert [request.sample for request in engine.asked] == [0, 0, 0, 1, 0, 0]
  assert [request.seed for request in engine.asked] == [5] * 5 + [9]
  # The same in every version: another number would change the sampled texts.
  assert local.record_id(ask("x", id="document 7")) == 3745157754760030832


def test_a_chat_ends_as_its_template_says_and_a_text_is_continued(model, engine, tokenizer, ask):
  text = TextRequest(prompt="some words", max_tokens=7, stop=["."], temperature=0.0, top_p=0.5)
  list(model.generate([ask("some words", stop=["."]), text]))
  chat, bare = engine.asked
  decode = tokenizer.decode
  assert decode(chat.prompt) == "User: some words\n\nAssistant:"
  assert chat.stop_strings == (".", "\n\nUser:", "\n\nSystem:")
  assert decode(bare.prompt) == "some words" and bare.prompt[0] == tokenizer.bos_id
  assert (bare.stop_strings, bare.stop_ids, bare.max_new_tokens) == ((".",), (), 7)
  assert (bare.sampling.temperature, bare.sampling.top_p) == (0.0, 0.5)


def test_a_request_that_cannot_run_fails_alone(model, ask):
  requests = [
    ask("a"),
    ask("some words " * 40),
    ask("nan"),
    ask(json_schema={"not": {}}),
    ask("b"),
  ]
  replies = list(model.generate(requests))
  assert [reply.error is None for reply in replies] == [True, False, False, False, True]
  assert "the window 60" in replies[1].error
  assert replies[2].error == "a logit is NaN" and replies[2].finish_reason == "error"
  assert "cannot be enforced" in replies[3].error


def test_messages_need_a_template(model, ask):
  model.chat, model.name = None, "base"
  [chat, bare] = model.generate([ask("a"), TextRequest(prompt="a", max_tokens=1)])
  assert "base has no chat template" in chat.error and bare.error is None
  assert "chat_template='plain'" in chat.error
  messages = [{"role": "user", "content": "a"}]
  [chat, bare] = model.score(
    [ScoreRequest(context=messages, continuation="b"), ScoreRequest(context="a", continuation="b")]
  )
  assert "base has no chat template" in chat.error and math.isnan(chat.logprob)
  assert bare.error is None


def test_token_ids_are_used_as_they_are_and_options_reach_the_engine(model, engine):
  sampling = SamplingConfig(temperature=0.5, top_k=3, repetition_penalty=1.5, presence_penalty=0.1)
  request = TextRequest(
    prompt=list(np.array([5, 6, 7])),
    max_tokens=9,
    min_tokens=2,
    stop_ids=[8],
    record_id=2**63,
    **dataclasses.asdict(sampling),
  )
  [reply] = model.generate([request])
  [asked] = engine.asked
  assert (asked.prompt, asked.stop_ids, asked.stop_strings) == ([5, 6, 7], (8,), ())
  assert (asked.max_new_tokens, asked.min_new_tokens, asked.record_id) == (9, 2, 2**63)
  assert asked.sampling == sampling and asked.top_logprobs is None
  assert reply.tokens == (1, 1, 1, 1) and reply.logprobs is None
  assert reply.usage.prompt_tokens == 3


def test_log_probabilities_are_returned_where_they_are_asked_for(model):
  [reply] = model.generate([TextRequest(prompt="some", max_tokens=4, top_logprobs=1)])
  assert [(t.token, t.logprob, t.top) for t in reply.logprobs] == [(1, -0.5, ((7, -0.25),))] * 4


def test_context_and_continuation_are_tokenized_as_one_text(model, engine, tokenizer):
  whole = tokenizer.encode("some words")
  split = len(tokenizer.encode("some"))
  requests = [
    ScoreRequest(context="some", continuation=" words", id="a"),
    ScoreRequest(context="some ", continuation="words", id="b"),
    ScoreRequest(context="", continuation="some words", id="c"),
    ScoreRequest(context=[3, 4], continuation=[5], id="d"),
    ScoreRequest(context=[3], continuation=[5], id="e"),
    ScoreRequest(context=[{"role": "user", "content": "some"}], continuation=" words", id="f"),
  ]
  scores = list(model.score(iter(requests)))
  assert [score.id for score in scores] == list("abcdef")
  bos = tokenizer.bos_id
  found = [([*r.prompt], [*r.continuation]) for r in engine.scored]
  assert found[:5] == [
    ([bos, *whole[:split]], whole[split:]),
    # The tokenizer merges " words", so its token is scored whole.
    ([bos, *whole[:split]], whole[split:]),
    ([bos], whole),
    ([3, 4], [5]),
    ([3], [5]),
  ]
  assert tokenizer.decode(found[5][0]) == "User: some\n\nAssistant:"
  assert scores[3].logprob == -5.0 and scores[3].num_tokens == 1 and scores[3].is_greedy
  assert scores[0].logprob == -sum(whole[split:])
  assert scores[4].error == "too short"


def test_shared_parts_end_where_the_tokens_of_other_requests_part(model, engine, tokenizer):
  def shared(prompt, *ends):
    list(model.generate([TextRequest(prompt=prompt, max_tokens=1, shared=ends)]))
    list(model.score([ScoreRequest(context=prompt, continuation=[5], shared=ends)]))
    asked, scored = engine.asked[-1], engine.scored[-1]
    assert asked.prompt == scored.prompt and [*asked.shared] == [*scored.shared]
    return [tokenizer.decode(asked.prompt[:end]) for end in asked.shared]

  assert shared("some words to be cut", 4, 10) == ["some", "some words"]
  # " words" is one token, which the text up to here does not have.
  assert shared("some words", 7) == ["some"]
  assert shared("some", 0) == []
  assert shared([5, 6, 7], 2) == [tokenizer.decode([5, 6])]
  chat = [{"role": "system", "content": "some"}, {"role": "user", "content": "words to be cut"}]
  instructions, document, everything = shared(chat, 4, 9, 99)
  assert instructions == "System: some\n\n" and document.endswith("User: words")
  assert everything.endswith("User: words to be cut\n\nAssistant:")
  list(model.generate([TextRequest(prompt="some", max_tokens=1, choices=["be", "cut"])]))
  assert all([*r.shared] == [len(r.prompt)] for r in engine.scored[-2:])


def test_a_refused_score_keeps_its_place(model, engine):
  model.chat = None
  messages = [{"role": "user", "content": "a"}]
  requests = [
    ScoreRequest(context=messages if n % 2 == 0 else [3, 4], continuation=[n + 1], id=str(n))
    for n in range(7)
  ]
  scores = list(model.score(requests))
  assert [score.id for score in scores] == [str(n) for n in range(7)]
  assert [score.error is None for score in scores] == [False, True] * 3 + [False]
  assert [score.logprob for score in scores[1::2]] == [-2, -4, -6]


def test_special_tokens_are_recognized_in_markup_alone(model, tokenizer):
  eos = tokenizer.eos_token
  words = tokenizer.encode("words")
  expected = [*tokenizer.encode("some"), tokenizer.eos_id, *words]
  assert model.encode_markup(f"some{eos}words") == expected
  assert tokenizer.eos_id not in tokenizer.encode(f"some{eos}words")
  assert model.encode_markup("some words") == tokenizer.encode("some words")


def test_schemas_and_choices_are_enforced_and_read(model, ask):
  requests = [
    ask("a", json_schema=SCHEMA),
    ask("b", choices=["some", "words"]),
    ask("c", json_schema=SCHEMA, max_tokens=2),
  ]
  valid, choice, cut = model.generate(requests)
  assert valid.parsed["a"] in ("x", "y") and valid.error is None
  assert choice.parsed == choice.text and choice.text in ("some", "words")
  assert cut.finish_reason == "length" and cut.parsed is None and "not JSON" in cut.error


def test_the_likeliest_whole_choice_is_returned_and_prefixes_compete(model, ask, tokenizer):
  # A token's log-probability is minus its id here, so the shortest sum of ids is the likeliest.
  choices = ["words", "some", "some words"]
  sums = {c: sum(tokenizer.encode(c)) for c in choices}
  [reply] = model.generate([ask("a", choices=choices)])
  assert reply.text == reply.parsed == min(sums, key=sums.get)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("model")
  tokenizers.train_bpe(["some words"], vocab_size=262).save(folder / "tokenizer")
  config = dataclasses.replace(CONFIG, vocab_size=264)
  params = nn.unbox(init_params(Llama(config), jax.random.key(0)))
  params = jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)
  params_checkpoint.save_params(
    folder / "model", params, config, tokenizer=folder / "tokenizer", max_positions=64
  )
  return folder / "model", config, params


@pytest.fixture(scope="module")
def loaded(checkpoint, one_device_mesh):
  path, _, _ = checkpoint
  return local.load(path, one_device_mesh, num_slots=2, chat_template=PLAIN)


def test_a_reply_does_not_depend_on_the_batch(loaded, ask):
  asked = [ask("some words", id=str(i), max_tokens=8) for i in range(5)]
  asked.append(ask("some", choices=["yes", "no"], max_tokens=8))
  together = list(loaded.generate(asked))
  alone = [reply for request in reversed(asked) for reply in loaded.generate([request])][::-1]
  assert alone == together
  assert loaded.name == "model" and together[-1].parsed in ("yes", "no")
  assert len({reply.text for reply in together}) > 1
  assert all(reply.error is None for reply in together)


def test_loading_has_defaults_and_checks_the_length(checkpoint, loaded, one_device_mesh):
  path, _, _ = checkpoint
  assert (loaded.max_length, loaded.config.dtype) == (64, "float32")  # the context; a CPU
  assert loaded.prefix_ids == (loaded.tokenizer.bos_id,)
  with pytest.raises(ValueError, match="max_length=65 must be between 2 and 64, the context"):
    local.load(path, one_device_mesh, max_length=65)
  everywhere = local.load(path)
  assert everywhere.engine.num_slots == 16 and everywhere.chat is None
  everywhere.close()
  assert everywhere.engine is None


def test_another_tokenizer_may_be_given_if_the_model_has_its_ids(
  checkpoint, one_device_mesh, tmp_path
):
  path, _, _ = checkpoint
  for name, text in (("other", "words words"), ("large", "some words to be cut " * 3)):
    size = 261 if name == "other" else 280
    tokenizers.train_bpe([text], vocab_size=size).save(tmp_path / name)
  model = local.load(path, one_device_mesh, num_slots=2, tokenizer=tmp_path / "other")
  assert model.tokenizer.vocab_size == 261
  model.close()
  with pytest.raises(ValueError, match=r"large has 2\d\d ids, and the model at .* has 264"):
    local.load(path, one_device_mesh, num_slots=2, tokenizer=tmp_path / "large")


def test_scores_are_those_of_a_plain_forward_pass(checkpoint, loaded):
  _, config, params = checkpoint
  rng = np.random.default_rng(0)
  pairs = [
    ([int(t) for t in rng.integers(5, 260, n)], [int(t) for t in rng.integers(5, 260, m)])
    for n, m in ((1, 1), (3, 5), (9, 2), (20, 17), (40, 24))
  ]

  @jax.jit
  def forward(tokens_BT):
    logits, _ = Llama(config).apply({"params": params}, tokens_BT, jnp.arange(64)[None])
    return jax.nn.log_softmax(logits[0], axis=-1)

  def logprobs(ids):
    # Attention is causal: padding at the end changes nothing before it, and one program does all.
    return np.asarray(forward(jnp.array([ids + [0] * (64 - len(ids))])))[: len(ids)]

  # A continuation that the model itself gives, so that one score is greedy.
  context, greedy = pairs[0][0], []
  for _ in range(3):
    greedy.append(int(np.argmax(logprobs(context + greedy)[-1])))
  pairs.append((context, greedy))
  requests = [ScoreRequest(context=c, continuation=r, id=str(n)) for n, (c, r) in enumerate(pairs)]
  requests.append(ScoreRequest(context=[5] * 60, continuation=[5] * 5, id="long"))
  *scores, long = loaded.score(requests)
  for (context, rest), score in zip(pairs, scores, strict=True):
    table = logprobs(context + rest)[len(context) - 1 : -1]
    expected = table[np.arange(len(rest)), rest]
    assert score.error is None and score.num_tokens == len(rest)
    np.testing.assert_allclose(score.logprob, expected.sum(), rtol=1e-4)
    assert score.is_greedy == (table.argmax(axis=1) == rest).all()
  assert scores[-1].is_greedy and not scores[3].is_greedy
  assert "65" in long.error and math.isnan(long.logprob)


def test_log_probabilities_of_a_reply_are_those_of_its_score(loaded):
  request = TextRequest(prompt=[9, 8, 7], max_tokens=6, top_logprobs=2, temperature=0.0)
  [reply] = loaded.generate([request])
  assert len(reply.logprobs) == len(reply.tokens) > 0
  assert all(t.token == t.top[0][0] and t.logprob == t.top[0][1] for t in reply.logprobs)
  [score] = loaded.score([ScoreRequest(context=[9, 8, 7], continuation=reply.tokens)])
  total = sum(token.logprob for token in reply.logprobs)
  np.testing.assert_allclose(score.logprob, total, rtol=1e-4)
  assert score.is_greedy


def test_stop_ids_end_a_reply_and_minimum_lengths_delay_them(loaded):
  base = dict(prompt=[9, 8, 7], max_tokens=12, record_id=1)
  [free] = loaded.generate([TextRequest(**base)])
  stop = free.tokens[2]
  first = free.tokens.index(stop)
  [stopped] = loaded.generate([TextRequest(**base, stop_ids=(stop,))])
  assert stopped.tokens == free.tokens[:first] and stopped.finish_reason == "stop"
  [longer] = loaded.generate([TextRequest(**base, stop_ids=(stop,), min_tokens=first + 2)])
  assert len(longer.tokens) >= first + 2 and stop not in longer.tokens[: first + 2]
