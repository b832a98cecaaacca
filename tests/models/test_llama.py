import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.models import llama
from selfimprove_jax.models.decode_layout import DecodeLlama, decode_config, decode_params
from selfimprove_jax.runtime.config import parse, to_json

CONFIG = llama.LlamaConfig(
  vocab_size=48,
  num_layers=2,
  embed_dim=24,
  mlp_dim=40,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  rope_theta=1234.0,
  norm_eps=1e-2,
  dtype="float32",
)
# Three documents and padding in one row, one document in the other.
LENGTHS = [[5, 3, 6], [16]]
T = 16
TIED = [pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.slow)]


def _packed():
  r = np.random.default_rng(0)
  tokens = np.zeros((2, T), np.int32)
  positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
  for row, lengths in enumerate(LENGTHS):
    start = 0
    for index, length in enumerate(lengths):
      span = slice(start, start + length)
      tokens[row, span] = r.integers(0, CONFIG.vocab_size, length)
      positions[row, span] = np.arange(length)
      segments[row, span] = index + 1
      start += length
  return jnp.array(tokens), jnp.array(positions), jnp.array(segments)


def _documents():
  """(row, span) of every document."""
  for row, lengths in enumerate(LENGTHS):
    for length, end in zip(lengths, np.cumsum(lengths)):
      yield row, slice(int(end) - length, int(end))


@functools.cache
def _params(config):
  """Random parameters, norm weights too, so that an unused one shows."""
  tokens, positions, segments = _packed()
  params = llama.Llama(config).init(jax.random.key(0), tokens, positions, segments)["params"]
  r = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: jnp.array(x + 0.2 * r.normal(size=x.shape), jnp.float32), nn.unbox(params)
  )


def _logits(config, params=None, **kwargs):
  apply = jax.jit(functools.partial(llama.Llama(config).apply, **kwargs))
  return apply({"params": _params(CONFIG) if params is None else params}, *_packed())[0]


@functools.cache
def _reference_logits():
  return np.asarray(_logits(CONFIG))


@functools.cache
def _gradient(config):
  tokens, positions, segments = _packed()

  def loss(params):
    logits = llama.Llama(config).apply({"params": params}, tokens, positions, segments)[0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

  return jax.jit(jax.grad(loss))(_params(CONFIG))


def _qwen3(config, params):
  """transformers' Qwen3 with our parameters."""
  import torch
  import transformers

  theirs = transformers.Qwen3ForCausalLM(
    transformers.Qwen3Config(
      vocab_size=config.vocab_size,
      hidden_size=config.embed_dim,
      intermediate_size=config.mlp_dim,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      rms_norm_eps=config.norm_eps,
      rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
      tie_word_embeddings=config.tie_embeddings,
      attn_implementation="eager",
    )
  ).eval()

  def rows(x, inputs):  # our [in, out...] as torch's [out, in]
    return np.asarray(x).reshape(inputs, -1).T

  state = {
    "model.embed_tokens.weight": params["embedding_VD"],
    "model.norm.weight": params["final_norm"]["scale"],
    "lm_head.weight": params["embedding_VD"]
    if config.tie_embeddings
    else rows(params["head_DV"], config.embed_dim),
  }
  D, NH = config.embed_dim, config.num_heads * config.head_dim
  for i in range(config.num_layers):
    ours = jax.tree.map(lambda x, i=i: np.asarray(x[i]), params["layers"])
    attention, mlp = ours["attention"], ours["mlp"]
    layer = {
      "input_layernorm": ours["attention_norm"]["scale"],
      "post_attention_layernorm": ours["mlp_norm"]["scale"],
      "self_attn.q_proj": rows(attention["wq_DNH"], D),
      "self_attn.k_proj": rows(attention["wk_DKH"], D),
      "self_attn.v_proj": rows(attention["wv_DKH"], D),
      "self_attn.o_proj": rows(attention["wo_NHD"], NH),
      "self_attn.q_norm": attention["q_norm"]["scale"],
      "self_attn.k_norm": attention["k_norm"]["scale"],
      "mlp.gate_proj": rows(mlp["w_gate_DF"], D),
      "mlp.up_proj": rows(mlp["w_up_DF"], D),
      "mlp.down_proj": rows(mlp["w_down_FD"], config.mlp_dim),
    }
    state |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
  theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in state.items()}, strict=True)
  return theirs


@pytest.mark.parametrize("tied", TIED)
def test_packed_rows_give_the_logits_of_transformers_qwen3_per_document(tied):
  import torch

  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  ours = np.asarray(_logits(config, _params(config)))
  theirs = _qwen3(config, _params(config))
  tokens = np.asarray(_packed()[0])
  for row, span in _documents():
    with torch.no_grad():
      expected = theirs(torch.tensor(tokens[row, span])[None].long()).logits[0].numpy()
    assert expected.std() > 0.3
    np.testing.assert_allclose(ours[row, span], expected, atol=1e-4)


def test_a_token_has_no_influence_on_other_documents_nor_on_its_past():
  tokens, positions, segments = _packed()
  logits_fn = jax.jit(
    lambda tokens: llama.Llama(CONFIG).apply(
      {"params": _params(CONFIG)}, tokens, positions, segments
    )[0]
  )
  before = np.asarray(logits_fn(tokens))
  for position in range(sum(LENGTHS[0])):
    changed = tokens.at[0, position].set((tokens[0, position] + 1) % CONFIG.vocab_size)
    moved = np.any(np.asarray(logits_fn(changed)) != before, axis=-1)
    same_document = np.asarray(segments[0] == segments[0, position])
    np.testing.assert_array_equal(moved[0], same_document & (np.arange(T) >= position))
    assert not moved[1].any()


@pytest.mark.parametrize(
  "whole", [True, False], ids=["cache_of_the_prompts_length", "longer_cache"]
)
def test_prefill_and_decode_of_ragged_rows_give_the_logits_of_the_full_pass(whole, one_device_mesh):
  r = np.random.default_rng(0)
  length = 10
  tokens = jnp.array(r.integers(0, CONFIG.vocab_size, (3, length)), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (3, length))
  full = jax.jit(llama.Llama(CONFIG).apply)({"params": _params(CONFIG)}, tokens, positions)[0]

  model = DecodeLlama(decode_config(CONFIG))
  params = {"params": decode_params(_params(CONFIG), CONFIG, one_device_mesh)}
  prompt_lengths, prefix = np.array([1, 4, 6]), 6
  apply = jax.jit(lambda *args: model.apply(params, *args[:2], cache=args[2]))
  # The padding of a prompt is written to the cache too, and must not be seen.
  junk = jnp.array(r.integers(0, CONFIG.vocab_size, (3, prefix)), jnp.int32)
  prompts = jnp.where(np.arange(prefix)[None] < prompt_lengths[:, None], tokens[:, :prefix], junk)
  cache = llama.init_cache(CONFIG, 3, prefix if whole else length)
  logits, cache = apply(prompts, positions[:, :prefix], cache)
  if whole:  # as the engine does: a cache of the prompts' own, then copied into the slots' cache
    more = ((0, 0), (0, 0), (0, length - prefix), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, more), cache)
  for row, n in enumerate(prompt_lengths):
    np.testing.assert_allclose(logits[row, :n], full[row, :n], atol=1e-5)
  for step in range(length - prefix):
    at = jnp.array(prompt_lengths + step, jnp.int32)[:, None]
    logits, cache = apply(jnp.take_along_axis(tokens, at, axis=1), at, cache)
    expected = jnp.take_along_axis(full, at[:, :, None], axis=1)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_cache_and_segments_together_are_refused():
  model = DecodeLlama(decode_config(CONFIG))
  with pytest.raises(ValueError, match="segments or a cache"):
    model.init(jax.random.key(0), *_packed(), llama.init_cache(CONFIG, 2, T))


def test_the_scanned_model_refuses_a_cache():
  tokens, positions, _ = _packed()
  with pytest.raises(ValueError, match="DecodeLlama is the form to sample with"):
    llama.Llama(CONFIG).apply(
      {"params": _params(CONFIG)}, tokens, positions, cache=llama.init_cache(CONFIG, 2, T)
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk_norm", "no_qk_norm"])
def test_num_parameters_is_their_number(tied, qk_norm):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied, qk_norm=qk_norm)
  zeros = jnp.zeros((1, 2), jnp.int32)
  params = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), zeros, zeros)
  assert config.num_parameters == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("tied", TIED)
def test_flops_are_those_that_xla_counts_within_five_percent(tied):
  B, T = 2, 64
  config = llama.LlamaConfig(
    vocab_size=256,
    num_layers=2,
    embed_dim=64,
    mlp_dim=192,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=tied,
    dtype="float32",
    scan_unroll=2,  # XLA counts the body of a loop once
  )
  model, tokens = llama.Llama(config), jnp.zeros((B, T), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)

  def forward(params, tokens):
    return model.apply(params, tokens, tokens, tokens)[0]

  def count(function):
    return jax.jit(function).lower(params, tokens).compile().cost_analysis()["flops"] / (B * T)

  # XLA counts the masked half of the attention too.
  masked = 2 * config.num_layers * config.num_heads * config.head_dim * T
  assert count(forward) == pytest.approx(config.forward_flops_per_token(T) + masked, rel=0.05)
  backward = jax.grad(lambda params, tokens: jnp.sum(forward(params, tokens)))
  assert count(backward) == pytest.approx(config.train_flops_per_token(T) + 3 * masked, rel=0.05)


@pytest.mark.parametrize(
  "remat", ["qkv_context", *(pytest.param(n, marks=pytest.mark.slow) for n in ("full", "dots"))]
)
def test_remat_does_not_change_the_gradient(remat):
  expected = _gradient(CONFIG)
  found = _gradient(dataclasses.replace(CONFIG, remat=remat))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_unrolling_the_scan_changes_nothing():
  found = _logits(dataclasses.replace(CONFIG, scan_unroll=2))
  np.testing.assert_allclose(found, _reference_logits(), atol=1e-5)


def test_bfloat16_compute_keeps_float32_parameters_and_logits_near_float32():
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  tokens, positions, segments = _packed()
  params = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), tokens, positions, segments)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  logits = _logits(config)
  assert logits.dtype == jnp.float32
  hidden = _logits(config, logits=False)
  assert hidden.dtype == jnp.bfloat16
  difference = np.asarray(logits) - _reference_logits()
  # Close, as activations are rounded to 8 bits, yet not equal: the compute is in bfloat16.
  assert 1e-4 < difference.std() < 0.03 * _reference_logits().std()


def test_hidden_states_are_what_the_head_multiplies():
  hidden = _logits(CONFIG, logits=False)
  assert hidden.shape == (2, T, CONFIG.embed_dim)
  logits = hidden @ _params(CONFIG)["embedding_VD"].T
  np.testing.assert_allclose(logits, _reference_logits(), atol=1e-5)


def test_dropout_is_off_by_default_and_follows_its_key():
  model = llama.Llama(dataclasses.replace(CONFIG, dropout_rate=0.3))
  np.testing.assert_array_equal(_logits(model.c), _reference_logits())
  dropped = jax.jit(
    lambda key: model.apply(
      {"params": _params(CONFIG)}, *_packed(), deterministic=False, rngs={"dropout": key}
    )[0]
  )
  draws = [np.asarray(dropped(jax.random.key(seed))) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert np.abs(draws[0] - draws[2]).mean() > 0.1
  assert np.abs(draws[0] - _reference_logits()).mean() > 0.1


def test_each_layer_draws_its_own_dropout():
  model = llama.Llama(dataclasses.replace(CONFIG, dropout_rate=0.5))
  one_token = jnp.ones((1, 1), jnp.int32)

  def loss(params):
    rngs = {"dropout": jax.random.key(0)}
    logits, _ = model.apply(
      {"params": params}, one_token, one_token, deterministic=False, rngs=rngs
    )
    return jnp.sum(jnp.square(logits))

  # A dropped entry of the residual branch gives its column of the weight no gradient.
  gradient_LFD = jax.jit(jax.grad(loss))(_params(CONFIG))["layers"]["mlp"]["w_down_FD"]
  dropped_LD = np.all(np.asarray(gradient_LFD) == 0, axis=1)
  assert 0.2 < dropped_LD.mean() < 0.8
  assert (dropped_LD[0] != dropped_LD[1]).any()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"remat": "some"}, r"model\.remat='some'.*'none', 'full'"),
    ({"attention": "flash"}, r"model\.attention='flash'.*'xla'"),
    ({"dtype": "fp8"}, r"model\.dtype='fp8'.*'float32', 'bfloat16'"),
    ({"num_layers": 0}, r"model\.num_layers=0.*greater than or equal to 1"),
    ({"dropout_rate": 1.0}, r"model\.dropout_rate=1\.0.*less than 1"),
    ({"num_kv_heads": 3}, r"num_heads=4 must be a multiple of num_kv_heads=3"),
    ({"head_dim": 7}, r"head_dim=7 must be even"),
    ({"rope_scaling": {"low_freq_factor": 5.0}}, r"low_freq_factor=5\.0 must be below"),
  ],
)
def test_an_impossible_shape_or_name_is_refused_by_path(changes, message):
  with pytest.raises(ValueError, match=message):
    parse(llama.LlamaConfig, to_json(CONFIG) | changes, path="model")


def test_a_config_is_the_same_after_json():
  scaling = llama.RopeScaling(factor=8.0, original_max_positions=16)
  config = dataclasses.replace(CONFIG, rope_scaling=scaling)
  assert parse(llama.LlamaConfig, to_json(config)) == config


def test_a_rope_factor_of_one_leaves_the_frequencies_as_they_are():
  plain = llama.rope_frequencies(16, 1e4, llama.RopeScaling())
  stretched = llama.rope_frequencies(
    16, 1e4, llama.RopeScaling(factor=4.0, original_max_positions=64)
  )
  np.testing.assert_array_equal(plain, np.float32(1e4 ** (-np.arange(0, 16, 2, np.float32) / 16)))
  np.testing.assert_allclose(stretched[-1], plain[-1] / 4, rtol=1e-6)
  assert stretched[0] == plain[0]


@pytest.mark.parametrize(
  "changes",
  [
    pytest.param({}, id="ours"),
    pytest.param({"qkv_bias": True, "qk_norm": False}, id="qwen2", marks=pytest.mark.slow),
  ],
)
def test_the_form_for_cpus_computes_what_the_plain_form_does(changes):
  plain = dataclasses.replace(CONFIG, attention="xla", **changes)
  on_cpus = dataclasses.replace(plain, attention="cpu")
  params = _params(plain)
  np.testing.assert_allclose(_logits(on_cpus, params), _logits(plain, params), atol=1e-5)
  if not changes:
    found, expected = _gradient(on_cpus), _gradient(plain)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


def test_auto_is_the_form_for_cpus_here():
  def lowered(attention):
    config = dataclasses.replace(CONFIG, attention=attention)
    apply = jax.jit(lambda *args: llama.Llama(config).apply(*args)[0])
    return apply.lower({"params": _params(CONFIG)}, *_packed()).as_text()

  assert lowered("auto") == lowered("cpu") != lowered("xla")


def test_cudnn_refuses_packed_rows():
  with pytest.raises(ValueError, match="takes neither segment ids"):
    _logits(dataclasses.replace(CONFIG, attention="cudnn"))
