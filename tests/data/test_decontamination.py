"""Benchmark items in documents: planted ones are found, and nothing else is."""

import gzip
import itertools
import json
import random

import pytest

from selfimprove_jax.data import corpora, decontamination, shingles
from selfimprove_jax.data.decontamination import (
  Benchmarks,
  DecontaminationConfig,
  Findings,
  ItemText,
)

_WORDS = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("an", "ero", "ist", "ule", "ot", "ave")]
_HAN = (
  "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"
)


def _text(seed, num_words):
  return " ".join(random.Random(seed).choices(_WORDS, k=num_words))


def _han(seed, num_characters):
  return "".join(random.Random(seed).choices(_HAN, k=num_characters))


def _disguised(text, seed):
  """The text as another site would have it: case, punctuation and white space differ."""
  rng, words = random.Random(seed), []
  for word in text.split():
    word = rng.choice((word, word.upper(), word.capitalize(), f"“{word}”", f"*{word}*"))
    words.append(word + rng.choice(("", ",", ";", "?", " --", "…")))
  return "".join(word + rng.choice((" ", "  ", "\n", "\n\n\t", "\u00a0")) for word in words)


# Long and short ones of words, and of a script without spaces, in which two characters are a word.
_PLANTED = {
  **{f"long {i}": _text(i, 14 + 7 * i) for i in range(6)},
  "of a run": _text(30, 13),
  **{f"short {n}": _text(100 + n, n) for n in range(5, 13)},
  **{f"han {n}": _han(n, n) for n in (10, 17, 25, 26, 60)},
}


def _document(name, seed):
  text = _PLANTED[name]
  before, after = f"{seed} before", f"{seed} after"
  if name.startswith("han"):
    spread = "\n".join([text[:7], text[7:]])  # a line break within it
    return f"{_han(before, 300)}。{spread}！{_han(after, 300)}"
  return f"{_text(before, 400)}\n{_disguised(text, seed)}{_text(after, 400)}"


@pytest.fixture
def benchmarks():
  return Benchmarks(ItemText("planted", name, text) for name, text in _PLANTED.items())


def test_twenty_planted_items_are_found_in_long_documents_and_nothing_else_is(benchmarks):
  assert len(_PLANTED) == 20 and not benchmarks.unchecked
  for seed, name in enumerate(_PLANTED):
    found = benchmarks.contained(_document(name, seed))
    assert [benchmarks.items[number] for number in found] == [("planted", name)]


def test_documents_stream_by_and_those_with_items_are_left_out(benchmarks):
  texts = (_PLANTED["long 2"] if i % 3 == 2 else _text(f"d{i}", 30) for i in itertools.count())
  endless = (corpora.Document(f"d{i}", "g", text) for i, text in enumerate(texts))
  found = []
  findings = Findings(benchmarks, DecontaminationConfig())
  kept = list(itertools.islice(findings.kept(endless, on_found=found.append), 4))
  assert [document.id for document in kept] == ["d0", "d1", "d3", "d4"]
  assert [record["id"] for record in found] == ["d2"]
  assert findings.num_documents == 5
  marks = Findings(benchmarks, DecontaminationConfig(action="mark"))
  kept = list(itertools.islice(marks.kept(endless, on_found=found.append), 3))
  assert [document.id for document in kept] == ["d5", "d6", "d7"]
  assert [record["id"] for record in found] == ["d2", "d5"]


def test_a_corpus_of_items_alone_leaves_nothing_to_train_on(benchmarks):
  findings = Findings(benchmarks, DecontaminationConfig())
  document = corpora.Document("d", "g", _PLANTED["short 7"])
  with pytest.raises(ValueError, match=r"nothing is left .*: 1 of 1 documents contain an item"):
    list(findings.kept([document], on_found=lambda record: None))


def test_documents_without_items_are_kept(benchmarks):
  findings = Findings(benchmarks, DecontaminationConfig())
  for seed in range(200):
    assert findings.check("d", f"{_text(f'd{seed}', 300)} {_han(f'd{seed}', 300)}") is None
  assert findings.summary()["contaminated"] == 0


@pytest.mark.parametrize("shared", [12, 13])
def test_twelve_words_of_a_longer_item_are_no_item_and_thirteen_are(shared):
  item = _text(0, 40).split()
  benchmarks = Benchmarks([ItemText("t", "1", " ".join(item))])
  document = " ".join([_text(1, 50), *item[5 : 5 + shared], _text(2, 50)])
  assert bool(benchmarks.contained(document)) == (shared == 13)


def test_a_run_that_items_share_is_a_hit_of_each():
  texts = [ItemText(task, "1", f"{_text('shared', 15)} {_text(task, 9)}") for task in "abc"]
  found = Benchmarks(texts).contained(f"{_text(1, 50)} {_text('shared', 15)} {_text(2, 50)}")
  assert sorted(found) == [0, 1, 2]


def test_all_but_one_word_of_a_short_item_is_no_item():
  item = _text(0, 9).split()
  benchmarks = Benchmarks([ItemText("t", "1", " ".join(item))])
  assert benchmarks.contained(f"{_text(1, 30)} {' '.join(item)} {_text(2, 30)}")
  assert not benchmarks.contained(f"{_text(1, 30)} {' '.join(item[:-1])} {_text(2, 30)}")
  # Part of a word is not the word.
  assert not benchmarks.contained(f"{_text(1, 30)} {' '.join(item)}s")


def test_jaccard_overlap_would_miss_a_short_item_in_a_long_document():
  item = _text(0, 12)
  document = f"{_text(1, 20_000)} {item} {_text(2, 20_000)}"
  overlap = shingles.jaccard(shingles.word_shingles(item, 5), shingles.word_shingles(document, 5))
  assert overlap < 0.001
  assert Benchmarks([ItemText("t", "1", item)]).contained(document)


def test_short_texts_and_those_that_items_share_are_not_looked_for_but_counted():
  shared = "Which of the following is true?"
  benchmarks = Benchmarks(
    [
      ItemText("a", "1", "Who was the king?"),
      ItemText("a", "2", shared),
      ItemText("a", "2", f"{shared} Iron is heavier than water."),
      ItemText("a", "3", shared),
      ItemText("a", "3", f"{shared} No."),
      ItemText("a", "4", "What is the largest planet of all?"),  # twice the same item
      ItemText("a", "5", "What is the largest planet of all?"),
      ItemText("b", "1", "Who was it?"),
      ItemText("b", "1", "Who was it? Ada Lovelace."),
    ]
  )
  assert benchmarks.unchecked == {"a": 1}
  assert benchmarks.num_items == {"a": 5, "b": 1}

  def found(text):
    return {benchmarks.items[number] for number in benchmarks.contained(text)}

  assert not found(f"Who was the king? {shared}")
  assert found(f"{shared} Iron is heavier than water.") == {("a", "2")}
  assert found("So what is the largest planet of all?") == {("a", "4"), ("a", "5")}
  assert found("Who was it? Ada Lovelace.") == {("b", "1")}


def test_counts_are_of_documents_and_items_and_the_worst_documents_are_kept():
  texts = [ItemText(task, str(i), _text(f"{task}{i}", 20)) for task in "ab" for i in range(4)]
  findings = Findings(Benchmarks(texts), DecontaminationConfig(action="mark", num_worst=2))
  for id_, holds in (("none", []), ("one", [0]), ("three", [0, 1, 5]), ("two", [4, 5])):
    parts = [_text(id_, 30), *(texts[i].text for i in holds), *(texts[i].text for i in holds)]
    findings.check(id_, " ".join(parts))
  summary = findings.summary()
  assert (summary["documents"], summary["contaminated"], summary["dropped"]) == (4, 3, False)
  assert summary["tasks"] == {
    "a": {"items": 4, "unchecked": 0, "items_hit": 2, "documents_hit": 2},
    "b": {"items": 4, "unchecked": 0, "items_hit": 2, "documents_hit": 2},
  }
  assert [record["id"] for record in summary["worst"]] == ["three", "two"]
  worst = summary["worst"][0]
  assert (worst["items"], worst["tasks"]) == (3, {"a": 2, "b": 1})
  first = worst["examples"][0]
  assert (first["task"], first["item"]) == ("a", "0")
  assert first["words"] in texts[0].text and len(first["words"].split()) == 13


@pytest.mark.parametrize(
  ("record", "texts"),
  [
    (
      {"query": "Question: What shines?", "choices": ["the sun", "a stone"], "gold": 0},
      ["What shines?", "What shines? the sun", "What shines? a stone"],
    ),
    (
      {"subject": "s", "question": "Which one?", "choices": ["0", "4"], "answer": "B"},
      ["Which one?", "Which one? 0", "Which one? 4"],
    ),
    (
      {"context": "Question: Which city?\nAnswer:", "answer": "Rome", "aliases": ["Roma"]},
      ["Which city?", "Which city? Rome"],
    ),
    (
      {"qId": "q1", "qText": "who spoke?", "answers": ["x", "y"]},
      ["who spoke?", "who spoke? x", "who spoke? y"],
    ),
    (
      {
        "question": "What burns?",
        "correct_answer": "gas",
        "distractors": ["ice"],
        "support": "Gas",
      },
      ["What burns?", "What burns? gas"],
    ),
    (
      {"problem": "Find x.", "solution": "x is 2.", "answer": "2", "subject": "Algebra"},
      ["Find x.", "Find x. x is 2.", "Find x. 2"],
    ),
    (
      {"context_options": ["Ann met Bo so Ann", "Ann met Bo so Bo"], "continuation": "left."},
      ["Ann met Bo so Ann left.", "Ann met Bo so Bo left.", "Ann met Bo so _ left."],
    ),
    (
      {"context": "A long day came to its", "continuation": "end"},
      ["A long day came to its", "A long day came to its end"],
    ),
    ({"text": "A document."}, ["A document."]),
    (
      {"id": 3, "riddle": "What has keys?", "replies": ["A piano", "A lock"]},
      ["What has keys?", "A piano", "A lock"],
    ),
  ],
)
def test_the_texts_of_an_item_are_its_question_alone_and_with_each_answer(record, texts):
  assert decontamination.item_texts(record) == texts


def test_a_folder_holds_a_file_per_task_and_an_article_several_items(tmp_path):
  with gzip.open(tmp_path / "quality.jsonl.gz", "wt") as file:
    questions = [{"question": _text(i, 20), "options": ["x", "y"]} for i in range(2)]
    file.write(json.dumps({"article": _text(9, 90), "questions": questions}) + "\n\n")
  (tmp_path / "plain.jsonl").write_text(json.dumps({"text": _text(2, 20)}) + "\n")
  (tmp_path / "README.md").write_text("Not a task.")
  found = decontamination.open_benchmarks(DecontaminationConfig(data_dir=str(tmp_path)))
  assert found.items == [
    ("plain", "line 1"),
    ("quality", "line 1, question 1"),
    ("quality", "line 1, question 2"),
  ]
  assert not found.contained(_text(9, 90))  # a text that is asked about is no item
  one = DecontaminationConfig(data_dir=str(tmp_path), tasks=("plain",))
  assert decontamination.open_benchmarks(one).num_items == {"plain": 1}


@pytest.mark.parametrize(
  ("name", "line", "options", "told"),
  [
    (None, "", {}, "must be a folder with a JSON-lines file for each task"),
    (
      "a.jsonl",
      '{"text": "x"}',
      {"tasks": ("b",)},
      r"has no b.jsonl or b.jsonl.gz; there are \['a'\]",
    ),
    ("a.jsonl", '{"text": "x"}\n{"text"', {}, "a.jsonl, line 2: Expecting"),
    ("a.jsonl", '["x"]', {}, r"a.jsonl, line 1: must be a JSON object .* and is \['x'\]"),
    ("a.jsonl", '{"gold": 1}', {}, r"a.jsonl, line 1: has no text; its fields are \['gold'\]"),
    ("a.jsonl", '{"text": "x \\ud800"}', {}, "a.jsonl, line 1: .*surrogates not allowed"),
    ("a.jsonl.gz", "x", {}, "a.jsonl.gz: Not a gzipped file"),
  ],
)
def test_a_bad_folder_is_refused_with_file_and_line(name, line, options, told, tmp_path):
  if name:
    (tmp_path / name).write_text(line)
  with pytest.raises(ValueError, match=told):
    decontamination.open_benchmarks(DecontaminationConfig(data_dir=str(tmp_path), **options))


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:40] + b"x" * 40])
def test_a_damaged_gzip_file_is_refused_by_its_name(damage, tmp_path):
  lines = "".join(json.dumps({"text": _text(i, 50)}) + "\n" for i in range(50))
  (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(lines.encode())))
  with pytest.raises(ValueError, match=r"a\.jsonl\.gz"):
    decontamination.open_benchmarks(DecontaminationConfig(data_dir=str(tmp_path)))


def test_items_of_real_benchmarks_are_found_in_a_page_that_quotes_them(real_data):
  tasks = ("arc_easy", "webquestions", "winogrande", "sciq")
  config = DecontaminationConfig(data_dir=str(real_data / "evals"), tasks=tasks)
  benchmarks = decontamination.open_benchmarks(config)
  for task in tasks:
    file = real_data / "evals" / f"{task}.jsonl.gz"
    for item in list(decontamination.read_items(task, file))[:60]:
      if shingles.num_words(shingles.words(item.text)) >= 5:
        found = benchmarks.contained(f"{_text(1, 50)} {item.text} {_text(2, 50)}")
        assert (task, item.item) in {benchmarks.items[number] for number in found}
