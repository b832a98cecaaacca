import json

import pytest

from selfimprove_jax.language_models import TextRequest, batch
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.openai_client import AttemptError, Limits
from selfimprove_jax.language_models.store import BudgetError, CallStore

HALF = Prices(input_per_million=0.5, output_per_million=1.0)


class BatchServer:
  """The batch part of the interface, on the misbehaving server: files and batches in memory."""

  def __init__(self, server, says, said):
    self.server, self.says, self.said = server, says, said
    self.files: dict[str, bytes] = {}
    self.batches: dict[str, dict] = {}
    self.status = "completed"
    self.lose_next_batch = False
    self.usual = server.behave
    server.behave = self.behave

  def behave(self, call):
    path = call.path.split("?")[0].removeprefix("/v1")
    if path == "/files":
      name = f"file-{len(self.files)}"
      self.files[name] = call.body.split(b"\r\n\r\n")[-1].rsplit(b"\r\n--", 1)[0]
      assert b'name="purpose"' in call.body
      return self.said({"id": name})
    if path.startswith("/files/"):
      return self.said(self.files[path.split("/")[2]])
    if path == "/batches" and call.body is None:
      return self.said({"data": list(self.batches.values())})
    if path == "/batches":
      name = f"batch-{len(self.batches)}"
      self.batches[name] = {**call.body, "id": name, "status": "validating"}
      if self.lose_next_batch:
        self.lose_next_batch = False
        return self.said(b"{", cut=0)
      return self.said(self.batches[name])
    if path.startswith("/batches/"):
      return self.said(self.finish(self.batches[path.split("/")[2]]))
    return self.usual(call)

  def finish(self, made):
    if self.status in ("completed", "expired"):
      lines = [json.loads(line) for line in self.files[made["input_file_id"]].splitlines()]
      done = lines if self.status == "completed" else lines[:1]
      late = [line for line in lines if line not in done]
      error = {"code": "batch_expired", "message": "too late"}
      made |= {
        "output_file_id": self._file(result(line["custom_id"], self.says) for line in done),
        "error_file_id": self._file(
          {"custom_id": line["custom_id"], "response": None, "error": error} for line in late
        ),
      }
    return made | {"status": self.status}

  def _file(self, records):
    name = f"file-{len(self.files)}"
    self.files[name] = b"\n".join(json.dumps(record).encode() for record in records)
    return name


def result(key, says, *, status=200):
  response = {"status_code": status, "request_id": "r", "body": says("batched").body}
  return {"id": "b", "custom_id": key, "response": response, "error": None}


@pytest.fixture
def batch_server(server, says, said):
  return BatchServer(server, says, said)


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_hold_new_requests_once(make_model, ask, tmp_path):
  model = make_model()
  list(model.generate([ask("old")]))
  folder = tmp_path / "batch"
  asked = [ask("old"), ask("a", seed=3), ask("b"), ask("b"), TextRequest(prompt="c", max_tokens=2)]
  files = batch.write_requests(folder, asked, model=model)
  chats, bare = map(_lines, files)
  assert [line["body"]["messages"][0]["content"] for line in chats] == ["a", "b"]
  assert {line["url"] for line in chats} == {"/v1/chat/completions"}
  assert [(line["url"], line["body"]["prompt"]) for line in bare] == [("/v1/completions", "c")]
  assert chats[0]["custom_id"] == model.api.key(asked[1]) and chats[0]["method"] == "POST"
  assert chats[0]["body"] == model.api.body(asked[1], enforce_schema=True)[1]
  assert len(chats[0]["custom_id"]) <= 64
  assert batch.write_requests(folder, [*asked, ask("d")], model=model) == [
    folder / "00002.requests.jsonl"
  ]


def test_files_respect_their_limits(make_model, ask, tmp_path):
  model = make_model()
  asked = [ask(str(i)) for i in range(10)]
  files = batch.write_requests(tmp_path / "a", asked, model=model, max_requests=4)
  assert [len(_lines(file)) for file in files] == [4, 4, 2]
  size = len(files[0].read_bytes().splitlines(keepends=True)[0])
  files = batch.write_requests(tmp_path / "b", asked, model=model, max_bytes=3 * size)
  assert [len(_lines(file)) for file in files] == [3, 3, 3, 1]
  with pytest.raises(ValueError, match="a file holds 10"):
    batch.write_requests(tmp_path / "c", asked, model=model, max_bytes=10)


def test_results_placed_by_hand_are_read_and_faults_reported(
  server, make_model, ask, says, store, tmp_path
):
  model = make_model()
  asked = [ask(str(i)) for i in range(5)]
  keys = [model.api.key(request) for request in asked]
  batch.write_requests(tmp_path, asked, model=model)
  refused = result(keys[2], says, status=400) | {"error": {"message": "too long"}}
  lines = [json.dumps(result(keys[0], says)), json.dumps(result(keys[1], says))]
  lines += [json.dumps(refused), json.dumps(result("stranger", says)), "[]"]
  text = "\n".join([*lines, json.dumps(result(keys[3], says))[:50]])  # torn
  (tmp_path / "mine.results.jsonl").write_text(text)
  for _ in range(2):  # a second reading changes nothing
    report = batch.read_results(tmp_path, model=model, prices=HALF)
    assert (report.num_requests, report.num_stored, report.num_waiting) == (5, 2, 2)
    assert list(report.errors) == [keys[2]] and "too long" in report.errors[keys[2]]
    assert report.unknown == ["stranger"]
    assert report.damaged == ["mine.results.jsonl:5", "mine.results.jsonl:6"]
    assert store.totals().paid_usd == pytest.approx(2 * 10e-6)  # at half the price
  replies = list(model.generate(asked))
  assert [reply.text for reply in replies] == ["batched", "batched", "2!", "3!", "4!"]
  assert [reply.cached for reply in replies] == [True, True, False, False, False]
  assert len(server.calls) == 3


def test_a_batch_is_uploaded_polled_and_stored(batch_server, server, make_model, ask, tmp_path):
  model = make_model()
  asked = [ask(str(i)) for i in range(6)]
  batch.write_requests(tmp_path, asked, model=model, max_requests=3)
  batch.submit(tmp_path, model=model, prices=HALF)
  batch.submit(tmp_path, model=model, prices=HALF)
  assert len(batch_server.batches) == 2
  assert batch_server.files["file-0"] == (tmp_path / "00000.requests.jsonl").read_bytes()
  made = batch_server.batches["batch-0"]
  assert made["endpoint"] == "/v1/chat/completions" and made["completion_window"] == "24h"
  promised = model.store.totals()
  assert promised.uncertain_calls == 2 and promised.uncertain_usd > 6 * 100e-6

  batch_server.status = "in_progress"
  report = batch.collect(tmp_path, model=model, prices=HALF)
  assert report.statuses == {"00000": "in_progress", "00001": "in_progress"}
  assert report.num_waiting == 6 and model.store.totals().uncertain_calls == 2

  batch_server.status = "completed"
  for _ in range(2):
    report = batch.collect(tmp_path, model=model, prices=HALF)
    assert report.num_stored == 6 and set(report.statuses.values()) == {"completed"}
    totals = model.store.totals()
    assert (totals.paid_calls, totals.uncertain_calls, totals.uncertain_usd) == (6, 0, 0.0)
    assert totals.paid_usd == pytest.approx(6 * 10e-6)
  num = len(server.calls)
  assert [reply.text for reply in model.generate(asked)] == ["batched"] * 6
  assert len(server.calls) == num


def test_requests_that_a_batch_failed_are_reported_and_asked_live(
  batch_server, make_model, ask, tmp_path
):
  model = make_model()
  asked = [ask(str(i)) for i in range(3)]
  batch.write_requests(tmp_path, asked, model=model)
  batch.submit(tmp_path, model=model, prices=HALF)
  batch_server.status = "expired"
  report = batch.collect(tmp_path, model=model, prices=HALF)
  assert report.num_stored == 1 and len(report.errors) == 2
  assert all("too late" in error for error in report.errors.values())
  assert [reply.text for reply in model.generate(asked)] == ["batched", "1!", "2!"]


def test_a_failed_batch_releases_its_reserved_dollars(batch_server, make_model, ask, tmp_path):
  model = make_model()
  batch.write_requests(tmp_path, [ask("a")], model=model)
  batch.submit(tmp_path, model=model, prices=HALF)
  batch_server.status = "failed"
  report = batch.collect(tmp_path, model=model, prices=HALF)
  assert report.statuses == {"00000": "failed"} and report.num_stored == 0
  assert model.store.totals().uncertain_calls == 0


def test_a_batch_whose_id_was_lost_is_not_started_twice(batch_server, make_model, ask, tmp_path):
  model = make_model()
  batch.write_requests(tmp_path, [ask("a")], model=model)
  batch_server.lose_next_batch = True  # within a run: the answer never arrives
  batch.submit(tmp_path, model=model, prices=HALF)
  assert len(batch_server.batches) == 1
  # The state of a run that was killed before it stored the batch's id.
  state = json.loads((tmp_path / "00000.batch.json").read_text())
  (tmp_path / "00000.batch.json").write_text(json.dumps(state | {"batch_id": None}))
  batch.submit(tmp_path, model=model, prices=HALF)
  assert len(batch_server.batches) == len(batch_server.files) == 1
  assert batch.collect(tmp_path, model=model, prices=HALF).num_stored == 1


def test_active_batches_are_bounded(batch_server, make_model, ask, tmp_path):
  model = make_model()
  asked = [ask(str(i)) for i in range(5)]
  batch.write_requests(tmp_path, asked, model=model, max_requests=1)
  batch.submit(tmp_path, model=model, prices=HALF, max_active=2)
  batch.submit(tmp_path, model=model, prices=HALF, max_active=2)
  assert len(batch_server.batches) == 2
  batch.collect(tmp_path, model=model, prices=HALF)
  batch.submit(tmp_path, model=model, prices=HALF, max_active=2)
  assert len(batch_server.batches) == 4


def test_a_batch_that_may_exceed_the_cap_is_not_sent(batch_server, make_model, ask, tmp_path):
  store = CallStore(tmp_path / "capped.sqlite", max_usd=1e-4)
  model = make_model(store=store, limits=Limits())
  batch.write_requests(tmp_path / "b", [ask(str(i)) for i in range(3)], model=model)
  with pytest.raises(BudgetError):
    batch.submit(tmp_path / "b", model=model, prices=HALF)
  assert not batch_server.files and not batch_server.batches
  model.close()
  store.close()


def test_unusable_results_are_errors_paid_for_once_and_asked_live(
  server, make_model, ask, says, store, tmp_path
):
  model = make_model()
  schema = {"type": "object", "required": ["a"]}
  asked = [ask("refused"), ask("cut"), ask("bad", json_schema=schema), ask("c", choices=["x", "y"])]
  asked.append(ask("good", json_schema=schema))
  keys = [model.api.key(request) for request in asked]
  batch.write_requests(tmp_path, asked, model=model)
  results = [result(key, says) for key in keys]
  refusal = {"role": "assistant", "content": None, "refusal": "no"}
  results[0]["response"]["body"]["choices"][0]["message"] = refusal
  results[1]["response"]["body"]["choices"][0]["finish_reason"] = "content_filter"
  results[3]["response"]["body"]["choices"][0]["message"]["content"] = '{"choice": "z"}'
  results[4]["response"]["body"]["choices"][0]["message"]["content"] = '{"a": 1}'
  (tmp_path / "00000.results.jsonl").write_text("\n".join(map(json.dumps, results)))
  for _ in range(2):
    report = batch.read_results(tmp_path, model=model, prices=HALF)
    assert report.num_stored == 1 and report.num_waiting == 0
    assert list(report.errors) == keys[:4]
    assert store.totals().paid_calls == 5
  assert "refuses" in report.errors[keys[0]] and "is not JSON" in report.errors[keys[2]]
  server.behave = lambda call: says('{"a": 1}')
  replies = list(model.generate([asked[0], asked[2], asked[4]]))
  assert [reply.cached for reply in replies] == [False, False, True]


@pytest.mark.parametrize(
  "line",
  [
    '{"custom_id": ["KEY"]}',
    '{"custom_id": "KEY", "response": [1]}',
    '{"custom_id": "KEY", "response": {"status_code": 200, "body": [1]}}',
    "[" * 100_000,
    '{"custom_id": "KEY", "response": {"status_code": 200, "body": {"choices": {"a": 1}}}}',
  ],
)
def test_odd_lines_of_results_fail_alone(line, make_model, ask, says, tmp_path):
  model = make_model()
  asked = [ask("a"), ask("b")]
  batch.write_requests(tmp_path, asked, model=model)
  good = json.dumps(result(model.api.key(asked[1]), says))
  line = line.replace("KEY", model.api.key(asked[0]))
  (tmp_path / "00000.results.jsonl").write_text(f"{line}\n{good}\n")
  report = batch.read_results(tmp_path, model=model, prices=HALF)
  assert report.num_stored == 1
  assert len(report.errors) + len(report.damaged) + len(report.unknown) == 1


@pytest.mark.parametrize("path", ["/files", "/batches", "/batches/"])
@pytest.mark.parametrize("body", [{}, {"id": 3, "status": None}, {"data": 7, "id": ["a"]}])
def test_an_odd_answer_of_the_batch_api_is_an_attempt_that_failed(
  path, body, make_model, ask, said, batch_server, tmp_path
):
  model = make_model()
  batch.write_requests(tmp_path, [ask("a")], model=model)
  usual = batch_server.server.behave
  batch_server.server.behave = lambda call: (
    said(body) if call.path.split("?")[0].startswith(f"/v1{path}") else usual(call)
  )
  with pytest.raises(AttemptError, match="an answer without"):
    batch.submit(tmp_path, model=model, prices=HALF)
    batch.collect(tmp_path, model=model, prices=HALF)
