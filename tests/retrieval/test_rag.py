"""Chunks, retrieval and reranking by hand, and on documents that no model can know."""

import numpy as np
import pytest

from selfimprove_jax.data import sources
from selfimprove_jax.retrieval import ann, embedding, rag


def _document(text, id_="d", title="Title", author="", year=""):
  return sources.SourceDocument(id_, title, author, year, text, ())


def _parts(text, max_chars):
  return [chunk.text.split("\n", 1)[1] for chunk in rag.chunks(_document(text), max_chars)]


def _config(**search):
  return rag.RagConfig(
    max_chars=80,
    embedding=embedding.TfidfSvdConfig(dim=3),
    search=ann.SearchConfig(num_neighbors=4, **search),
  )


ANIMALS = _document(
  "The cat sat on the mat with the dog.\n\nThe dog chased the cat around the mat.\n\n"
  "A dog and a cat sleep on one mat.",
  id_="animals",
  title="Pets",
)
STARS = _document(
  "Bright stars shine in galaxies.\n\nGalaxies hold many bright stars and dust.\n\n"
  "Stars shine because they burn; galaxies shine with stars.",
  id_="stars",
  title="Sky",
)


def test_a_text_that_fits_is_one_chunk_under_its_title():
  [chunk] = rag.chunks(_document("One.\n\nTwo.\n", author="Ann Lee", year="1901"), 12)
  assert chunk == rag.Chunk("d", '"Title" by Ann Lee (1901)\nOne.\n\nTwo.')
  [chunk] = rag.chunks(_document("One.", id_="notes/a.txt", title=""), 12)
  assert chunk.text == '"notes/a.txt"\nOne.'


def test_chunks_end_with_the_largest_piece_that_fits():
  paragraphs = "aa bb.\n\ncc dd.\n \nee ff."
  assert _parts(paragraphs, 14) == ["aa bb.\n\ncc dd.", "ee ff."]
  assert _parts(paragraphs, 13) == ["aa bb.", "cc dd.", "ee ff."]
  assert _parts("aa bb\ncc dd\n\nee", 6) == ["aa bb", "cc dd", "ee"]
  assert _parts('Is it? "No." Yes! A 3.5 b.', 12) == ['Is it? "No."', "Yes!", "A 3.5 b."]
  assert _parts("one two three", 7) == ["one two", "three"]
  assert _parts("one incomprehensibly", 6) == ["one", "incomp", "rehens", "ibly"]


@pytest.mark.parametrize("max_chars", [1, 7, 40, 256, 10_000])
def test_chunks_hold_the_whole_text_and_none_is_too_long(max_chars):
  rng = np.random.default_rng(max_chars)
  pieces = [
    "word",
    "a",
    "sentence. ",
    "line\n",
    "paragraph.\n\n",
    " ",
    "x" * 50,
    '"Oh!" ',
    "\u00e9",
  ]
  text = "".join(rng.choice(pieces, 600))
  parts = _parts(text, max_chars)
  assert max(map(len, parts)) <= max_chars
  assert "".join("".join(parts).split()) == "".join(text.split())


def test_chunks_refuse_a_size_below_1():
  with pytest.raises(ValueError, match="max_chars=0 must be at least 1"):
    rag.chunks(ANIMALS, 0)


@pytest.mark.parametrize("method", ["exact", "scann"])
def test_the_nearest_chunks_come_first(method):
  index = rag.build_index([ANIMALS, STARS], _config(method=method), seed=0)
  assert [chunk.document for chunk in index.chunks] == ["animals"] * 2 + ["stars"] * 2
  found = index.retrieve(["Which stars shine?", "Where is the cat?"], 2)
  assert [[one.chunk.document for one in row] for row in found] == [["stars"] * 2, ["animals"] * 2]
  assert all(row[0].score >= row[1].score > 0.5 for row in found)


def test_more_chunks_than_there_are_gives_all():
  index = rag.build_index([ANIMALS, STARS], _config(), seed=0)
  [found] = index.retrieve(["cat"], 100)
  assert {one.chunk for one in found} == set(index.chunks)
  assert index.retrieve([], 3) == []
  with pytest.raises(ValueError, match="k=0 must be at least 1"):
    index.retrieve(["cat"], 0)


def test_an_index_needs_text():
  with pytest.raises(ValueError, match="the 1 documents have no text"):
    rag.build_index([_document(" \n")], _config(), seed=0)


def _found(*texts):
  return [rag.Retrieved(rag.Chunk(text, text), 0.5) for text in texts]


def test_reranking_sorts_each_query_by_its_own_scores_and_keeps_the_order_of_equals():
  calls = []

  def score(pairs):
    calls.append(pairs)
    return [passage.count(query) for query, passage in pairs]

  found = rag.rerank(["a", "b"], [_found("ab", "ba", "aa", "bb"), _found("aa", "ab")], score, 3)
  assert [[one.chunk.text for one in row] for row in found] == [["aa", "ab", "ba"], ["ab", "aa"]]
  assert [one.score for one in found[0]] == [2, 1, 1]
  assert calls == [[*(("a", text) for text in ("ab", "ba", "aa", "bb")), ("b", "aa"), ("b", "ab")]]
  assert rag.rerank([], [], score, 3) == []


def test_reranking_refuses_what_does_not_fit():
  found = [_found("ab", "ba")]
  for arguments, message in (
    ((["a", "b"], found, lambda pairs: [], 1), "2 queries have 1 lists"),
    ((["a"], found, lambda pairs: [1.0], 1), "2 pairs of query and passage got 1 scores"),
    ((["a"], found, lambda pairs: [1.0, float("nan")], 1), "the score of query 'a' is NaN"),
    ((["a"], found, lambda pairs: [1.0, 2.0], 0), "k=0 must be at least 1"),
  ):
    with pytest.raises(ValueError, match=message):
      rag.rerank(*arguments)


def test_recall_counts_queries_with_the_right_document_among_the_first_k():
  found = [_found("x", "a", "a"), _found("x", "y", "b"), _found()]
  shares = [rag.recall_at_k(found, ["a", "b", "c"], k) for k in (1, 2, 3)]
  assert shares == pytest.approx([0, 1 / 3, 2 / 3])
  with pytest.raises(ValueError, match="there are 3 queries and 2 documents"):
    rag.recall_at_k(found, ["a", "b"], 1)


def test_questions_find_their_document_even_without_its_title(real_data):
  documents = sources.read_sources(sources.NicheConfig(folder=str(real_data / "niche")))
  config = rag.RagConfig(
    max_chars=512,
    embedding=embedding.TfidfSvdConfig(dim=48),
    search=ann.SearchConfig(num_neighbors=8),
  )
  index = rag.build_index(documents, config, seed=0)
  asked = [(one, document) for document in documents for one in document.questions]
  gold = [document.id for _, document in asked]
  found = index.retrieve([one.question for one, _ in asked], 8)
  assert len(asked) == 144 and len(index.chunks) > 80
  assert rag.recall_at_k(found, gold, 1) > 0.95
  holds_answer = [
    any(
      answer.lower() in one.chunk.text.lower() for one in row for answer in question.short_answers
    )
    for row, (question, _) in zip(found, asked, strict=True)
  ]
  assert np.mean(holds_answer) > 0.9
