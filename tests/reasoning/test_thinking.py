"""How thinking is marked, as tokens."""

import dataclasses

import pytest

from selfimprove_jax.reasoning import thinking


def test_the_forced_end_is_tokenized_as_one_text(model):
  merged = thinking.tokenize(model.format, lambda text: [len(text)])
  assert (merged.end, merged.forced_end) == ((1,), (4,))


@pytest.mark.parametrize("name", ["think_start", "think_end"])
def test_a_delimiter_that_begins_with_a_newline_needs_no_other(model, name):
  assert model.tokens.newline == (ord("\n"),)
  format = dataclasses.replace(model.format, **{name: "\nx"})
  assert thinking.tokenize(format, model.encode).newline == ()


def test_a_stop_text_of_several_tokens_is_refused(model):
  format = dataclasses.replace(model.format, stop=("|", "</t>"))
  with pytest.raises(ValueError, match=r"'</t>' is 4 tokens .* must be one token"):
    thinking.tokenize(format, model.encode)


@pytest.mark.parametrize("name", ["think_end", "ignore"])
def test_a_required_delimiter_may_not_be_empty(model, name):
  with pytest.raises(ValueError, match=f"{name} is empty"):
    dataclasses.replace(model.format, **{name: ""})


def test_two_questions_of_one_id_are_refused(model):
  with pytest.raises(ValueError, match="two questions have the id 'q'"):
    thinking.make_rows([model.question("a"), model.question("b")], 1)
