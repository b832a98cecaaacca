"""Requests follow lm-eval's rules; every record says what was asked and what came back."""

import dataclasses
import gzip
import json

import pytest

from selfimprove_jax.evaluation import scoring
from selfimprove_jax.evaluation.tasks import builtin
from selfimprove_jax.evaluation.tasks.items import Choices, Document, Example, Generation
from selfimprove_jax.language_models import local
from selfimprove_jax.language_models.local import LocalModel
from selfimprove_jax.language_models.protocol import ScoreRequest
from tests.evaluation import tiny_model


class _Spy(LocalModel):
  """A local model that keeps the requests it is given."""

  def __init__(self, model):
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    super().__init__(**fields)
    self.asked = []

  def score(self, requests):
    requests = list(requests)
    self.asked += requests
    return super().score(requests)


def _choices(context, *texts, gold=(0,)):
  item = Choices(
    contexts=(context,), continuations=tuple(" " + t for t in texts), texts=texts, gold=gold
  )
  return Example(id="task:1", group="task:1", item=item)


def _run(model, *examples):
  return list(scoring.run(model, examples))


def test_a_text_begins_with_exactly_one_prefix_token(model):
  """lm-eval #1586 and #3333: a BOS that is missing or doubled changes every likelihood."""
  spy = _Spy(model)
  _run(spy, _choices("Question: why?\nAnswer:", "the right one"))
  [request] = spy.asked
  ids = [*request.context, *request.continuation]
  assert ids == [
    *model.prefix_ids,
    *model.tokenizer.encode("Question: why?\nAnswer: the right one"),
  ]
  assert len(model.prefix_ids) <= 1


def test_an_empty_context_is_one_prefix_token(model):
  spy = _Spy(model)
  item = Choices(contexts=("",), continuations=("the answer",), texts=("the answer",), gold=(0,))
  _run(spy, Example(id="a:1", group="a", item=item))
  prefix = list(model.prefix_ids) or [model.tokenizer.eos_id]
  assert list(spy.asked[0].context) == prefix
  assert list(spy.asked[0].continuation) == model.tokenizer.encode("the answer")


def test_trailing_spaces_of_a_context_belong_to_the_continuation(model):
  # No token joins this space with these letters, so only the rule moves it.
  item = Choices(contexts=("The answer ",), continuations=("zz",), texts=("zz",), gold=(0,))
  [moved] = _run(model, Example(id="a:1", group="a", item=item))
  [plain] = _run(model, _choices("The answer", "zz"))
  assert plain["num_tokens"] == [3]
  assert moved["logprobs"] == plain["logprobs"]
  assert moved["num_tokens"] == plain["num_tokens"]


def test_a_long_context_loses_its_beginning_and_is_counted(model):
  words = " ".join(f"word{number}" for number in range(100))
  long, short = _choices(words, "the answer"), _choices("word98 word99", "the answer")
  spy = _Spy(model)
  records = _run(spy, long, short)
  assert [record["truncated"] for record in records] == [1, 0]
  ids = [*spy.asked[0].context, *spy.asked[0].continuation]
  whole = model.tokenizer.encode(words + " the answer")
  assert ids == whole[-model.max_length :]


def test_a_continuation_that_fills_the_window_is_refused_by_name(model):
  with pytest.raises(ValueError, match=r"task:1: .*128 tokens leaves no room"):
    _run(model, _choices("Question", "x y z " * 200))


def test_equal_choices_are_scored_and_counted(model):
  [record] = _run(model, _choices("The answer is", "one", "two", "one", gold=(2,)))
  assert record["equal_choices"] == 1
  assert record["logprobs"][0] == record["logprobs"][2]
  assert record["prediction"] in (0, 1)  # the first of equals


def test_a_log_likelihood_that_is_no_number_fails_the_run_by_its_row(model):
  class Broken(LocalModel):
    def score(self, requests):
      return (dataclasses.replace(score, logprob=float("nan")) for score in super().score(requests))

  fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
  with pytest.raises(ValueError, match="task:1: the log-likelihood is nan"):
    _run(Broken(**fields), _choices("The answer is", "one"))


def test_windows_predict_each_token_of_a_document_once(model):
  text = "Question: what is the answer? " * 40
  tokens = model.tokenizer.encode(text)
  assert len(tokens) > 2 * model.max_length
  spy = _Spy(model)
  [record] = _run(spy, Example(id="d:1", group="d:1", item=Document(text=text)))
  assert [token for request in spy.asked for token in request.continuation] == tokens
  assert record["num_tokens"] == [len(tokens)]
  assert record["num_bytes"] == len(text)
  assert list(spy.asked[0].context) == (list(model.prefix_ids) or [model.tokenizer.eos_id])
  for request in spy.asked:
    assert len(request.context) + len(request.continuation) <= model.max_length
  # The last window reads as much as it can before what it predicts.
  assert len(spy.asked[-1].context) + len(spy.asked[-1].continuation) == model.max_length


def test_a_generation_ends_before_a_stop_string(model):
  item = Generation(prompt="Question:", stop=("e",), max_tokens=20, answers=("x",), shown="x")
  [record] = _run(model, Example(id="g:1", group="g:1", item=item))
  assert "e" not in record["generation"]
  assert record["answers"] == ["x"]


def test_scores_are_those_of_single_requests(model):
  """Whatever is scored together, and in whatever order."""
  examples = [_choices("Question: " + "why " * n, "a", "the answer") for n in range(9)]
  together = _run(model, *examples)
  for example, record in zip(examples, together, strict=True):
    for (context, continuation), logprob in zip(example.item.pairs(), record["logprobs"]):
      request = ScoreRequest(context=context.rstrip(), continuation=continuation)
      if not example.item.contexts[0].endswith(" "):
        [alone] = model.score([request])
        assert alone.logprob == pytest.approx(logprob, abs=1e-4)


def _spent(model, before):
  now = model.engine.stats()
  names = ("prefilled_tokens", "scored_tokens")
  return [now.get(name, 0) - before.get(name, 0) for name in names]


def test_the_shots_are_computed_once_and_a_question_once_for_its_choices(model):
  """Of a few-shot task, all questions begin with the same shots."""
  shots = "Question: what is the answer?\nAnswer: the right one.\n\n" * 2
  contexts = [f"{shots}Question: what is {number}?\nAnswer:" for number in range(20)]
  letters = ("A", "B", "C", "D")
  items = [
    Choices(
      contexts=(context,),
      continuations=tuple(" " + letter for letter in letters),
      texts=letters,
      gold=(0,),
      preamble=len(shots),
    )
    for context in contexts
  ]
  examples = [Example(id=f"a:{i}", group="a", item=item) for i, item in enumerate(items)]
  before = model.engine.stats()
  shared = _run(model, *examples)
  prefilled, scored = _spent(model, before)
  num_shared = len(model.prefix_ids) + len(model.tokenizer.encode(shots))
  whole = [len(model.prefix_ids) + len(model.tokenizer.encode(context)) for context in contexts]
  assert prefilled == num_shared
  # " A" to " D" are two tokens here, a space and a letter; the letter is predicted and not read.
  assert scored == sum(length + 1 - num_shared for length in whole)
  alone = [dataclasses.replace(e, item=dataclasses.replace(e.item, preamble=0)) for e in examples]
  for record, other in zip(shared, _run(model, *alone), strict=True):
    assert record["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)


def test_a_preamble_that_is_cut_is_shared_as_far_as_it_is_left(model):
  shots = " ".join(f"word{number}" for number in range(100))
  item = dataclasses.replace(_choices(shots + " the", "an answer", "one").item, preamble=len(shots))
  spy = _Spy(model)
  [record] = _run(spy, Example(id="a:1", group="a", item=item))
  assert record["truncated"] == 2
  for request in spy.asked:
    preamble, context = request.shared
    assert context == len(request.context)
    assert model.tokenizer.decode(request.context[:preamble]).endswith("word99")


@pytest.mark.slow
def test_shots_of_a_subject_of_mmlu_are_computed_once(real_data, tmp_path, one_device_mesh):
  task = builtin.get("mmlu")

  def read(name):
    with gzip.open(real_data / "evals" / name, "rt") as lines:
      return [r for r in map(json.loads, lines) if r["subject"] == "high_school_psychology"]

  examples = list(task.examples(read(task.file)[:100], read(task.shots_file)))
  folder = tiny_model.save(tmp_path / "model", adds_bos=True, max_positions=4096)
  model = local.load(folder, one_device_mesh, max_length=4096)
  list(scoring.run(model, examples))
  preamble = examples[0].item.contexts[0][: examples[0].item.preamble]
  num_shared = 1 + len(model.tokenizer.encode(preamble))
  contexts = {example.item.contexts[0] for example in examples}  # one question is there twice
  whole = [1 + len(model.tokenizer.encode(context)) for context in contexts]
  assert len(examples) == 100 and num_shared > 500
  stats = model.engine.stats()
  assert stats["prefilled_tokens"] == num_shared
  # As in the test above: a space is read, the letter behind it is not.
  assert stats["scored_tokens"] == sum(length + 1 - num_shared for length in whole)
  model.close()


def test_samples_of_one_prompt_differ_and_repeat(model):
  item = Generation(
    prompt="Question: why?\nAnswer:",
    stop=("\n",),
    max_tokens=8,
    answers=("x",),
    shown="x",
    num_samples=3,
    temperature=1.0,
  )
  example = Example(id="task:1", group="task:1", item=item)
  [record] = _run(model, example)
  assert len(set(record["generations"])) == 3 == len(record["finish_reasons"])
  assert record["generation"] == record["generations"][0]
  assert _run(model, example) == [record]
