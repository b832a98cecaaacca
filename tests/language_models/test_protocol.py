import json
import math

import pytest

from selfimprove_jax.language_models import (
  Reply,
  Score,
  ScoreRequest,
  TextRequest,
  TokenLogprob,
  Usage,
)

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
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"stop": "END"}, "stop is 'END'"),
    ({"stop": [""]}, "stop is"),
    ({"stop": [13]}, r"stop is \[13\]"),
    ({"choices": ["a", ""]}, "choices is"),
    ({"choices": ["a"], "json_schema": {}}, "both given"),
    ({"seed": -1}, "seed is -1"),
    ({"record_id": 2**64}, "record_id is 18446744073709551616"),
    ({"min_tokens": 2}, "min_tokens is 2"),
    ({"top_logprobs": -1}, "top_logprobs is -1"),
    ({"stop_ids": ["a"]}, r"stop_ids is \['a'\]"),
    ({"stop_ids": "ab"}, "stop_ids is 'ab'"),
    ({"prompt": [1, "a"]}, "a message is 1"),
    ({"sample": 2**32}, "sample is 4294967296"),
    ({"shared": [3, -1]}, r"shared is \[3, -1\]"),
  ],
)
def test_an_impossible_request_is_refused_by_name(options, message):
  with pytest.raises(ValueError, match=message):
    TextRequest(**{"prompt": "x", "max_tokens": 1, **options})


def test_the_key_depends_on_all_but_the_id():
  base = {"prompt": MESSAGES, "max_tokens": 5}
  key = TextRequest(**base).key
  assert TextRequest(**base, id="other", record_id=3, shared=[4]).key == key
  others = [
    {"prompt": "hello"},
    {"max_tokens": 6},
    {"temperature": 0.5},
    {"top_p": 0.5},
    {"stop": ["x"]},
    {"seed": 0},
    {"sample": 1},
    {"choices": ["x"]},
    {"prompt": [1, 2]},
    {"top_k": 1},
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.1},
    {"frequency_penalty": 0.1},
    {"stop_ids": [1]},
    {"min_tokens": 1},
    {"top_logprobs": 0},
    {"top_logprobs": 1},
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
  request = TextRequest(
    prompt=MESSAGES,
    max_tokens=5,
    id="a",
    json_schema={"type": "null"},
    stop_ids=(3,),
    record_id=7,
    top_logprobs=2,
    shared=(1, 4),
  )
  again = TextRequest(**json.loads(json.dumps(request.to_json())))
  assert again.key == request.key and again.id == "a" and again.json_schema == {"type": "null"}
  assert again.record_id == 7 and again.shared == [1, 4]
  reply = Reply(
    id="a",
    text="t",
    finish_reason="stop",
    usage=Usage(1, 2, True),
    parsed=[1],
    cost_usd=0.5,
    tokens=(3, 4),
    logprobs=(TokenLogprob(3, -0.5, ((3, -0.5), (9, -1.0))), TokenLogprob("x", -1.0)),
  )
  assert Reply.from_json(json.loads(json.dumps(reply.to_json()))) == reply
  # A transcript of an earlier version has neither tokens nor log-probabilities.
  old = {n: v for n, v in reply.to_json().items() if n not in ("tokens", "logprobs")}
  assert Reply.from_json(old).tokens is None


def test_scores_and_their_requests_are_read_back_as_they_were_written():
  for context in ("once", MESSAGES, [1, 2], ""):
    request = ScoreRequest(context=context, continuation=[3], id="a", shared=[1])
    again = ScoreRequest(**json.loads(json.dumps(request.to_json())))
    assert again.key == request.key and again.id == "a" and again.shared == [1]
    assert ScoreRequest(context=context, continuation=[3]).key == request.key
    assert ScoreRequest(context=context, continuation=[4]).key != request.key
  score = Score(id="a", logprob=-1.5, num_tokens=2, is_greedy=True, cost_usd=0.5)
  assert Score.from_json(json.loads(json.dumps(score.to_json(), allow_nan=False))) == score
  failed = Score.failed(request, "no")
  again = Score.from_json(json.loads(json.dumps(failed.to_json(), allow_nan=False)))
  assert again.error == "no" and math.isnan(again.logprob)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"continuation": ""}, "continuation is ''"),
    ({"continuation": []}, r"continuation is \[\]"),
    ({"continuation": ["a"]}, r"continuation is \['a'\]"),
    ({"context": [{"role": "robot", "content": "x"}]}, "role"),
    ({"shared": [-1]}, r"shared is \[-1\]"),
  ],
)
def test_an_impossible_score_request_is_refused_by_name(options, message):
  with pytest.raises(ValueError, match=message):
    ScoreRequest(**{"context": "x", "continuation": "y", **options})
