import json

import pytest

from selfimprove_jax.language_models import Reply, TextRequest, Usage

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"prompt": ""}, "prompt is ''"),
    ({"prompt": []}, "at least one message"),
    ({"prompt": [{"role": "robot", "content": "x"}]}, "role"),
    ({"prompt": [{"role": "user"}]}, "a content"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"stop": "END"}, "stop is 'END'"),
    ({"stop": [""]}, "stop is"),
    ({"stop": [13]}, r"stop is \[13\]"),
    ({"choices": ["a", ""]}, "choices is"),
    ({"choices": ["a"], "json_schema": {}}, "both given"),
    ({"seed": -1}, "seed is -1"),
    ({"sample": 2**32}, "sample is 4294967296"),
  ],
)
def test_what_makes_no_sense_is_refused_by_name(options, message):
  with pytest.raises(ValueError, match=message):
    TextRequest(**{"prompt": "x", "max_tokens": 1, **options})


def test_the_key_depends_on_all_but_the_id():
  base = {"prompt": MESSAGES, "max_tokens": 5}
  key = TextRequest(**base).key
  assert TextRequest(**base, id="other").key == key
  others = [
    {"prompt": "hello"},
    {"max_tokens": 6},
    {"temperature": 0.5},
    {"top_p": 0.5},
    {"stop": ["x"]},
    {"seed": 0},
    {"sample": 1},
    {"choices": ["x"]},
    {"json_schema": {"properties": {"a": {}, "b": {}}}},
    {"json_schema": {"properties": {"b": {}, "a": {}}}},  # the order is that of the reply
  ]
  keys = {TextRequest(**{**base, **other}).key for other in others}
  assert len(keys | {key}) == len(others) + 1


def test_the_key_is_the_same_in_every_version():
  # Stores of paid answers are looked up by it: a change of code must not change it.
  request = TextRequest(prompt=MESSAGES, max_tokens=5, stop=["."], json_schema={"type": "object"})
  assert request.key == "7a668f9bb26f15d873c0eca702ea3ef37cb92ae3435a35064d16651a623e2695"


def test_requests_and_replies_are_read_back_as_they_were_written():
  request = TextRequest(prompt=MESSAGES, max_tokens=5, id="a", json_schema={"type": "null"})
  again = TextRequest.from_json(json.loads(json.dumps(request.to_json())))
  assert again.key == request.key and again.id == "a" and again.json_schema == {"type": "null"}
  reply = Reply(
    id="a", text="t", finish_reason="stop", usage=Usage(1, 2, True), parsed=[1], cost_usd=0.5
  )
  assert Reply.from_json(json.loads(json.dumps(reply.to_json()))) == reply
