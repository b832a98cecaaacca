"""Incremental text: whole characters, and stop strings that span tokens."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models

from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.sampling.text_stream import TextStream

_TEXTS = (
  "Grüße aus Köln — 東京は晴れ 🎉👩‍👩‍👧 naïve façade.",
  "def f(x):\n    return x  # twice  the   space\n\n\n\tand a tab",
  "ब्रह्मांड 🇫🇷🏳️‍🌈 e\u0301 \u200b \ufffd kept",
)


@pytest.fixture(scope="module")
def bpe() -> tokenizer_lib.Tokenizer:
  """Byte-level, and so small that most characters are several tokens."""
  return tokenizer_lib.train_bpe(["the cat sat on the mat and then the cat ran"], vocab_size=280)


@pytest.fixture(scope="module")
def sentencepiece() -> tokenizers.Tokenizer:
  """Metaspaces, bytes as fallback, and the decoder of Llama 2's tokenizer."""
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  pieces += ["▁", "▁the", "▁cat", "cat", "s", "▁sat", "é", ".", "▁▁", "t"]
  vocab = {piece: index for index, piece in enumerate(pieces)}
  model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
  backend = tokenizers.Tokenizer(model)
  backend.add_special_tokens(["<unk>", "<s>", "</s>"])
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return backend


def _pieces(stream, tokens):
  return [*(stream.push(token) for token in tokens), stream.finish()]


class _Letters:
  """A tokenizer of chosen strings."""

  def __init__(self, *strings: str):
    self.strings = strings

  def __call__(self, ids):
    return "".join(self.strings[i] for i in ids)


@pytest.mark.parametrize("text", _TEXTS)
def test_pieces_are_whole_characters_and_make_up_the_text(bpe, text):
  tokens = bpe.encode(text)
  stream = TextStream(bpe.decode, ())
  pieces = _pieces(stream, tokens)
  assert "".join(pieces) == stream.text == bpe.decode(tokens) == text
  if "\ufffd" not in text:
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_certain(bpe):
  tokens = bpe.encode("the mat")
  stream = TextStream(bpe.decode, ())
  assert [stream.push(token) for token in tokens] == [bpe.decode([token]) for token in tokens]


def test_tokens_drawn_at_random_give_what_decoding_them_all_gives(bpe):
  # An untrained model writes broken UTF-8 most of the time.
  rng = random.Random(0)
  for _ in range(300):
    tokens = [rng.randrange(bpe.vocab_size) for _ in range(rng.randrange(60))]
    stream = TextStream(bpe.decode, ())
    assert "".join(_pieces(stream, tokens)) == stream.text == bpe.decode(tokens)


def test_sentencepiece_keeps_the_spaces_between_words(sentencepiece):
  ids = sentencepiece.get_vocab()

  def text_of(*pieces):
    tokens = [ids[piece] for piece in pieces]
    stream = TextStream(sentencepiece.decode, ())
    assert "".join(_pieces(stream, tokens)) == sentencepiece.decode(tokens)
    return stream.text

  assert text_of("▁the", "▁cat", "s", "▁sat", ".") == "the cats sat."
  assert text_of("▁", "▁the", "▁▁", "▁", "cat") == " the   cat"
  euro = [f"<0x{byte:02X}>" for byte in "é€".encode()]
  assert text_of("▁cat", *euro, "t", *euro, "▁", *euro) == "cat" + "é€té€ é€"
  # Special tokens are left out, and do not make the next token lose its space.
  assert text_of("<s>", "</s>", "▁the", "</s>", "▁cat") == "the cat"
  assert text_of("▁the", *["</s>"] * 50, "▁", "<s>", "cat") == "the cat"


def test_sentencepiece_loses_no_text_beside_broken_bytes(sentencepiece):
  ids = sentencepiece.get_vocab()
  rng = random.Random(0)
  names = [f"<0x{byte:02X}>" for byte in b"\xff\xe2\x82\xac"] + ["▁cat", "</s>"]
  for _ in range(200):
    tokens = [ids[rng.choice(names)] for _ in range(30)]
    stream = TextStream(sentencepiece.decode, ())
    kept = "".join(_pieces(stream, tokens)).replace("\ufffd", "")
    assert kept.count("cat") == sentencepiece.decode(tokens).count("cat")


def test_special_tokens_amid_a_character_do_not_break_it(bpe):
  first, *rest = bpe.encode("€")
  assert len(rest) == 2
  tokens = [first, *[bpe.bos_id] * 20, rest[0], bpe.sep_id, rest[1]]
  assert "".join(_pieces(TextStream(bpe.decode, ()), tokens)) == "€"


@pytest.mark.parametrize(
  ("strings", "stops", "text", "stop"),
  [
    (("a b", "<st", "op>", " c"), ["<stop>"], "a b", "<stop>"),  # spans tokens
    (("a <st", "op> tail",), ["<stop>"], "a ", "<stop>"),  # with text around it
    (("ab", "cabc", "d"), ["abcd"], "abc", "abcd"),  # restarts within a partial match
    (("aaa", "aab"), ["aab"], "aaa", "aab"),
    (("xab", "c"), ["abc", "b"], "xa", "b"),  # complete first
    (("xa", "bc"), ["bc", "abc"], "x", "abc"),  # both at one character: the longer one
    (("a\n", "\n", "b"), ["\n\n"], "a", "\n\n"),
    (("a\n", "b\n"), ["\n\n"], "a\nb\n", None),
    (("a <st", "o"), ["<stop>"], "a <sto", None),  # the text ends within a partial match
    (("stop",), ["stop"], "", "stop"),
  ],
)  # fmt: skip
def test_stop_string_cuts_the_text(strings, stops, text, stop):
  stream = TextStream(_Letters(*strings), stops)
  assert "".join(_pieces(stream, range(len(strings)))) == text
  assert (stream.text, stream.stop) == (text, stop)


def test_where_a_text_is_cut_does_not_depend_on_its_tokens():
  rng = random.Random(1)
  for _ in range(300):
    text = "".join(rng.choice("ab") for _ in range(30))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(3, 7))) for _ in range(3)]
    cuts = sorted(rng.sample(range(1, 30), 6))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, 30], strict=True)]
    ends = {(text.index(s) + len(s), -len(s)): s for s in stops if s in text}
    stop = ends[min(ends)] if ends else None
    for strings in (parts, list(text), [text]):
      stream = TextStream(_Letters(*strings), stops)
      _pieces(stream, range(len(strings)))
      assert stream.stop == stop
      assert stream.text == (text if stop is None else text[: text.index(stop)])


def test_no_part_of_a_stop_string_leaves():
  stream = TextStream(_Letters("one", " <e", "n", "d ", "two <en", "d>", "three"), ["<end>"])
  assert [stream.push(i) for i in range(7)] == ["one", " ", "", "<end ", "two ", "", ""]
  assert stream.finish() == ""
  assert stream.text == "one <end two "


def test_stop_string_may_hold_characters_of_several_tokens(bpe):
  tokens = bpe.encode("the 東京 cat")
  stream = TextStream(bpe.decode, ["京"])
  assert "".join(_pieces(stream, tokens)) == "the 東"


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3], [None], [["a"]], [b"a"], "stop"])
def test_empty_stop_string_and_no_string_are_refused(bpe, stops):
  with pytest.raises(ValueError, match=r"stop.string"):
    TextStream(bpe.decode, stops)


@pytest.mark.parametrize("text", ["the cat ", "\xff", "\ufffd", "aab"])
def test_cost_of_a_token_does_not_grow(bpe, text):
  longest, decoded = 0, 0

  def decode(ids):
    nonlocal longest, decoded
    longest, decoded = max(longest, len(ids)), decoded + len(ids)
    return bpe.decode(ids)

  once = bpe.encode(text) if text != "\xff" else [bpe.encode("é")[0]]
  tokens = once * 500
  stream = TextStream(decode, ["aaaab"])
  for token in tokens:
    stream.push(token)
    stream.push(bpe.bos_id)
  assert longest <= 10
  assert decoded <= 25 * len(tokens)


def test_the_space_before_a_text_that_follows_another_is_kept():
  """SentencePiece's decoder strips it from the beginning of what it decodes."""
  words = {1: "\u2581Hello", 2: "\u2581world", 3: "\u2581again"}

  def decode(tokens):
    return "".join(words[token] for token in tokens).replace("\u2581", " ").removeprefix(" ")

  def text(context):
    stream = TextStream(decode, (), context)
    pieces = [stream.push(2), stream.push(3), stream.finish()]
    assert "".join(pieces) == stream.text
    return stream.text

  assert text([1]) == " world again"
  assert text([]) == "world again"
