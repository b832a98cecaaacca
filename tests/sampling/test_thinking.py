"""How thinking is marked, as tokens."""

import dataclasses

import pytest

from selfimprove_jax.sampling import thinking


def test_the_forced_end_is_tokenized_as_one_text(thinker):
  merged = thinking.tokenize(thinker.format, lambda text: [len(text)])
  assert (merged.end, merged.forced_end) == ((1,), (4,))


@pytest.mark.parametrize("name", ["think_start", "think_end"])
def test_a_delimiter_that_begins_with_a_newline_needs_no_other(thinker, name):
  assert thinker.tokens.newline == (ord("\n"),)
  format = dataclasses.replace(thinker.format, **{name: "\nx"})
  assert thinking.tokenize(format, thinker.encode).newline == ()


def test_a_stop_text_of_several_tokens_is_refused(thinker):
  format = dataclasses.replace(thinker.format, stop=("|", "</t>"))
  with pytest.raises(ValueError, match=r"'</t>' is 4 tokens .* must be one token"):
    thinking.tokenize(format, thinker.encode)


@pytest.mark.parametrize("name", ["think_end", "ignore"])
def test_what_is_needed_may_not_be_empty(thinker, name):
  format = dataclasses.replace(thinker.format, **{name: ""})
  with pytest.raises(ValueError, match=f"{name} is empty"):
    thinking.tokenize(format, thinker.encode)


def test_two_questions_of_one_id_are_refused(thinker):
  with pytest.raises(ValueError, match="two questions have the id 'q'"):
    thinking.make_rows([thinker.question("a"), thinker.question("b")], 1)
