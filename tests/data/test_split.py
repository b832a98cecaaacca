import collections
import dataclasses
import itertools
import json
import random

import pytest

from selfimprove_jax.data import corpora, shingles, split
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime.config import parse, to_json

_CONFIG = split.SplitConfig(
  num_shards=3,
  validation_fraction=0.2,
  test_fraction=0.2,
  max_passage_chars=200,
  min_passage_chars=20,
  order="document",
  shingle_size=5,
  num_buckets=4,
)


def _text(name, num_words=12):
  return " ".join(f"{name}w{i}" for i in range(num_words))


def _documents(num_groups=40, per_group=3):
  return [
    corpora.Document(f"g{g}/d{d}", f"g{g}", _text(f"g{g}d{d}"))
    for g in range(num_groups)
    for d in range(per_group)
  ]


def _write(documents, writer, folder, *, seed=0, **changes):
  config = dataclasses.replace(_CONFIG, **changes)
  options = dict(seed=seed, source="the test", scratch=folder / "tmp")
  return split.write_split(documents, writer, config, **options)


def _split(folder, documents, **options):
  """Returns ({split: records}, summary), read back from the artifact."""
  writer = artifacts.Writer(folder / "out", config={}, inputs={})
  artifact = writer.finish(_write(documents, writer, folder, **options))
  by_split = collections.defaultdict(list)
  for name in sorted(artifact.shards):
    by_split[name.partition("-")[0]] += artifact.read_jsonl(name)
  return by_split, artifact.summary


def _bytes(folder):
  return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def test_every_passage_goes_to_one_split_and_groups_stay_whole(tmp_path):
  documents = _documents()
  by_split, summary = _split(tmp_path, documents)
  ids = [record["id"] for name in by_split.values() for record in name]
  assert sorted(ids) == sorted(document.id for document in documents)
  groups = {name: {r["group"] for r in records} for name, records in by_split.items()}
  assert not groups["train"] & groups["test"] and not groups["train"] & groups["validation"]
  assert not groups["validation"] & groups["test"]
  assert summary["groups"] == {name: len(groups[name]) for name in split.SPLITS}
  assert summary["passages"] == {name: len(by_split[name]) for name in split.SPLITS}
  assert summary["characters"]["test"] == sum(len(r["text"]) for r in by_split["test"])
  assert 2 <= summary["groups"]["test"] <= 16  # 8 expected of 40


def test_neither_order_of_documents_nor_number_of_buckets_changes_the_bytes(tmp_path):
  first, again = tmp_path / "a", tmp_path / "b"
  copies = [corpora.Document(f"copy{i}", "g", d.text) for i, d in enumerate(_documents())]
  documents = _documents() + copies
  _split(first, documents)
  _split(again, documents[::-1], num_buckets=7)
  assert _bytes(first) == _bytes(again)


def test_an_unfinished_split_is_finished_with_the_same_bytes(tmp_path):
  whole, torn = tmp_path / "whole", tmp_path / "torn"
  _split(whole, _documents())
  writer = artifacts.Writer(torn / "out", config={}, inputs={})
  _write(_documents(), writer, torn)
  (torn / "out" / "train-00001-of-00003.jsonl").unlink()
  (torn / "tmp" / "split").mkdir()
  (torn / "tmp" / "split" / "left over").write_text("by a crash")
  _, summary = _split(torn, _documents())
  assert _bytes(torn) == _bytes(whole)
  assert summary["passages"]["train"] > 40
  assert not (torn / "tmp" / "split").exists()


def test_another_seed_holds_out_other_groups(tmp_path):
  first, _ = _split(tmp_path / "a", _documents())
  other, _ = _split(tmp_path / "b", _documents(), seed=1)
  assert {r["group"] for r in first["test"]} != {r["group"] for r in other["test"]}


def test_copies_leave_one_document_whatever_their_white_space(tmp_path):
  documents = _documents()
  copies = [
    corpora.Document(f"copy{i}", f"copygroup{i}", document.text.replace(" ", " \n\t"))
    for i, document in enumerate(documents)
  ]
  by_split, summary = _split(tmp_path, documents + copies)
  assert summary["repeated"] == len(documents)
  folded = [" ".join(r["text"].split()) for name in by_split.values() for r in name]
  assert len(folded) == len(set(folded)) == len(documents)


def test_held_out_passages_that_share_words_with_other_splits_are_dropped(tmp_path):
  clean, _ = _split(tmp_path / "clean", _documents())
  split_of = {r["id"]: name for name, records in clean.items() for r in records}
  by = {name: [i for i in sorted(split_of) if split_of[i] == name] for name in split.SPLITS}
  shared = {  # the same five words in these documents
    by["train"][0]: "one two three four five",
    by["test"][0]: "ONE two, three four five!",
    by["test"][1]: "alpha beta gamma delta epsilon",
    by["validation"][0]: "alpha beta gamma delta epsilon",
    by["validation"][1]: "one two three four six",
    by["validation"][2]: "one two three four five",
  }
  documents = [
    corpora.Document(d.id, d.group, f"{d.text} {shared.get(d.id, '')}".strip())
    for d in _documents()
  ]
  by_split, summary = _split(tmp_path / "leaky", documents)
  left = {r["id"] for records in by_split.values() for r in records}
  dropped = {by["test"][0], by["validation"][0], by["validation"][2]}
  assert set(split_of) - left == dropped
  assert summary["dropped_leaking"] == {"validation": 2, "test": 1}
  assert summary["dropped_leaking_share"]["validation"] == 2 / len(by["validation"])


@pytest.mark.parametrize("first", ["一", "ア", "ก"])
def test_shared_text_without_spaces_is_found(tmp_path, first):
  def text(name, num):
    rng = random.Random(str(name))
    return "".join(chr(ord(first) + rng.randrange(46)) for _ in range(num))

  leak = text("leak", 70)
  documents = [
    corpora.Document(f"d{i}", f"g{i}", text(i, 50) + (leak if i % 3 else "") + text(-1 - i, 50))
    for i in range(60)
  ]
  by_split, summary = _split(tmp_path, documents, shingle_size=10)
  assert any(leak in record["text"] for record in by_split["train"])
  for name in split.HELD_OUT:
    assert summary["dropped_leaking"][name] > 0 and by_split[name]
    assert not any(leak in record["text"] for record in by_split[name])


def test_a_passage_shorter_than_a_shingle_is_compared_whole(tmp_path):
  documents = [corpora.Document(f"d{i}", f"g{i}", _text(f"document{i}", 3)) for i in range(60)]
  documents += [
    corpora.Document(f"e{i}", f"h{i}", f"same three {'words' + '!' * i} ......................")
    for i in range(60)
  ]
  by_split, summary = _split(tmp_path, documents)
  assert any("same three" in record["text"] for record in by_split["train"])
  for name in ("validation", "test"):
    assert summary["dropped_leaking"][name] > 0
    assert not any("same three" in record["text"] for record in by_split[name])


def test_passages_keep_the_words_and_the_bounds_and_their_documents_id(tmp_path):
  documents = [
    corpora.Document(f"d{i}", f"g{i}", "\n\n".join(_text(f"d{i}p{p}", 9) for p in range(i % 9 + 1)))
    for i in range(40)
  ]
  by_split, summary = _split(tmp_path, documents)
  passages = {r["id"]: r["text"] for records in by_split.values() for r in records}
  assert summary["dropped_short"] == 0
  for document in documents:
    if document.id in passages:
      assert passages[document.id] == document.text
    else:
      parts = [
        passages[f"{document.id}#{n}"]
        for n in itertools.takewhile(
          lambda n, d=document: f"{d.id}#{n}" in passages, itertools.count()
        )
      ]
      assert len(parts) > 1
      assert " ".join(parts).split() == document.text.split()
  assert all(20 <= len(text) <= 200 for text in passages.values())


def test_documents_too_short_for_a_passage_are_counted(tmp_path):
  short = [corpora.Document(f"s{i}", f"s{i}", f"short {i}") for i in range(5)]
  _, summary = _split(tmp_path, _documents() + short)
  assert summary["dropped_short"] == 5
  assert sum(summary["passages"].values()) == len(_documents())


def test_order_by_group_keeps_groups_together_in_their_order(tmp_path):
  by_split, _ = _split(tmp_path, _documents(), order="group")
  groups = [group for group, _ in itertools.groupby(by_split["train"], key=lambda r: r["group"])]
  assert len(groups) == len(set(groups))
  assert groups != sorted(groups)
  ids = [r["id"] for r in by_split["train"] if r["group"] == groups[0]]
  assert ids == [f"{groups[0]}/d{d}" for d in range(3)]


def test_order_by_document_spreads_groups(tmp_path):
  by_split, _ = _split(tmp_path, _documents())
  groups = [record["group"] for record in by_split["train"]]
  assert len(list(itertools.groupby(groups))) > len(set(groups)) * 2


def test_shards_have_equal_parts_of_one_order(tmp_path):
  one, _ = _split(tmp_path / "a", _documents(), num_shards=1)
  three, summary = _split(tmp_path / "b", _documents(), num_shards=3)
  assert one == three
  sizes = [
    len((tmp_path / "b" / "out" / f"train-{artifacts.shard_name(i, 3)}").read_text().splitlines())
    for i in range(3)
  ]
  assert sum(sizes) == summary["passages"]["train"] and max(sizes) - min(sizes) <= 1


def test_a_split_of_no_share_is_left_out(tmp_path):
  by_split, summary = _split(tmp_path, _documents(), validation_fraction=0.0)
  assert set(by_split) == {"train", "test"}
  assert summary["groups"]["validation"] == 0


def test_what_cannot_be_split_is_refused(tmp_path):
  with pytest.raises(ValueError, match="the test gave no document"):
    _split(tmp_path / "a", [])
  for changes, message in [
    (
      dict(validation_fraction=1e-9),
      r"in 40 groups, .*expects 4e-08\..*fraction \(0.075 expects 3",
    ),
    (dict(min_passage_chars=100), r"drawn for train, every .* lower min_passage_chars \(100\)"),
    (dict(num_groups=2), "6 documents in 2 groups, .* train, validation, test need a group each"),
    (dict(num_groups=1, validation_fraction=0.0), "in 1 groups, .* train, test need a group each"),
    (dict(num_groups=2, validation_fraction=0.0, test_fraction=0.999), "none was drawn for train"),
  ]:
    documents = _documents(changes.pop("num_groups", 40))
    with pytest.raises(ValueError, match=message):
      _split(tmp_path / str(changes), documents, **changes)
  with pytest.raises(ValueError, match="two documents of the test have the id 'g0/d0'"):
    _split(tmp_path / "d", [*_documents(), corpora.Document("g0/d0", "other", "x" * 50)])


def test_held_out_passages_that_all_leak_are_counted(tmp_path):
  documents = [
    corpora.Document(f"d{i}", f"g{i}", f"{_text('same')} {_text(f'd{i}', i % 9)}")
    for i in range(60)
  ]
  with pytest.raises(ValueError, match=r"drawn for validation, .* other splits \(\d+ do\)"):
    _split(tmp_path, documents)


def test_one_document_can_be_all_of_the_train_split(tmp_path):
  document = corpora.Document("a", "a", _text("a", 3_000))
  by_split, _ = _split(tmp_path, [document], validation_fraction=0.0, test_fraction=0.0)
  assert " ".join(record["text"] for record in sorted(by_split["train"], key=_number)).split() == (
    document.text.split()
  )


def _number(record):
  return int(record["id"].partition("#")[2])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"test_fraction": 0.9}, "their sum must be below 1"),
    ({"max_passage_chars": 30}, "must be at least twice min_passage_chars=20"),
    ({"order": "random"}, "order='random': .*'document' or 'group'"),
    ({"num_shards": 0}, "num_shards=0: .*greater than or equal to 1"),
  ],
)
def test_a_config_that_can_not_be_split_by_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    parse(split.SplitConfig, to_json(_CONFIG) | changes)


@pytest.mark.parametrize(
  "text, passages",
  [
    ("aaaa\n\nbbbb\ncc. dd", ["aaaa", "bbbb\ncc. dd"]),  # a paragraph before a line
    ("aaaa\nbb. cc dd eeee", ["aaaa", "bb. cc dd", "eeee"]),  # a line before a sentence
    ("aaa bb. cc dd ee ff", ["aaa bb.", "cc dd ee ff"]),  # a sentence before a word
    ("aaa bbb ccc ddd eee", ["aaa bbb ccc", "ddd eee"]),
    ("a" * 28, ["a" * 12, "a" * 12, "a" * 4]),  # anywhere
    ("a" * 26, ["a" * 12, "a" * 10, "a" * 4]),  # leaving enough for the last
    ("aaaaaaaaaa bb cc", ["aaaaaaaaaa", "bb cc"]),
    (
      "一二三四。五六七八。」九十",
      ["一二三四。", "五六七八。」九十"],
    ),  # a sentence, without spaces
    ("aaaa bbbbbb    cc", ["aaaa", "bbbbbb    cc"]),  # leaving enough behind the blanks
    ("  short\n", ["short"]),
    ("", [""]),
  ],
)
def test_texts_are_cut_at_the_best_place_in_reach(text, passages):
  assert split.cut_passages(text, max_chars=12, min_chars=4) == passages


@pytest.mark.slow
def test_held_out_textbook_passages_share_no_run_of_ten_words_with_training(real_data, tmp_path):
  path = str(real_data / "corpora" / "openstax.jsonl.gz")
  source = corpora.JsonlConfig(paths=(path,), id_field="id")
  documents = [d for d in corpora.read_documents(source) if d.id.startswith("physics/")]
  by_split, summary = _split(
    tmp_path,
    documents,
    max_passage_chars=1500,
    min_passage_chars=200,
    shingle_size=10,
    validation_fraction=0.1,
    test_fraction=0.1,
  )
  found = {
    name: set().union(*(shingles.word_shingles(r["text"], 10) for r in by_split[name]))
    for name in split.SPLITS
  }
  assert summary["dropped_leaking"]["test"] > 0
  assert not found["train"] & (found["validation"] | found["test"])
  assert not found["validation"] & found["test"]
  assert json.dumps(summary)
