import json
import pickle

import pytest
import tokenizers

from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.data.tokenizer import SpecialTokens

_TEXTS = [
  "the cat sat on the mat, the cat!",
  "naïve café 😀",
  "def function(x):\n  return somewhere\n",
] * 20


@pytest.fixture(scope="module")
def ours():
  return tokenizer_lib.train_bpe(_TEXTS, vocab_size=300)


@pytest.mark.parametrize("text", ["the cat", "  two\n\n\tblanks ", "😀 中文 \0", "", "<|eos|>"])
def test_any_text_comes_back(ours, text):
  assert ours.decode(ours.encode(text)) == text
  assert ours.encode_batch([text, "the"]) == [ours.encode(text), ours.encode("the")]


def test_training_learns_merges_up_to_the_size_asked(ours):
  assert ours.vocab_size == 300
  assert len(ours.encode(" the cat")) < 8


def test_special_tokens_have_ids_of_their_own_that_decoding_leaves_out(ours):
  specials = [ours.pad_id, ours.bos_id, ours.sep_id, ours.eos_id]
  assert specials == [0, 1, 2, 3]
  assert ours.decode([ours.bos_id, *ours.encode("a"), ours.sep_id, *ours.encode("b")]) == "ab"


def test_text_that_spells_a_special_token_does_not_become_it(ours, tmp_path):
  ours.save(tmp_path / "t")
  for tokenizer in (
    ours,
    tokenizer_lib.load_tokenizer(tmp_path / "t"),
    pickle.loads(pickle.dumps(ours)),
  ):
    ids = tokenizer.encode("a<|eos|><|bos|>")
    assert not {tokenizer.eos_id, tokenizer.bos_id} & set(ids)
    assert not {tokenizer.eos_id} & set(tokenizer.encode_batch(["a<|eos|>"])[0])
    assert tokenizer.decode(ids) == "a<|eos|><|bos|>"


def test_training_again_gives_the_same_files(ours, tmp_path):
  ours.save(tmp_path / "a")
  tokenizer_lib.train_bpe(iter(_TEXTS), vocab_size=300).save(tmp_path / "b")
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
def test_training_on_real_text_again_gives_the_same_tokenizer(real_data):
  from selfimprove_jax.data import corpora

  config = corpora.JsonlConfig(paths=(str(real_data / "corpora" / "rust.jsonl.gz"),))
  texts = [document.text for document in corpora.read_documents(config)]
  first, again = (tokenizer_lib.train_bpe(texts, vocab_size=1024) for _ in range(2))
  assert first.backend.to_str() == again.backend.to_str()


def test_a_saved_tokenizer_keeps_which_token_is_which(tmp_path, ours):
  ours.save(tmp_path / "a")
  tokens = SpecialTokens(sep_token="<|eos|>", pad_token="<|fill|>")
  renamed = tokenizer_lib.load_tokenizer(tmp_path / "a", tokens)
  assert renamed.pad_id == 300 and renamed.vocab_size == 301
  renamed.save(tmp_path / "b")
  loaded = tokenizer_lib.load_tokenizer(tmp_path / "b")
  assert (loaded.sep_id, loaded.pad_id, loaded.eos_id) == (3, 300, 3)


def test_a_vocabulary_without_room_for_merges_is_refused():
  with pytest.raises(ValueError, match="vocab_size=260 must be above 260"):
    tokenizer_lib.train_bpe(_TEXTS, vocab_size=260)


def test_a_token_of_ordinary_text_cannot_be_special(tmp_path, ours):
  ours.save(tmp_path)
  with pytest.raises(ValueError, match="sep_token='a' is a token that ordinary text"):
    tokenizer_lib.load_tokenizer(tmp_path, SpecialTokens(sep_token="a"))


def test_a_missing_special_token_says_which_option_to_set(tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])).save(str(path))
  with pytest.raises(ValueError, match=r"defines no eos_token, pad_token: .*eos_token='<\|eos\|>'"):
    tokenizer_lib.load_tokenizer(path, SpecialTokens(bos_token="a", sep_token="b"))


def test_a_hugging_face_folder_is_read_with_its_own_special_tokens(tmp_path, ours):
  import transformers

  backend = tokenizers.Tokenizer.from_str(ours.backend.to_str())
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
  )
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<|sep|>", eos_token="<|eos|>", pad_token="<|pad|>"
  )
  theirs.save_pretrained(tmp_path)
  loaded = tokenizer_lib.load_tokenizer(tmp_path, SpecialTokens(sep_token="<|pair|>"))
  assert (loaded.bos_id, loaded.eos_id, loaded.sep_id, loaded.pad_id) == (2, 3, 300, 0)
  assert loaded.encode("the cat sat") == ours.encode("the cat sat")  # no BOS


def test_a_tokenizer_that_pads_and_truncates_does_so_no_more(tmp_path, ours):
  backend = tokenizers.Tokenizer.from_str(ours.backend.to_str())
  backend.enable_truncation(3)
  backend.enable_padding(length=50)
  backend.save(str(tmp_path / "tokenizer.json"))
  loaded = tokenizer_lib.load_tokenizer(tmp_path / "tokenizer.json")
  texts = ["the cat sat on", "the"]
  assert loaded.encode_batch(texts) == ours.encode_batch(texts)


def test_a_saved_tokenizer_is_read_by_transformers(tmp_path, ours):
  import transformers

  ours.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs.encode("the cat 😀", add_special_tokens=False) == ours.encode("the cat 😀")
  assert (theirs.bos_token_id, theirs.sep_token_id, theirs.eos_token_id) == (1, 2, 3)


def test_gpt2_tokenizes_as_it_is_known_to(real_data):
  end = "<|endoftext|>"
  folder = real_data / "models" / "gpt2_tokenizer"
  tokens = SpecialTokens(bos_token=end, eos_token=end, sep_token="<|sep|>", pad_token=end)
  gpt2 = tokenizer_lib.load_tokenizer(folder, tokens)
  assert gpt2.encode("Hello world") == [15496, 995]
  assert (gpt2.bos_id, gpt2.eos_id, gpt2.sep_id, gpt2.vocab_size) == (50256, 50256, 50257, 50258)
  for text in ("Grüße 😀👩‍🚀", "  a\n\n\tb", f"not {end} an end"):
    assert gpt2.decode(gpt2.encode(text)) == text
    assert 50256 not in gpt2.encode(text)
  with pytest.raises(ValueError, match="defines no sep_token"):
    tokenizer_lib.load_tokenizer(folder, SpecialTokens(bos_token=end, eos_token=end, pad_token=end))


def test_a_default_stands_for_the_special_tokens_that_are_not_defined(ours):
  backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "<end>": 2}, []))
  made = tokenizer_lib.make_tokenizer(backend, {"eos_token": "<end>"}, name="m", default="<end>")
  assert (made.bos_id, made.sep_id, made.pad_id, made.eos_id) == (2, 2, 2, 2)
  assert made.encode("a<end>") == [0]  # its characters are no tokens of this vocabulary


@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_code_of_a_checkpoint_is_never_run(class_name, ours, tmp_path):
  ours.save(tmp_path)
  (tmp_path / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  config |= {"tokenizer_class": class_name, "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  assert tokenizer_lib.load_tokenizer(tmp_path).encode("the cat") == ours.encode("the cat")
