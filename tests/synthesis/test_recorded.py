import json

import pytest

from selfimprove_jax.data.corpora import CorpusError
from selfimprove_jax.data.sources import NicheConfig, SourceDocument, read_sources
from selfimprove_jax.language_models.transcript import NotInTranscriptError, TranscriptModel
from selfimprove_jax.synthesis import calls, recorded, units
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig
from selfimprove_jax.synthesis.synthesizer import Synthesizer

_ENTITIES = {"step": "entities", "summary": "A summary.", "entities": ["A", "B", "C"]}
_PAIR = {"step": "pair", "entities": ["C", "A"], "text": "A and C."}
_STYLE = {"style": "easy", "sample": 1, "text": "Easy."}


@pytest.fixture
def write(tmp_path):
  """Writes a folder of a document `d` and its recorded texts."""

  def write(entigraph, rephrase=(), documents=({"id": "d"},)):
    names = {"document": documents, "entigraph": entigraph, "rephrase": rephrase}
    for name, rows in names.items():
      lines = (json.dumps({"document": "d", **row}) + "\n" for row in rows)
      if rows:
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path

  return write


def _synthesizer(sources, **generation):
  config = GenerationConfig(**generation)
  return Synthesizer(sources, PromptSet.load("default"), config, "recorded-model")


def _answer(synthesizer, units_, model, path):
  return calls.answer(
    units_,
    model=model,
    make_request=synthesizer.make_request,
    read=synthesizer.read,
    log_path=path,
    max_attempts=2,
  )


def test_recorded_texts_become_units_with_keys_in_list_order(write):
  found = list(recorded.read_recorded(write([_ENTITIES, _PAIR], [_STYLE])))
  assert [unit for unit, _ in found] == [
    units.entities_unit("d"),
    units.Unit("d", "pair", ("A", "C")),
    units.Unit("d", "rephrase/easy", sample=1),
  ]
  assert json.loads(found[0][1]) == {"summary": "A summary.", "entities": ["A", "B", "C"]}
  assert [text for _, text in found[1:]] == ["A and C.", "Easy."]


@pytest.mark.parametrize(
  ("entigraph", "rephrase", "message"),
  [
    ([], [], "neither entigraph.jsonl nor rephrase.jsonl"),
    ([_PAIR], [], "line 1: .*'C' is not in the list"),
    ([_ENTITIES, _PAIR, _PAIR | {"entities": ["A", "C"]}], [], "line 3: .*occurs twice"),
    ([_ENTITIES | {"document": "e"}], [], "line 1: .*'e'; that of the folder is 'd'"),
    ([_ENTITIES, _PAIR | {"entities": ["A"]}], [], "line 2: .*'pair' has 2"),
    ([_ENTITIES, _PAIR | {"text": None}], [], "line 2: .*'text' is NoneType"),
    ([], [_STYLE | {"style": "soft"}], "line 1: .*kind is 'rephrase/soft'"),
    ([], [{"style": "easy", "text": "Easy."}], "line 1: KeyError: 'sample'"),
    ([], [{"text": "Easy."}], "line 1: .*no field 'step'"),
  ],
)
def test_a_folder_that_is_not_of_this_form_is_refused(entigraph, rephrase, message, write):
  with pytest.raises(CorpusError, match=message):
    list(recorded.read_recorded(write(entigraph, rephrase)))


def test_a_folder_has_one_document(write):
  with pytest.raises(CorpusError, match="2 records; there must be one"):
    list(recorded.read_recorded(write([_ENTITIES], documents=[{"id": "d"}, {"id": "e"}])))


@pytest.fixture
def transcript(write):
  """The synthesizer and the transcript of a document with three recorded texts."""
  folder = write([_ENTITIES, _PAIR], [_STYLE])
  synthesizer = _synthesizer([SourceDocument("d", "Title", "", "", "A, B, C.", ())])
  path = folder / "transcript.jsonl"
  found = recorded.read_recorded(folder)
  assert recorded.write_transcript(path, found, synthesizer.make_request, "recorded-model") == 3
  return synthesizer, path


def test_units_without_a_recorded_text_are_counted(transcript):
  synthesizer, path = transcript
  ids = recorded.recorded_ids(path)
  wanted = [units.entities_unit("d"), *units.relation_units("d", ["A", "B", "C"], 0)]
  kept, num_others = recorded.keep_recorded(wanted, ids)
  assert [unit.key for unit in kept] == [(), ("A", "C")] and num_others == 3 and len(ids) == 3
  counts = _answer(synthesizer, kept, TranscriptModel(path), path.with_name("log"))
  assert counts.num_records == 2 and counts.num_failures == 0 and counts.completion_tokens > 0


def test_a_request_that_was_not_recorded_names_the_nearest_one(transcript):
  synthesizer, path = transcript
  model = TranscriptModel(path)
  pair = units.Unit("d", "pair", ("A", "C"))
  other = units.Unit("d", "pair", ("A", "B"))
  nearest = f"nearest request has id '{pair.id}'.*- C.*asked for.*- B"
  with pytest.raises(NotInTranscriptError, match=nearest):
    list(model.generate([synthesizer.make_request(other, 0)]))
  with pytest.raises(
    NotInTranscriptError, match=r"with this id was recorded with sample '0' \(asked for: '1048576'"
  ):
    list(model.generate([synthesizer.make_request(pair, 1)]))
  changed = _synthesizer([SourceDocument("d", "Title", "", "", "A, B, C!", ())], temperature=0.5)
  with pytest.raises(NotInTranscriptError, match=r"with prompt '.*C\..*' \(asked.*C!.*temperature"):
    list(model.generate([changed.make_request(pair, 0)]))


def test_a_transcript_with_a_damaged_line_is_refused(tmp_path):
  (tmp_path / "t").write_text('{"request": {}}\n')
  with pytest.raises(ValueError, match="line 1, is not a record"):
    recorded.recorded_ids(tmp_path / "t")


def test_every_recorded_text_of_the_niche_documents_is_found(real_data, tmp_path):
  root = real_data / "niche"
  sources = read_sources(NicheConfig(folder=str(root)))
  assert len(sources) == 6
  synthesizer = _synthesizer(sources)
  found = [one for source in sources for one in recorded.read_recorded(root / source.id)]
  names = ("entigraph.jsonl", "rephrase.jsonl")
  rows = [
    json.loads(line)
    for source in sources
    for name in names
    for line in (root / source.id / name).read_text().splitlines()
  ]
  assert len(found) == len(rows) > 700
  path = tmp_path / "transcript.jsonl"
  recorded.write_transcript(path, found, synthesizer.make_request, "recorded-model")

  model = TranscriptModel(path)
  # First the lists of entities, and from their records the units that a pipeline would make.
  lists = [units.entities_unit(source.id) for source in sources]
  _answer(synthesizer, lists, model, tmp_path / "lists")
  wanted = list(lists)
  for record in calls.read_records(tmp_path / "lists"):
    assert record["num_cut"] == 0 and len(record["entities"]) == 16
    wanted += units.relation_units(record["document"], record["entities"], seed=0)
    wanted += units.rephrase_units(record["document"], units.REPHRASE_STYLES, 2)
  kept, num_others = recorded.keep_recorded(wanted, recorded.recorded_ids(path))
  assert {unit for unit, _ in found} == set(kept)
  assert num_others == 6 * (1 + 120 + 560 + 8) - len(rows)

  counts = _answer(synthesizer, kept, model, tmp_path / "log")
  assert (counts.num_records, counts.num_failures) == (len(rows), 0)
  texts = {record["text"] for record in calls.read_records(tmp_path / "log") if "text" in record}
  assert texts == {row["text"] for row in rows if "text" in row}
