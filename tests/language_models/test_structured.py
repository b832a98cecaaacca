import re
import time

import pytest

from selfimprove_jax.language_models import TextRequest, structured
from selfimprove_jax.language_models.openai_client import Limits

SCHEMA = {
  "type": "object",
  "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
  "required": ["name", "age"],
}
GOOD = '{"name": "Ada", "age": 36}'
VALUE = {"name": "Ada", "age": 36}


@pytest.mark.parametrize(
  "text",
  [
    GOOD,
    f"  {GOOD}\n",
    f"```json\n{GOOD}\n```",
    f"Here it is:\n```\n{GOOD}\n```\nAnything else?",
    f"Sure! {GOOD} I hope that helps {{really}}.",
    f"[sic] {GOOD}",
  ],
)
def test_a_value_is_found_in_prose(text, ask):
  assert structured.read(ask(json_schema=SCHEMA), text) == (VALUE, None)


ANY = {"type": "object"}
FENCE = "```json\n{}\n```"


@pytest.mark.parametrize(
  ("schema", "text", "value"),
  [
    (ANY, '{"code": "' + r"```json\n{\"a\": 1}\n```" + '"}', {"code": '```json\n{"a": 1}\n```'}),
    (SCHEMA, FENCE.format('{"name": "x", "age": 1}') + " so\n" + FENCE.format(GOOD), VALUE),
    (SCHEMA, f'As in [1] and {{"a": 2}}: {GOOD}', VALUE),
    (SCHEMA, f'{GOOD} (I left out {{"email": null}})', VALUE),
    ({"type": "number"}, FENCE.format("3"), 3),
    ({"type": "array"}, "[[1], [2]]", [[1], [2]]),
    # Pieces of a value that is damaged or was cut are no replies.
    (ANY, '{"a": {"b": 1}, "c":', None),
    (ANY, '{"a": {"b": 1},}', None),
    (ANY, '[{"a": 1}, {"b": "', None),
    (ANY, '{"a": NaN}', None),
    (ANY, '{"a": [-Infinity]}', None),
    (ANY, '{"a": 1e400}', None),
    (ANY, '{"a": ' + "9" * 5000 + "}", None),
    (ANY, r'{"a": "\ud800"}', None),
    (ANY, '{"a": NaN} or rather {"a": 1}', {"a": 1}),
    ({}, "[" * 1000 + "]" * 1000, None),
    ({}, "[" * 100_000, None),
    ({}, '{"a": ' * 1000 + "1" + "}" * 1000, None),
    ({}, "[" * 100 + "]" * 100, None),
  ],
)
def test_the_last_complete_and_valid_value_is_the_reply(schema, text, value, ask):
  found, problem = structured.read(ask(json_schema=schema), text)
  assert found == value and (problem is None) == (value is not None)


def test_a_deep_reply_does_not_end_the_run_nor_the_next_one(server, make_model, ask, says):
  server.behave = lambda call: says(
    "[" * 1000 + "]" * 1000 if call.asked.startswith("bad") else GOOD
  )
  asked = [ask("bad", json_schema=ANY), ask("x", json_schema=SCHEMA)]
  for _ in range(2):
    bad, good = make_model(max_repairs=0).generate(asked)
    assert "nested more than 64 levels" in bad.error and good.parsed == VALUE


@pytest.mark.parametrize(
  ("schema", "message"),
  [
    ({"$ref": "#"}, "refers to itself without end"),
    ({"$ref": "#/$defs/no"}, "'/\\$defs/no'|which is not in it"),
    ({"properties": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}}, "never fetched"),
  ],
)
def test_a_schema_that_cannot_be_resolved_fails_alone(schema, message, make_model, ask, server):
  bad, good = make_model().generate([ask(json_schema=schema), ask("b")])
  assert re.search(message, bad.error) and good.text == "b!" and len(server.calls) == 1


def test_a_schema_may_refer_to_itself_one_level_down(ask):
  schema = {"type": "object", "additionalProperties": {"$ref": "#"}}
  structured.check_schema(schema)
  assert structured.read(ask(json_schema=schema), '{"a": {"b": {}}}')[1] is None


@pytest.mark.parametrize(
  ("text", "problem"),
  [
    ("", "it is not JSON"),
    ("I can't.", "it is not JSON"),
    ('{"name": "Ada", "age": 3', "it is not JSON"),
    ('{"name": "Ada"}', "at $: 'age' is a required property"),
    ('{"name": "Ada", "age": -1}', "at $.age: -1 is less than the minimum of 0"),
  ],
)
def test_problems_are_named(text, problem, ask):
  value, said = structured.read(ask(json_schema=SCHEMA), text)
  assert value is None and problem in said


@pytest.mark.parametrize("text", ["yes", " yes\n", '{"choice": "yes"}', '```\n{"choice":"yes"}```'])
def test_a_choice_may_stand_alone_or_in_an_object(text, ask):
  assert structured.read(ask(choices=["yes", "no"]), text) == ("yes", None)


def test_another_choice_is_a_problem(ask):
  for text in ("maybe", '{"choice": "maybe"}', "yes or no"):
    assert structured.read(ask(choices=["yes", "no"]), text)[0] is None


def test_the_schema_is_sent_as_the_response_format(server, make_model, ask, says):
  server.behave = lambda call: says(GOOD)
  [reply] = make_model().generate([ask(json_schema=SCHEMA)])
  assert (reply.parsed, reply.text, reply.error) == (VALUE, GOOD, None)
  form = server.calls[0].body["response_format"]
  assert form["type"] == "json_schema" and form["json_schema"]["schema"] == SCHEMA


def test_an_endpoint_without_schemas_gets_the_schema_in_the_prompt(
  server, make_model, ask, says, said
):
  refusal = said({"error": "unknown field"}, status=400)
  server.behave = lambda call: refusal if "response_format" in call.body else says(GOOD)
  model = make_model(limits=Limits(max_concurrent=1))
  replies = list(model.generate(ask(str(i), json_schema=SCHEMA) for i in range(3)))
  assert [reply.parsed for reply in replies] == [VALUE] * 3
  assert '"minimum": 0' in server.calls[1].asked and server.calls[1].asked.startswith("0\n")
  assert len(server.calls) == 1 + 3  # the refusal is remembered
  assert len({call.headers["idempotency-key"] for call in server.calls}) == 4
  # A stored answer does not depend on how it was asked for.
  [again] = make_model().generate([ask("0", json_schema=SCHEMA)])
  assert again.cached and len(server.calls) == 4


def test_a_refusal_for_another_reason_does_not_disable_schemas(server, make_model, ask, says, said):
  refusal = said({"error": "too long"}, status=400)
  server.behave = lambda call: refusal if call.asked.startswith("bad") else says(GOOD)
  model = make_model(limits=Limits(max_concurrent=1))
  bad, good = model.generate([ask("bad", json_schema=SCHEMA), ask("x", json_schema=SCHEMA)])
  assert "too long" in bad.error and good.parsed == VALUE
  assert "response_format" in server.calls[-1].body


def test_an_invalid_reply_is_repaired_in_another_turn(server, make_model, ask, says):
  bad = '{"name": "Ada"}'
  server.behave = lambda call: says(bad if call.number == 0 else GOOD)
  model = make_model()
  [reply] = model.generate([ask("who?", json_schema=SCHEMA)])
  assert (reply.parsed, reply.error, reply.cached) == (VALUE, None, False)
  assert (reply.usage.prompt_tokens, reply.cost_usd) == (20, 40e-6)  # of both turns
  first, answer, repair = server.calls[1].body["messages"]
  assert first["content"] == "who?" and answer == {"role": "assistant", "content": bad}
  assert "'age' is a required property" in repair["content"]
  [again] = model.generate([ask("who?", json_schema=SCHEMA)])
  assert again.cached and again.parsed == VALUE and len(server.calls) == 2


def test_a_failed_repair_keeps_the_paid_reply(server, make_model, ask, says, said):
  server.behave = lambda call: says("no") if call.number == 0 else said({}, status=500)
  [reply] = make_model().generate([ask(json_schema=SCHEMA)])
  assert (reply.text, reply.cost_usd, reply.parsed) == ("no", 20e-6, None)
  assert "not JSON" in reply.error and "500" in reply.error and len(server.calls) == 4


def test_repairs_are_bounded_and_the_text_is_kept(server, make_model, ask, says):
  server.behave = lambda call: says(f"no {call.number}")
  [reply] = make_model(max_repairs=2).generate([ask(json_schema=SCHEMA)])
  assert len(server.calls) == 3
  assert (reply.text, reply.parsed) == ("no 2", None) and "not JSON" in reply.error


def test_a_reply_cut_at_its_length_is_not_repaired(server, make_model, ask, says):
  server.behave = lambda call: says('{"name": "A', reason="length")
  [reply] = make_model().generate([ask(json_schema=SCHEMA)])
  assert "cut at max_tokens=100" in reply.error and len(server.calls) == 1


def test_a_choice_is_returned_without_its_object(server, make_model, ask, says):
  server.behave = lambda call: says('{"choice": "no"}')
  [reply] = make_model().generate([ask(choices=["yes", "no"])])
  assert reply.parsed == reply.text == "no"
  schema = server.calls[0].body["response_format"]["json_schema"]["schema"]
  assert schema["properties"]["choice"]["enum"] == ["yes", "no"]


def test_an_invalid_schema_or_a_schema_for_a_text_fails_alone(server, make_model, ask):
  requests = [
    ask(json_schema={"type": "thing"}),
    TextRequest(prompt="once", max_tokens=3, json_schema=SCHEMA),
    ask("fine"),
  ]
  replies = list(make_model().generate(requests))
  assert "not a JSON schema" in replies[0].error and "bare text" in replies[1].error
  assert replies[2].text == "fine!" and len(server.calls) == 1


def test_a_long_text_of_brackets_is_read_in_time():
  asked = TextRequest(prompt="x", max_tokens=1, json_schema={"type": "object"})
  begun = time.process_time()
  assert structured.read(asked, '{"a"' * 200_000)[0] is None
  assert time.process_time() - begun < 5
