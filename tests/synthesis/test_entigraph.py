import json

import pytest

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.language_models.protocol import Reply, Usage
from selfimprove_jax.synthesis import units
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig, MaxTokensConfig
from selfimprove_jax.synthesis.synthesizer import Synthesizer
from selfimprove_jax.synthesis.units import Unit

_SOURCE = SourceDocument("d", "Title", "", "", "Ada Finch of\nLowmere baked.", ())
_GENERATION = GenerationConfig(
  temperature=0.5,
  top_p=0.9,
  max_tokens=MaxTokensConfig(entities=1, relation=2, rephrase=3, study=4),
  seed=7,
)


@pytest.fixture(scope="module")
def synthesizer():
  return Synthesizer([_SOURCE], PromptSet.load("default"), _GENERATION, "some-model")


@pytest.fixture
def read(synthesizer):
  """Reads a reply as that to a unit's request."""

  def read(unit, text, *, attempt=0, finish_reason="stop", parsed=None, error=None):
    usage = Usage(5, 3)
    reply = Reply(
      id=unit.id, text=text, finish_reason=finish_reason, usage=usage, parsed=parsed, error=error
    )
    return synthesizer.read(unit, synthesizer.make_request(unit, attempt), reply, attempt)

  return read


def test_requests_are_sampled_as_configured_by_kind(synthesizer):
  expected = {"entities": 1, "pair": 2, "rephrase/qa": 3, "spa/teacher": 4}
  for kind, max_tokens in expected.items():
    unit = Unit("d", kind, ("Ada Finch", "Lowmere") if kind == "pair" else (), 2)
    request = synthesizer.make_request(unit, 0)
    assert (request.id, request.max_tokens, request.sample) == (unit.id, max_tokens, 2)
    assert (request.temperature, request.top_p, request.seed) == (0.5, 0.9, 7)
    assert (request.json_schema is None) == (kind != "entities")
    contents = "".join(message["content"] for message in request.prompt)
    assert contents[: request.shared[0]].rstrip("\n-").endswith("Ada Finch of\nLowmere baked.")


def test_attempts_and_samples_are_different_requests(synthesizer):
  requests = [
    synthesizer.make_request(Unit("d", "rephrase/qa", (), sample), attempt)
    for sample in range(5)
    for attempt in range(5)
  ]
  assert len({request.key for request in requests}) == 25


def test_units_of_other_documents_are_refused(synthesizer):
  with pytest.raises(ValueError, match=r"document 'e'; there are \['d'\]"):
    synthesizer.make_request(Unit("e", "entities"), 0)


def test_a_text_becomes_a_record(read):
  unit = Unit("d", "pair", ("Ada Finch", "Lowmere"), 1)
  assert read(unit, " She bakes there.\n") == {
    "id": unit.id,
    "document": "d",
    "kind": "pair",
    "key": ["Ada Finch", "Lowmere"],
    "sample": 1,
    "prompt": PromptSet.load("default").hash("pair"),
    "model": "some-model",
    "seed": 7,
    "text": "She bakes there.",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 5, "completion_tokens": 3, "estimated": False},
  }


@pytest.mark.parametrize(
  ("text", "other", "reason"),
  [
    ("", {"error": "HTTP 500"}, "error: HTTP 500"),
    (" \n", {}, "empty"),
    ("She bakes and", {"finish_reason": "length"}, "cut at its length"),
    ("I'm sorry, but I can't help with that.", {}, "refusal"),
    ("I’m really sorry, this is not possible.", {}, "refusal"),
    ("I cannot assist with this request.", {}, "refusal"),
    ("As an AI language model, I have no access to documents.", {}, "refusal"),
    ("Sorry, no.", {}, "refusal"),
    ("Unfortunately, I cannot do this.", {}, "refusal"),
  ],
)
def test_an_unusable_reply_is_a_failure(text, other, reason, read):
  record = read(Unit("d", "pair", ("a", "b")), text, attempt=1, **other)
  assert record["failure"] == {"reason": reason, "attempts": 2, "raw": text}
  assert "text" not in record and record["id"] == Unit("d", "pair", ("a", "b")).id


@pytest.mark.parametrize(
  "text",
  [
    "I cannot tell you how glad Ada was." + " She baked." * 40,
    "As an airport, Lowmere is small.",
    "As an Aide, she won.",
    "I can bake, said Ada Finch.",
    "Ada Finch said that she was sorry, and that she cannot bake.",
  ],
)
def test_a_text_that_is_no_refusal_is_kept(text, read):
  assert read(Unit("d", "rephrase/easy"), text)["text"] == text


def test_entities_are_unique_and_compared_with_the_document(read):
  listed = ["Ada  Finch", "of LOWMERE", "ada finch", " ", "Plum bread", "ADA FINCH\n"]
  value = {"summary": " She bakes. ", "entities": listed}
  record = read(units.entities_unit("d"), json.dumps(value), parsed=value)
  assert record["entities"] == ["Ada Finch", "of LOWMERE", "Plum bread"]
  assert record["not_in_document"] == ["Plum bread"]
  assert record["summary"] == "She bakes." and record["num_cut"] == 0 and "text" not in record


@pytest.mark.parametrize(("number", "num_cut"), [(2, 0), (100, 0), (103, 3)])
def test_a_hundred_entities_are_kept(number, num_cut, read):
  value = {"summary": "s", "entities": [f"e{i}" for i in range(number)]}
  record = read(units.entities_unit("d"), json.dumps(value), parsed=value)
  assert record["entities"] == value["entities"][:100] and record["num_cut"] == num_cut


@pytest.mark.parametrize("entities", [[], ["a"], ["a", "A", " a"]])
def test_fewer_than_two_entities_are_a_failure(entities, read):
  value = {"summary": "s", "entities": entities}
  record = read(units.entities_unit("d"), json.dumps(value), parsed=value)
  assert record["failure"]["reason"] == "fewer than 2 entities"
  assert record["failure"]["raw"] == json.dumps(value)


@pytest.mark.parametrize("parsed", [None, [], {"entities": ["a", "b"]}, {"summary": "s"}, "text"])
def test_a_reply_without_the_json_value_is_a_failure(parsed, read):
  reason = read(units.entities_unit("d"), "text", parsed=parsed)["failure"]["reason"]
  assert reason == "error: the reply has no JSON value with a summary and entities"
