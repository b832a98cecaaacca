import json

import pytest

from selfimprove_jax.data.sources import SourceDocument, SourceQuestion
from selfimprove_jax.language_models.protocol import Reply, Usage
from selfimprove_jax.synthesis import units
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig
from selfimprove_jax.synthesis.synthesizer import Synthesizer

_QUESTION = SourceQuestion("q1", "Who won?", ("ANSWER", "OTHER"), 0, ("ANSWER",))
_SOURCE = SourceDocument("d", "Title", "", "", "Text.", (_QUESTION,))


@pytest.fixture(scope="module", params=["default", "small"])
def synthesizer(request):
  return Synthesizer([_SOURCE], PromptSet.load(request.param), GenerationConfig(), "some-model")


def _text(request):
  return "".join(message["content"] for message in request.prompt)


def test_a_focal_request_shows_the_question_without_choices_and_answer(synthesizer):
  [unit] = units.focal_units("d", ["q1"], 1)
  text = _text(synthesizer.make_request(unit, 0))
  assert "Who won?" in text and "ANSWER" not in text and "OTHER" not in text
  [unknown] = units.focal_units("d", ["q2"], 1)
  with pytest.raises(ValueError, match="'d' has no question 'q2'"):
    synthesizer.make_request(unknown, 0)


def test_a_strategy_is_applied_as_it_was_written(synthesizer):
  strategy = 'Put the dates of "Title" in order; write $5 as {five}.'
  [unit] = units.apply_units("d", [strategy], 1)
  assert strategy in _text(synthesizer.make_request(unit, 0))


@pytest.mark.parametrize("kind", [kind for kind in units.KINDS if kind.startswith("spa/")])
def test_a_text_of_spa_is_asked_for_and_read(kind, synthesizer):
  unit = units.Unit("d", kind)
  request = synthesizer.make_request(unit, 0)
  reply = Reply(id=unit.id, text="A text.", finish_reason="stop", usage=Usage(1, 1))
  record = synthesizer.read(unit, request, reply, 0)
  assert request.json_schema is None and record["text"] == "A text." and record["kind"] == kind


def _read(synthesizer, parsed):
  unit = units.strategy_unit("d")
  request = synthesizer.make_request(unit, 0)
  assert request.json_schema["required"] == ["strategies"]
  text = json.dumps(parsed)
  reply = Reply(id=unit.id, text=text, finish_reason="stop", usage=Usage(1, 1), parsed=parsed)
  return synthesizer.read(unit, request, reply, 0)


def test_strategies_are_read_without_repetitions(synthesizer):
  listed = ["Retell it.", "retell  it.", " ", "Order the dates."]
  assert _read(synthesizer, {"strategies": listed})["strategies"] == [
    "Retell it.",
    "Order the dates.",
  ]
  many = [f"s{i}" for i in range(60)]
  assert _read(synthesizer, {"strategies": many})["strategies"] == many[:50]


@pytest.mark.parametrize("parsed", [None, {"strategies": []}, {"strategies": [" "]}, ["s"]])
def test_no_strategies_are_a_failure(parsed, synthesizer):
  assert "no JSON value" in _read(synthesizer, parsed)["failure"]["reason"]
