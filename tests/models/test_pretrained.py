import flax.linen as nn
import jax
import numpy as np
import pytest

from selfimprove_jax import partitioning
from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.models import hf_export, params_checkpoint, pretrained
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.models.params import abstract_params, init_params

CONFIG = LlamaConfig(
  vocab_size=64, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8
)


@pytest.fixture(scope="module")
def params():
  return nn.unbox(init_params(Llama(CONFIG), jax.random.key(0)))


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
  """Folder of each kind."""
  folder = tmp_path_factory.mktemp("saved")
  tokenizers.train_bpe(["some words"], vocab_size=262).save(folder / "tokenizer")
  options = {"tokenizer": folder / "tokenizer", "max_positions": 32}
  hf_export.save_pretrained(
    folder / "hf", params, CONFIG, generation=None, dtype="float32", **options
  )
  params_checkpoint.save_params(folder / "orbax", params, CONFIG, **options)
  return folder


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_each_kind_of_folder_is_recognised_and_loaded_on_the_mesh(kind, saved, params):
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  assert pretrained.kind(saved / kind) == kind
  changes = {"dtype": "float32", "param_dtype": "bfloat16", "dropout_rate": 0.1}
  config, loaded = pretrained.load_pretrained(saved / kind, mesh, changes=changes)
  assert config == LlamaConfig(**{**vars(CONFIG), **changes})
  expected = abstract_params(Llama(config), mesh)

  def compare(x, leaf, saved_leaf):
    assert (x.dtype, x.sharding) == (leaf.dtype, leaf.sharding)
    np.testing.assert_array_equal(x, saved_leaf.astype("bfloat16"))

  jax.tree.map(compare, loaded, expected, params)
  assert pretrained.read_max_positions(saved / kind) == 32
  tokenizer = tokenizers.load_tokenizer(pretrained.tokenizer_path(saved / kind))
  assert tokenizer.vocab_size == 262


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_changes_to_what_the_weights_were_trained_for_are_refused(kind, saved, one_device_mesh):
  changes = {"num_layers": 3, "rope_theta": 1e4, "remat": "full", "embed_dim": 32}
  with pytest.raises(ValueError) as error:
    pretrained.load_pretrained(saved / kind, one_device_mesh, changes=changes)
  assert str(error.value).splitlines()[-2:] == [
    "  num_layers: 2 -> 3",
    "  rope_theta: 500000.0 -> 10000.0",
  ]
  with pytest.raises(ValueError, match=r"\['layers'\], which LlamaConfig lacks"):
    pretrained.read_config(saved / kind, changes={"layers": 3})


def test_a_path_without_a_model_says_what_was_looked_for(tmp_path):
  for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.gguf"):
    with pytest.raises(ValueError, match=r"no \.gguf file, and no folder with config\.json"):
      pretrained.kind(path)


def test_the_tokenizer_of_a_gguf_file_is_reached_by_converting_it(tmp_path):
  (tmp_path / "model.gguf").write_bytes(b"")
  with pytest.raises(ValueError, match=r"convert the file first, with tools/convert_checkpoint"):
    pretrained.tokenizer_path(tmp_path / "model.gguf")
