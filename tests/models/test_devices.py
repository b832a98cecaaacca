"""Float32 products keep float32 where XLA's default would round their operands."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from selfimprove_jax.models import devices, llama
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.sampling import scoring
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import ScoreRequest
from selfimprove_jax.training import losses

EXACT = (jax.lax.Precision.HIGHEST,) * 2


def _precisions(jaxpr) -> list:
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found.append(equation.params["precision"])
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr)
    ):
      if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
        found += _precisions(inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner)
  return found


def _model(dtype):
  config = llama.LlamaConfig(
    vocab_size=32,
    num_layers=1,
    embed_dim=16,
    mlp_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dtype=dtype,
    param_dtype=dtype,
    attention="xla",
  )
  model = llama.Llama(config)
  return model, nn.unbox(llama.init_params(model, jax.random.key(0)))


def _loss_precisions(dtype):
  model, params = _model(dtype)
  ones_BT = np.ones((2, 8), np.int32)
  batch = {"tokens": ones_BT, "segment_ids": ones_BT, "weights": np.ones((2, 8), np.float32)}
  batch["positions"] = np.tile(np.arange(8, dtype=np.int32), (2, 1))
  gradient = jax.grad(losses.next_token_loss(model), has_aux=True)
  found = _precisions(jax.make_jaxpr(gradient)(params, batch, jax.random.key(0)).jaxpr)
  assert len(found) > 20  # forward and backward
  return set(found)


def test_training_on_a_gpu_multiplies_float32_as_float32(monkeypatch):
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  assert _loss_precisions("float32") == {EXACT}


def test_the_log_likelihoods_of_a_gpu_multiply_float32_as_float32(monkeypatch, one_device_mesh):
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  traced, score = [], scoring.score

  def watched(*args, **kwargs):
    traced.append(jax.make_jaxpr(functools.partial(score, *args, **kwargs))())
    return score(*args, **kwargs)

  monkeypatch.setattr(scoring, "score", watched)
  model, params = _model("float32")
  params = jax.device_put(params, partitioning.replicated(one_device_mesh))
  engine = Engine(model, params, one_device_mesh, eos_ids=(), pad_id=0, num_slots=2, max_length=64)
  assert len(list(engine.score([ScoreRequest(prompt=[1, 2, 3], continuation=[4])]))) == 1
  found = [precision for jaxpr in traced for precision in _precisions(jaxpr.jaxpr)]
  assert len(found) > 5
  assert set(found) == {EXACT}


@pytest.mark.parametrize(
  ("dtype", "platform", "setting"),
  [("bfloat16", "gpu", None), ("float32", "cpu", None), ("float32", "gpu", "tensorfloat32")],
)
def test_other_products_are_left_to_xla_or_to_the_users_setting(
  monkeypatch, dtype, platform, setting
):
  monkeypatch.setattr(devices, "platform", lambda: platform)
  x = jnp.ones((2, 2), dtype)
  with jax.default_matmul_precision(setting):
    assert devices.precision(x, x) is None


def test_a_product_with_float32_is_one_of_float32(monkeypatch):
  monkeypatch.setattr(devices, "platform", lambda: "tpu")
  small, large = (jnp.ones((2, 2), dtype) for dtype in ("bfloat16", "float32"))
  assert devices.precision(small, large) is jax.lax.Precision.HIGHEST
