import collections
import itertools
import json

import pytest

from selfimprove_jax import artifacts
from selfimprove_jax.data import corpora, shingles, split

_OPTIONS = dict(
  source="the test",
  num_shards=3,
  seed=0,
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


def _split(folder, documents, **options):
  """({role: records}, summary), read back from the artefact."""
  options = _OPTIONS | options
  writer = artifacts.Writer(folder / "out", config={}, inputs={})
  artifact = writer.finish(split.write_split(documents, writer, scratch=folder / "tmp", **options))
  by_role = collections.defaultdict(list)
  for name in sorted(artifact.shards):
    by_role[name.partition("-")[0]] += artifact.read_jsonl(name)
  return by_role, artifact.summary


def _bytes(folder):
  return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def test_every_passage_goes_to_one_role_and_groups_stay_whole(tmp_path):
  documents = _documents()
  by_role, summary = _split(tmp_path, documents)
  ids = [record["id"] for role in by_role.values() for record in role]
  assert sorted(ids) == sorted(document.id for document in documents)
  groups = {role: {r["group"] for r in records} for role, records in by_role.items()}
  assert not groups["train"] & groups["test"] and not groups["train"] & groups["validation"]
  assert not groups["validation"] & groups["test"]
  assert summary["groups"] == {role: len(groups[role]) for role in split.ROLES}
  assert summary["passages"] == {role: len(by_role[role]) for role in split.ROLES}
  assert summary["characters"]["test"] == sum(len(r["text"]) for r in by_role["test"])
  assert 2 <= summary["groups"]["test"] <= 16  # 8 expected of 40


def test_the_output_is_the_same_bytes_for_any_order_of_documents_and_number_of_buckets(tmp_path):
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
  split.write_split(_documents(), writer, scratch=torn / "tmp", **_OPTIONS)
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
  by_role, summary = _split(tmp_path, documents + copies)
  assert summary["duplicates"] == len(documents)
  folded = [" ".join(r["text"].split()) for role in by_role.values() for r in role]
  assert len(folded) == len(set(folded)) == len(documents)


def test_held_out_passages_that_share_words_with_other_roles_are_dropped(tmp_path):
  clean, _ = _split(tmp_path / "clean", _documents())
  role_of = {r["id"]: role for role, records in clean.items() for r in records}
  by = {role: [i for i in sorted(role_of) if role_of[i] == role] for role in split.ROLES}
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
  by_role, summary = _split(tmp_path / "leaky", documents)
  left = {r["id"] for records in by_role.values() for r in records}
  dropped = {by["test"][0], by["validation"][0], by["validation"][2]}
  assert set(role_of) - left == dropped
  assert summary["dropped_leaking"] == {"validation": 2, "test": 1}
  assert summary["dropped_leaking_share"]["validation"] == 2 / len(by["validation"])


def test_a_passage_shorter_than_a_shingle_is_compared_whole(tmp_path):
  documents = [corpora.Document(f"d{i}", f"g{i}", _text(f"document{i}", 3)) for i in range(60)]
  documents += [
    corpora.Document(f"e{i}", f"h{i}", f"same three {'words' + '!' * i} ......................")
    for i in range(60)
  ]
  by_role, summary = _split(tmp_path, documents)
  assert any("same three" in record["text"] for record in by_role["train"])
  for role in ("validation", "test"):
    assert summary["dropped_leaking"][role] > 0
    assert not any("same three" in record["text"] for record in by_role[role])


def test_passages_keep_the_words_and_the_bounds_and_their_documents_id(tmp_path):
  documents = [
    corpora.Document(f"d{i}", f"g{i}", "\n\n".join(_text(f"d{i}p{p}", 9) for p in range(i % 9 + 1)))
    for i in range(40)
  ]
  by_role, summary = _split(tmp_path, documents)
  passages = {r["id"]: r["text"] for records in by_role.values() for r in records}
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
  by_role, _ = _split(tmp_path, _documents(), order="group")
  groups = [group for group, _ in itertools.groupby(by_role["train"], key=lambda r: r["group"])]
  assert len(groups) == len(set(groups))
  assert groups != sorted(groups)
  ids = [r["id"] for r in by_role["train"] if r["group"] == groups[0]]
  assert ids == [f"{groups[0]}/d{d}" for d in range(3)]


def test_order_by_document_spreads_groups(tmp_path):
  by_role, _ = _split(tmp_path, _documents())
  groups = [record["group"] for record in by_role["train"]]
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


def test_a_role_of_no_share_is_left_out(tmp_path):
  by_role, summary = _split(tmp_path, _documents(), validation_fraction=0.0)
  assert set(by_role) == {"train", "test"}
  assert summary["groups"]["validation"] == 0


def test_what_cannot_be_split_is_refused(tmp_path):
  with pytest.raises(ValueError, match="the test gave no document"):
    _split(tmp_path / "a", [])
  with pytest.raises(ValueError, match=r"raise validation_fraction \(1e-09\)"):
    _split(tmp_path / "b", _documents(), validation_fraction=1e-9)
  with pytest.raises(ValueError, match="no train passage"):
    _split(tmp_path / "c", _documents(2), test_fraction=0.999, validation_fraction=0.0)
  with pytest.raises(ValueError, match="two documents of the test have the id 'g0/d0'"):
    _split(tmp_path / "d", [*_documents(), corpora.Document("g0/d0", "other", "x" * 50)])
  with pytest.raises(ValueError, match="below 1 in all"):
    _split(tmp_path / "e", _documents(), test_fraction=0.9)
  with pytest.raises(ValueError, match="at least twice"):
    _split(tmp_path / "f", _documents(), max_passage_chars=30)
  with pytest.raises(ValueError, match="'document' or 'group'"):
    _split(tmp_path / "g", _documents(), order="random")


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
    ("aaaa bbbbbb    cc", ["aaaa", "bbbbbb    cc"]),  # leaving enough behind the blanks
    ("  short\n", ["short"]),
    ("", [""]),
  ],
)
def test_texts_are_cut_at_the_best_place_in_reach(text, passages):
  assert split.cut_passages(text, max_chars=12, min_chars=4) == passages


def test_held_out_textbook_passages_share_no_run_of_ten_words_with_training(real_data, tmp_path):
  path = str(real_data / "corpora" / "openstax.jsonl.gz")
  documents = [d for d in corpora.jsonl(path, group_field="id") if d.id.startswith("physics/")]
  by_role, summary = _split(
    tmp_path,
    documents,
    max_passage_chars=1500,
    min_passage_chars=200,
    shingle_size=10,
    validation_fraction=0.1,
    test_fraction=0.1,
  )
  found = {
    role: set().union(*(shingles.word_shingles(r["text"], 10) for r in by_role[role]))
    for role in split.ROLES
  }
  assert summary["dropped_leaking"]["test"] > 0
  assert not found["train"] & (found["validation"] | found["test"])
  assert not found["validation"] & found["test"]
  assert json.dumps(summary)
