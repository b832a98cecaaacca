import dataclasses
import json
import shutil
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from selfimprove_jax.models.checkpoints import open_checkpoint, params_checkpoint
from selfimprove_jax.models.checksums import DamagedCheckpointError
from selfimprove_jax.models.llama import (
  Llama,
  LlamaConfig,
  RopeScaling,
  abstract_params,
  init_params,
)
from selfimprove_jax.runtime import partitioning

CONFIG = LlamaConfig(
  vocab_size=64,
  num_layers=2,
  embed_dim=32,
  mlp_dim=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  rope_scaling=RopeScaling(factor=8.0, original_max_positions=32),
)


@pytest.fixture(scope="module")
def params():
  return nn.unbox(init_params(Llama(CONFIG), jax.random.key(0)))


def _save(folder, params, config=CONFIG):
  params_checkpoint.save_params(folder, params, config, tokenizer=None, max_positions=32)


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (4, 2)])
def test_parameters_restore_on_any_mesh_and_in_any_dtype(fsdp, tensor, params, tmp_path):
  _save(tmp_path / "model", params)
  checkpoint = open_checkpoint(tmp_path / "model")
  assert (checkpoint.config, checkpoint.max_positions) == (CONFIG, 32)
  mesh = partitioning.make_mesh(data=-1, fsdp=fsdp, tensor=tensor)
  for dtype in ("float32", "bfloat16"):
    config = dataclasses.replace(CONFIG, param_dtype=dtype)
    restored = checkpoint.load_params(mesh, config)
    abstract = abstract_params(Llama(config), mesh)

    def compare(x, leaf, saved, dtype=dtype):
      assert x.sharding == leaf.sharding
      np.testing.assert_array_equal(x, saved.astype(dtype))

    jax.tree.map(compare, restored, abstract, params)


def test_damage_is_noticed(params, tmp_path, one_device_mesh):
  folder = tmp_path / "model"
  _save(folder, params)
  value = json.loads((folder / "model.json").read_text())
  value["checksums"]["['embedding_VD']"] ^= 1
  (folder / "model.json").write_text(json.dumps(value))
  with pytest.raises(DamagedCheckpointError, match="checksums are not those that were saved"):
    open_checkpoint(folder).load_params(one_device_mesh, CONFIG)
  shutil.rmtree(folder / "params")
  with pytest.raises(DamagedCheckpointError, match="can't be read"):
    open_checkpoint(folder).load_params(one_device_mesh, CONFIG)


def test_an_unfinished_folder_and_another_format_are_refused(params, tmp_path):
  folder = tmp_path / "model"
  _save(folder, params)
  value = json.loads((folder / "model.json").read_text())
  (folder / "model.json").write_text(json.dumps({**value, "format": 9}))
  with pytest.raises(ValueError, match="has format 9; this version reads 1"):
    _ = open_checkpoint(folder).config
  (folder / "model.json").unlink()
  with pytest.raises(ValueError, match=r"holds no model: .*model\.json"):
    open_checkpoint(folder)
  with pytest.raises(ValueError, match="exists already"):
    _save(folder, params)


def test_a_config_of_another_dtype_than_the_parameters_is_refused(params, tmp_path):
  config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
  with pytest.raises(ValueError, match=r"param_dtype='bfloat16', but .* \{'float32'\}"):
    _save(tmp_path / "model", params, config)


_ONE_LOADS = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
from selfimprove_jax.runtime import distributed
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.models.checkpoints import open_checkpoint
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.initialize(coordinator=f"localhost:{port}", num_processes=2, process_id=index,
                       connect_seconds=60, heartbeat_seconds=60, hang_seconds=20)
checkpoint = open_checkpoint(folder)
mesh = partitioning.LocalMeshConfig(data=1, fsdp=2).make()
for _ in range(index):
  checkpoint.load_params(mesh, checkpoint.config)
distributed.barrier("the other has loaded it, or needs nothing")
print("loaded", index)
"""


@pytest.mark.slow
def test_a_process_loads_onto_its_own_devices_without_the_others(
  params, tmp_path, subprocess_options
):
  _save(tmp_path / "model", params)
  with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _ONE_LOADS, str(index), str(port), str(tmp_path / "model")],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      **subprocess_options,
    )
    for index in range(2)
  ]
  told = [process.communicate(timeout=120) for process in processes]
  for index, (out, _) in enumerate(told):  # gloo, which connects processes, writes lines too
    assert f"loaded {index}" in out.splitlines(), told
