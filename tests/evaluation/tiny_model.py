"""A tiny Llama with random weights, as a Hugging Face folder."""

import json
import pathlib

import flax.linen as nn
import jax
import tokenizers

from selfimprove_jax.models.checkpoints import hf_export
from selfimprove_jax.models.llama import Llama, LlamaConfig, init_params

BOS, EOS = "<|begin|>", "<|end|>"


def save(folder: pathlib.Path, *, adds_bos: bool, max_positions: int = 512) -> pathlib.Path:
  """Writes the model and its tokenizer; with `adds_bos`, the tokenizer begins a text with BOS."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=[BOS, EOS],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(
    ["Question: what is the answer?\nAnswer: the right one."] * 9, trainer
  )
  if adds_bos:
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=[BOS, "$A"], pair=[BOS, "$A", BOS, "$B:1"], special_tokens=[(BOS, 0)]
    )
  files = folder / "tokenizer"
  files.mkdir(parents=True)
  backend.save(str(files / "tokenizer.json"))
  described = {
    **{"eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"},
    **({"bos_token": BOS} if adds_bos else {}),
  }
  (files / "tokenizer_config.json").write_text(json.dumps(described))
  config = LlamaConfig(
    vocab_size=300,
    num_layers=1,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=False,
    rope_theta=10_000.0,
    dtype="float32",
  )
  params = nn.unbox(init_params(Llama(config), jax.random.key(0)))
  # Larger weights make the next token depend on the text, as it does in a trained model.
  params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
  hf_export.save_pretrained(
    folder / "model",
    params,
    config,
    tokenizer=files,
    generation={"bos_token_id": 0, "eos_token_id": 1},
    max_positions=max_positions,
    dtype="float32",
  )
  return folder / "model"
