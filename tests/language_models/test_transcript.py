import pytest

from selfimprove_jax.language_models import LanguageModel, Score, ScoreRequest
from selfimprove_jax.language_models.transcript import (
  NotInTranscriptError,
  RecordingModel,
  TranscriptModel,
)


def test_recorded_replies_are_replayed_in_any_order(make_model, server, ask, said, tmp_path):
  bad = said({"error": "no"}, status=400)
  behave = server.behave
  server.behave = lambda call: bad if call.asked == "bad" else behave(call)
  recorder = RecordingModel(make_model(), tmp_path / "t.jsonl")
  asked = [ask("a"), ask("bad"), ask("b", sample=1, choices=["b!"])]
  recorded = list(recorder.generate(iter(asked)))
  recorder.close()
  num = len(server.calls)

  played = TranscriptModel(tmp_path / "t.jsonl")
  assert isinstance(recorder, LanguageModel) and isinstance(played, LanguageModel)
  assert played.name == "some-model"
  assert list(played.generate(reversed(asked))) == recorded[::-1]
  assert recorded[1].error and recorded[2].parsed == "b!" and len(server.calls) == num
  played.close()


class Scorer:
  """A model that scores; the log-probability is minus the length of the continuation."""

  name = "scorer"

  def generate(self, requests):
    raise NotImplementedError

  def score(self, requests):
    for request in requests:
      if request.context == "bad":
        yield Score.failed(request, "no")
      else:
        length = len(request.continuation)
        yield Score(id=request.id, logprob=-float(length), num_tokens=length, is_greedy=False)

  def close(self):
    pass


def test_scores_are_recorded_and_replayed(tmp_path):
  recorder = RecordingModel(Scorer(), tmp_path / "t.jsonl")
  requests = [
    ScoreRequest(context="a", continuation="bb", id="1"),
    ScoreRequest(context=[1, 2], continuation=[3], id="2"),
    ScoreRequest(context="bad", continuation="b"),
  ]
  recorded = list(recorder.score(iter(requests)))
  recorder.close()
  played = TranscriptModel(tmp_path / "t.jsonl")
  assert list(played.score(requests[1::-1])) == recorded[1::-1]
  [failed] = played.score(requests[2:])
  assert failed.error == "no"
  with pytest.raises(NotInTranscriptError, match="request '1' is not in"):
    list(played.score([ScoreRequest(context="a", continuation="b", id="1")]))


def test_recording_appends_to_the_file(make_model, ask, tmp_path):
  for text in ("a", "b"):
    recorder = RecordingModel(make_model(), tmp_path / "t.jsonl")
    list(recorder.generate([ask(text)]))
    recorder.close()
  played = TranscriptModel(tmp_path / "t.jsonl")
  assert [reply.text for reply in played.generate([ask("a"), ask("b")])] == ["a!", "b!"]


def test_a_torn_last_line_is_left_out_and_then_removed(make_model, ask, tmp_path):
  path = tmp_path / "t.jsonl"
  for text in ("a", "b"):
    recorder = RecordingModel(make_model(), path)
    list(recorder.generate([ask(text)]))
    recorder.close()
    with path.open("a") as file:
      file.write('{"model": "some-model", "requ')
    TranscriptModel(path)
  played = TranscriptModel(path)
  assert [reply.text for reply in played.generate([ask("a"), ask("b")])] == ["a!", "b!"]
  path.write_text("[" * 100_000 + "\n")
  with pytest.raises(ValueError, match="line 1, is not a record"):
    TranscriptModel(path)


def test_a_reply_is_written_before_it_is_yielded(make_model, ask, tmp_path):
  recorder = RecordingModel(make_model(), tmp_path / "t.jsonl")
  replies = recorder.generate(ask(str(i)) for i in range(9))
  next(replies)
  assert (tmp_path / "t.jsonl").read_text().count("\n") == 1
  replies.close()
  recorder.close()


@pytest.mark.parametrize("change", [{"max_tokens": 3}, {"id": "else"}, {"sample": 1}])
def test_a_request_that_was_not_recorded_is_named(change, make_model, ask, tmp_path):
  recorder = RecordingModel(make_model(), tmp_path / "t.jsonl")
  list(recorder.generate([ask("a")]))
  recorder.close()
  request = ask("a", **change)
  with pytest.raises(NotInTranscriptError, match=f"request '{request.id}' is not in .*content"):
    list(TranscriptModel(tmp_path / "t.jsonl").generate([request]))


@pytest.mark.parametrize(
  ("text", "message"), [("", "has no records"), ('{"model": "m"}\n', "line 1, is not a record")]
)
def test_a_file_that_is_not_a_transcript_is_refused(text, message, tmp_path):
  (tmp_path / "t.jsonl").write_text(text)
  with pytest.raises(ValueError, match=message):
    TranscriptModel(tmp_path / "t.jsonl")


def test_the_nearest_of_many_prompts_is_named(make_model, ask, tmp_path):
  recorder = RecordingModel(make_model(), tmp_path / "t.jsonl")
  last = "a document, and the task: tell of Ada"
  prompts = [*(f"{i}".ljust(len(last), "_") for i in range(10, 60)), last]
  list(recorder.generate(ask(text, id=text[:4]) for text in prompts))
  recorder.close()
  played = TranscriptModel(tmp_path / "t.jsonl")
  with pytest.raises(NotInTranscriptError, match=r"id 'a do'.*of Ada.*asked for: .*of Eve"):
    list(played.generate([ask("a document, and the task: tell of Eve", id="e")]))
  with pytest.raises(NotInTranscriptError, match="Requests of its kind were not recorded"):
    list(played.score([ScoreRequest(context="a", continuation="b")]))
