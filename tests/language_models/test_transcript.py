import pytest

from selfimprove_jax.language_models import LanguageModel
from selfimprove_jax.language_models.transcript import (
  NotInTranscriptError,
  RecordingModel,
  TranscriptModel,
)


def test_what_was_recorded_is_played_again_in_any_order(make_model, server, ask, said, tmp_path):
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


def test_recording_goes_on_after_what_is_there(make_model, ask, tmp_path):
  for text in ("a", "b"):
    recorder = RecordingModel(make_model(), tmp_path / "t.jsonl")
    list(recorder.generate([ask(text)]))
    recorder.close()
  played = TranscriptModel(tmp_path / "t.jsonl")
  assert [reply.text for reply in played.generate([ask("a"), ask("b")])] == ["a!", "b!"]


def test_a_reply_is_in_the_file_before_it_is_handed_on(make_model, ask, tmp_path):
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
  ("text", "message"), [("", "holds no record"), ('{"model": "m"}\n', "line 1, is no record")]
)
def test_a_file_that_is_no_transcript_is_refused(text, message, tmp_path):
  (tmp_path / "t.jsonl").write_text(text)
  with pytest.raises(ValueError, match=message):
    TranscriptModel(tmp_path / "t.jsonl")
