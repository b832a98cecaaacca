"""Documents with questions are read whole, merged where they are one, and refused with words."""

import gzip
import json

import pytest

from selfimprove_jax.data import sources
from selfimprove_jax.data.files import CorpusError
from selfimprove_jax.data.sources import (
  FolderSourcesConfig,
  JsonlSourcesConfig,
  NicheConfig,
  QualityConfig,
  QuestionFieldsConfig,
  SourceDocument,
  SourceDocumentsConfig,
  SourceQuestion,
  SqualityConfig,
)
from selfimprove_jax.runtime.config import page, parse, section


def _write(path, *records):
  content = "".join(json.dumps(record) + "\n" for record in records).encode()
  path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
  return str(path)


def _quality_question(text, gold=1, **fields):
  return {"question": text, "options": ["a", "b", "c", "d"], "gold_label": gold, **fields}


def _article(*questions, **fields):
  return {
    "article_id": "52845",
    "title": "The Snare",
    "author": "Smith, Richard R.",
    "year": None,
    "article": "It was   glazed.",
    "questions": list(questions),
    **fields,
  }


def test_the_two_lines_of_a_quality_article_are_one_document(tmp_path):
  first = _quality_question("Why?", 4, question_unique_id="q1", difficult=1)
  second = _quality_question("When?", 1, question_unique_id="q2", difficult=0)
  again = _quality_question("Why?", 4, question_unique_id="q3", difficult=0)
  path = _write(
    tmp_path / "QuALITY.train.gz",
    _article(first),
    _article(second, again, article_id="9", article="It was glazed.\n"),
    _article(article_id="10", title="Lex", author="Haggert, W. T., Jr.", year=1959, article="Lex."),
  )
  snare, lex = sources.read_sources(QualityConfig(paths=(path,)))
  assert (snare.id, snare.title, snare.author, snare.year) == (
    "52845",
    "The Snare",
    "Richard R. Smith",
    "",
  )
  assert [(q.id, q.gold, q.is_hard) for q in snare.questions] == [("q1", 3, True), ("q2", 0, False)]
  assert (lex.author, lex.year, lex.questions) == ("W. T. Haggert, Jr.", "1959", ())


def test_one_title_with_two_texts_is_refused_with_both_places(tmp_path):
  path = _write(tmp_path / "a.jsonl", _article(), _article(article_id="9", article="Other."))
  with pytest.raises(CorpusError, match=r"line 2: document '9' is also in .*line 1, with another"):
    sources.read_sources(QualityConfig(paths=(path,)))


def test_one_text_under_two_ids_is_one_document_with_the_questions_of_both(tmp_path):
  records = [
    {"id": "a", "text": "One text.", "questions": [{"question": "Who?", "short_answers": "Ada"}]},
    {"id": 7, "text": "One\ntext.", "questions": [{"question": "Who?", "short_answers": ["Ada"]}]},
    {"id": "c", "text": " One text. ", "questions": [{"question": "Where?"}]},
  ]
  path = _write(tmp_path / "a.jsonl", *records)
  [document] = sources.read_sources(JsonlSourcesConfig(paths=(path,)))
  assert (document.id, document.name, document.text) == ("a", "a", "One text.")
  assert document.questions == (
    SourceQuestion("a:1", "Who?", (), None, ("Ada",)),
    SourceQuestion("a:2", "Where?", (), None, ()),
  )


def test_json_lines_have_fields_of_any_name(tmp_path):
  question = {"ask": "Who?", "of": ["x", "y"], "right": 2, "level": True, "type": "fact", "n": 5}
  path = _write(tmp_path / "a.jsonl", {"body": "Text.", "name": "T", "by": "Ann", "qs": [question]})
  fields = QuestionFieldsConfig(
    id="n", question="ask", choices="of", gold="right", first_gold=1, is_hard="level", kind="type"
  )
  config = JsonlSourcesConfig(
    paths=(path,),
    text_field="body",
    id_field=None,
    title_field="name",
    author_field="by",
    questions_field="qs",
    question_fields=fields,
  )
  asked = SourceQuestion("5", "Who?", ("x", "y"), 1, (), kind="fact", is_hard=True)
  assert sources.read_sources(config) == [
    SourceDocument("a.jsonl:1", "T", "Ann", "", "Text.", (asked,))
  ]


@pytest.mark.parametrize(
  ("record", "fault"),
  [
    ({"id": "a", "text": " \n"}, "the text of document 'a' is empty"),
    ({"id": " ", "text": "x"}, "'id' is empty"),
    ({"id": "a"}, "no field 'text'; the record has"),
    ([1], "no field 'text'; the record has list"),
    ({"id": "a", "text": "x", "questions": {}}, "'questions' is dict, not a list"),
    (
      {"id": "a", "text": "x", "questions": [{"question": "Who?", "choices": ["b", "c"]}]},
      "question 1: the question 'Who.': there is no .gold., the number of .* choice, from 0 to 1",
    ),
    (
      {
        "id": "a",
        "text": "x",
        "questions": [{"id": "q7", "question": "Who?", "choices": ["b", "c"], "gold": 2}],
      },
      "the question 'q7': 'gold' is 2; it must be the number of the right choice, from 0 to 1",
    ),
    (
      {"id": "a", "text": "x", "questions": [{"question": "W", "choices": ["b"], "gold": 0}]},
      "'choices' has one choice",
    ),
    (
      {"id": "a", "text": "x", "questions": [{"question": "W", "short_answers": [""]}]},
      "'short_answers' is empty",
    ),
    (
      {"id": "a", "text": "x", "questions": [{"question": "W", "is_hard": "yes"}]},
      "'is_hard' is 'yes'; it must be true or false",
    ),
    ({"id": "a", "text": "\ud800"}, "half a surrogate pair"),
  ],
)
def test_a_bad_record_is_refused_with_its_line(tmp_path, record, fault):
  path = _write(tmp_path / "a.jsonl", {"id": "first", "text": "Good."}, record)
  with pytest.raises(CorpusError, match=rf"a.jsonl, line 2: .*{fault}"):
    sources.read_sources(JsonlSourcesConfig(paths=(path,)))


def test_a_source_without_files_or_documents_is_refused(tmp_path):
  with pytest.raises(CorpusError, match=r"no file matches .*none.jsonl"):
    sources.read_sources(SqualityConfig(paths=(str(tmp_path / "none.jsonl"),)))
  path = _write(tmp_path / "empty.jsonl")
  with pytest.raises(CorpusError, match="the source 'squality' has no documents"):
    sources.read_sources(SqualityConfig(paths=(path,)))
  with pytest.raises(CorpusError, match="is not a folder"):
    sources.read_sources(NicheConfig(folder=str(tmp_path / "none")))


def test_one_question_id_for_two_questions_is_refused(tmp_path):
  records = [
    {"id": id_, "text": id_, "questions": [{"id": "q", "question": id_}]} for id_ in ("a", "b")
  ]
  path = _write(tmp_path / "a.jsonl", *records)
  with pytest.raises(CorpusError, match="'q' is that of two questions, about 'a' and about 'b'"):
    sources.read_sources(JsonlSourcesConfig(paths=(path,)))


def test_a_folder_gives_text_and_code_by_path(tmp_path):
  tmp_path.joinpath("pkg").mkdir()
  for name, content in {
    "pkg/a.PY": b"x = 1\n",
    "pkg/__init__.py": b"\n",
    "notes.md": b"# Notes",
    "picture.png": b"\x89PNG",
    ".hidden.txt": b"no",
  }.items():
    tmp_path.joinpath(name).write_bytes(content)
  config = FolderSourcesConfig(folder=str(tmp_path))
  assert [(d.id, d.title, d.text) for d in sources.read_sources(config)] == [
    ("notes.md", "notes.md", "# Notes"),
    ("pkg/a.PY", "pkg/a.PY", "x = 1\n"),
  ]
  with pytest.raises(CorpusError, match=r"picture.png: not UTF-8 at byte 0 \(0x89\)"):
    sources.read_sources(FolderSourcesConfig(folder=str(tmp_path), suffixes=()))
  with pytest.raises(CorpusError, match=r"has one of the suffixes \.rs"):
    sources.read_sources(FolderSourcesConfig(folder=str(tmp_path), suffixes=(".rs",)))


def test_niche_questions_belong_to_the_document_of_their_folder(tmp_path):
  tmp_path.joinpath("moth").mkdir()
  _write(tmp_path / "moth/document.jsonl", {"id": "moth", "title": "Moth", "text": "A moth."})
  with pytest.raises(CorpusError, match=r"no file matches .*questions.jsonl"):
    sources.read_sources(NicheConfig(folder=str(tmp_path)))
  _write(tmp_path / "moth/questions.jsonl", {"document": "wasp", "question": "Who?"})
  with pytest.raises(CorpusError, match=r"line 1: document is 'wasp'; .* folder is 'moth'"):
    sources.read_sources(NicheConfig(folder=str(tmp_path)))


def test_documents_are_selected_by_id(tmp_path):
  path = _write(tmp_path / "a.jsonl", *({"id": id_, "text": id_} for id_ in ("moth", "karst", "x")))

  def ids(**fields):
    return [d.id for d in sources.read_sources(JsonlSourcesConfig(paths=(path,), **fields))]

  assert ids(documents=("x", "moth")) == ["moth", "x"]
  assert ids(max_documents=2) == ["moth", "karst"]
  assert ids(documents=("x", "moth"), max_documents=1) == ["moth"]
  with pytest.raises(CorpusError, match="no document 'mth'; the nearest ids are 'moth'"):
    ids(documents=("mth",))


def test_a_split_is_in_title_order_and_keeps_editions_together():
  def document(id_, title, author=""):
    return SourceDocument(id_, title, author, "", id_, ())

  documents = [document("4", "Beta", "Ann"), document("b0", ""), document("1", "alpha")]
  documents += [document("3", "BETA", "Ann"), document("2", "Beta", "Abe")]
  split = sources.split_sources(documents, 0.2)
  assert (split.validation, split.test) == (("1",), ("b0", "2", "3", "4"))
  split = sources.split_sources(documents, 0.8)
  assert (split.validation, split.test) == (("1", "b0", "2", "3", "4"), ())
  assert sources.split_sources(documents, 0.0).validation == ()
  with pytest.raises(ValueError, match=r"validation_fraction is 20.0; it must be in \[0, 1\]"):
    sources.split_sources(documents, 20.0)


def test_a_page_selects_a_source():
  @section
  class Config:
    source: SourceDocumentsConfig

  def parsed(source):
    return parse(Config, page(Config, source=source).to_dict()).source

  niche = page(NicheConfig, folder="f", documents=("a",))
  assert parsed(niche) == NicheConfig(folder="f", documents=("a",))
  jsonl = page(JsonlSourcesConfig, paths=("a",), question_fields={"gold": "answer"})
  assert parsed(jsonl).question_fields.gold == "answer"


def test_the_real_files_are_read(real_data):
  quality = sources.read_sources(
    QualityConfig(paths=(str(real_data / "quality/quality.jsonl.gz"),))
  )
  assert (len(quality), sum(len(d.questions) for d in quality)) == (64, 251)
  assert quality[0].title == "LOST IN TRANSLATION" and quality[0].author == "LARRY M. HARRIS"
  assert quality[0].questions[0].gold == 1  # 2 in the file, which counts from 1
  squality = sources.read_sources(
    SqualityConfig(paths=(str(real_data / "quality/squality_*.jsonl.gz"),))
  )
  assert len(squality) == 127
  assert all(len(question.references) == 4 for d in squality for question in d.questions)
  niche = sources.read_sources(NicheConfig(folder=str(real_data / "niche")))
  assert [d.id for d in niche] == ["halden", "karst", "lumen_moth", "orrin_bay", "tessaly", "veyra"]
  assert all(len(d.questions) == 24 and d.title for d in niche)
  assert niche[0].questions[0].choices[niche[0].questions[0].gold] == "Rosamund Thale"
