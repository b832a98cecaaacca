import random

import flax.linen as nn
import jax
import pytest

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.language_models import LanguageModel, TextRequest, local
from selfimprove_jax.models import params_checkpoint
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.models.params import init_params
from selfimprove_jax.sampling.chat import PLAIN, ChatTemplate
from selfimprove_jax.sampling.chat_files import ChatFiles
from selfimprove_jax.sampling.grammar import GrammarCompiler
from selfimprove_jax.sampling.requests import Completion, Request

SCHEMA = {
  "type": "object",
  "properties": {"a": {"enum": ["x", "y"]}},
  "required": ["a"],
  "additionalProperties": False,
}


@pytest.fixture(scope="module")
def files():
  tokenizer = tokenizers.train_bpe(["some words to be cut", '{"a": "x"}'], vocab_size=300)
  return ChatFiles(
    tokenizer=tokenizer,
    special_tokens={"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token},
    template=None,
    eos_ids=(tokenizer.eos_id,),
    prefix_ids=(tokenizer.bos_id,),
  )


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

  def cancel(self, ticket) -> None:
    self.under_way.pop(ticket, None)
    self.cancelled.append(ticket)

  def _complete(self, request):
    if "nan" in self._decode(request.prompt):
      return Completion([], "error", text="", error="a logit is NaN")
    if request.grammar is None:
      text = f"{request.seed} {request.record_id} {request.sample}"
      return Completion([1] * 4, "stop", text=text)
    import numpy as np

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
def engine(files):
  return FakeEngine(files.tokenizer.decode, files.tokenizer.eos_id)


@pytest.fixture
def model(engine, files):
  tokenizer = files.tokenizer
  return local.LocalModel(
    engine,
    name="tiny",
    files=files,
    template=ChatTemplate(files, template=PLAIN),
    make_grammars=lambda: GrammarCompiler(tokenizer, eos_id=tokenizer.eos_id, vocab_size=300),
    seed=5,
  )


def test_replies_come_in_the_order_of_the_requests_in_whichever_they_end(model, ask):
  assert isinstance(model, LanguageModel)
  replies = list(model.generate(ask(str(i)) for i in range(40)))
  assert [reply.id for reply in replies] == [str(i) for i in range(40)]
  assert [reply.text for reply in replies] == [
    f"5 {local.record_id(ask(str(i)))} 0" for i in range(40)
  ]
  assert replies[0].usage.completion_tokens == 4 and replies[0].cost_usd == 0


def test_requests_are_taken_only_some_way_ahead(model, engine, ask):
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


def test_random_numbers_come_from_the_id_or_else_from_the_content(model, engine, ask):
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
  # Of all versions: texts that were sampled would be others.
  assert local.record_id(ask("x", id="document 7")) == 3745157754760030832


def test_a_chat_ends_where_its_template_says_and_a_text_goes_on_from_itself(
  model, engine, files, ask
):
  text = TextRequest(prompt="some words", max_tokens=7, stop=["."], temperature=0.0, top_p=0.5)
  list(model.generate([ask("some words", stop=["."]), text]))
  chat, bare = engine.asked
  decode = files.tokenizer.decode
  assert decode(chat.prompt) == "User: some words\n\nAssistant:"
  assert chat.stop_strings == (".", "\n\nUser:", "\n\nSystem:")
  assert decode(bare.prompt) == "some words" and bare.prompt[0] == files.tokenizer.bos_id
  assert (bare.stop_strings, bare.stop_ids, bare.max_new_tokens) == ((".",), (), 7)
  assert (bare.sampling.temperature, bare.sampling.top_p) == (0.0, 0.5)


def test_what_cannot_run_fails_that_request_alone(model, ask):
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


def test_messages_need_a_template(engine, files, ask):
  model = local.LocalModel(
    engine, name="base", files=files, template=None, make_grammars=lambda: None
  )
  [chat, bare] = model.generate([ask("a"), TextRequest(prompt="a", max_tokens=1)])
  assert "base has no chat template" in chat.error and bare.error is None


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


def test_a_checkpoint_answers_the_same_alone_and_in_company(tmp_path, one_device_mesh, ask):
  tokenizer = tokenizers.train_bpe(["some words"], vocab_size=262)
  tokenizer.save(tmp_path / "tokenizer")
  config = LlamaConfig(
    vocab_size=264, num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8
  )
  params = nn.unbox(init_params(Llama(config), jax.random.key(0)))
  params_checkpoint.save_params(
    tmp_path / "model", params, config, tokenizer=tmp_path / "tokenizer", max_positions=64
  )
  options = {"num_slots": 2, "changes": {"dtype": "float32"}, "template": PLAIN}
  with pytest.raises(ValueError, match="max_length is 65; the model's context is 64"):
    local.load(tmp_path / "model", one_device_mesh, max_length=65, **options)
  model = local.load(tmp_path / "model", one_device_mesh, max_length=64, **options)
  asked = [ask("some words", id=str(i), max_tokens=8) for i in range(5)]
  asked.append(ask("some", choices=["yes", "no"], max_tokens=8))
  together = list(model.generate(asked))
  alone = [reply for request in reversed(asked) for reply in model.generate([request])][::-1]
  assert alone == together
  assert model.name == "model" and together[-1].parsed in ("yes", "no")
  assert len({reply.text for reply in together}) > 1
  assert all(reply.error is None for reply in together)
  model.close()
