"""Synthetic bootstrapped pretraining as a list of stages (arXiv 2509.15248).

  documents -> tokenizer -> tokens -> seed -> embeddings -> pairs -> synthesizer -> samples
            -> synthetic -> arms -> report

Every arm of `config["arms"]` trains from scratch on a mixture of `unique` or `oracle` data and
synthetic sources: `sbp`, and the controls `unconditional` (samples of the seed model) and
`random_pairs` (a synthesizer tuned on pairs joined at random).
"""

from typing import Any

from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.stages import Plan, Stage

REAL = ("unique", "oracle")
TUNED_ON = {"sbp": "nearest", "random_pairs": "random"}
SYNTHETIC = ("sbp", "unconditional", "random_pairs")


def build(config: dict[str, Any]) -> list[Stage]:
  """The stages of a config that `sbp_config.check` has passed, each after those it reads.

  Raises:
    ValueError: an arm draws from an unknown source, or the model's shape is impossible.
  """
  c = config
  used = {source for arm in c["arms"].values() for source in arm["mixture"]}
  if unknown := used - {*REAL, *SYNTHETIC}:
    raise ValueError(f"arms draw from {sorted(unknown)}; there are {[*REAL, *SYNTHETIC]}")
  sources = [source for source in SYNTHETIC if source in used]

  text = {"documents": "documents", "tokenizer": "tokenizer"}
  read = {"tokens": "tokens", "tokenizer": "tokenizer"}
  stages = [
    Stage("documents", "text_stages:documents", c["corpus"]),
    Stage("tokenizer", "text_stages:tokenizer", c["tokenizer"], {"documents": "documents"}),
    Stage(
      "tokens", "text_stages:tokens", c["tokens"], text, Plan(tokens=c["tokens"]["oracle_tokens"])
    ),
    _pretraining("seed", c, c["seed_model"], read),
  ]
  if any(source in TUNED_ON for source in sources):
    by_model = c["embeddings"]["method"] == "seed_model"
    embeds = {**read, "seed": "seed"} if by_model else read
    stages += [
      Stage(
        "embeddings",
        "pair_stages:embeddings",
        c["embeddings"],
        embeds,
        uses_devices=by_model,
      ),
      Stage("pairs", "pair_stages:make_pairs", c["pairs"], {**read, "embeddings": "embeddings"}),
    ]
  for source in sources:
    stages += _synthesis(source, c, read)
  for name, arm in c["arms"].items():
    inputs = {**read, **{s: f"synthetic/{s}" for s in arm["mixture"] if s in SYNTHETIC}}
    stages.append(_arm(name, c, arm, inputs))
  return stages


def _synthesis(source: str, c: dict[str, Any], read: dict[str, str]) -> list[Stage]:
  stages = []
  model = "seed"
  if source in TUNED_ON:
    model = f"synthesizer/{TUNED_ON[source]}"
    stages.append(
      Stage(
        model,
        "model_stages:tune_synthesizer",
        {"pairs": TUNED_ON[source], "mesh": c["mesh"], "evaluation": c["evaluation"]}
        | c["synthesizer"],
        {**read, "seed": "seed", "pairs": "pairs"},
        Plan(state_bytes=_state_bytes(LlamaConfig(**c["model"]))),
        uses_devices=True,
      )
    )
  synthesis = c["synthesis"]
  sampled = synthesis["target_tokens"]
  flops = sampled * LlamaConfig(**c["model"]).forward_flops_per_token(c["tokens"]["seq_len"])
  stages += [
    Stage(
      f"samples/{source}",
      "synthesis_stages:sample",
      {"conditional": source != "unconditional"} | synthesis,
      {**read, "model": model},
      Plan(tokens=sampled, flops=flops),
      uses_devices=True,
    ),
    Stage(
      f"synthetic/{source}",
      "synthesis_stages:synthetic_rows",
      c["synthetic_rows"],
      {**read, "samples": f"samples/{source}"},
    ),
  ]
  if source == "sbp":
    stages.append(
      Stage(
        "relevance",
        "synthesis_stages:relevance",
        c["relevance"],
        {"tokens": "tokens", "pairs": "pairs", "synthetic": "synthetic/sbp"},
      )
    )
  return stages


def _pretraining(
  name: str, c: dict[str, Any], run: dict[str, Any], inputs: dict[str, str]
) -> Stage:
  """A run from scratch; `run` holds total_tokens, mixture, weight_decay and dropout_rate."""
  model = {**c["model"], "dropout_rate": run["dropout_rate"]}
  num_steps = run["total_tokens"] // (c["training"]["batch_rows"] * c["training"]["seq_len"])
  config = {
    "model": model,
    "mesh": c["mesh"],
    "training": c["training"],
    "num_steps": num_steps,
    "mixture": run["mixture"],
    "weight_decay": run["weight_decay"],
    "evaluation": c["evaluation"],
    "seed": c["seed"],
  }
  network = LlamaConfig(**model)
  flops = run["total_tokens"] * network.train_flops_per_token(c["training"]["seq_len"])
  plan = Plan(run["total_tokens"], flops, _state_bytes(network))
  return Stage(name, "model_stages:pretrain", config, inputs, plan, uses_devices=True)


def _arm(name: str, c: dict[str, Any], arm: dict[str, Any], inputs: dict[str, str]) -> Stage:
  arm = dict(arm)
  del arm["label"]  # how it is shown changes nothing that is trained
  matched = arm.pop("all_in_of")
  stage = _pretraining(f"arms/{name}", c, {**arm, "total_tokens": c["total_tokens"]}, inputs)
  if matched is None:
    return stage
  costs = {f"cost_{i}": name for i, name in enumerate(all_in_stages(matched, c)[:-1])}
  return Stage(
    stage.name,
    "model_stages:pretrain_all_in",
    {**stage.config, "matched_inputs": list(costs)},
    {**inputs, **costs},
    Plan(state_bytes=stage.plan.state_bytes),
    uses_devices=True,
  )


def all_in_stages(arm: str, c: dict[str, Any]) -> list[str]:
  """The stages whose FLOPs an arm cannot do without: seed, embedding, tuning, sampling, itself."""
  names = []
  for source in c["arms"][arm]["mixture"]:
    if source in SYNTHETIC:
      names.append("seed")
      if source in TUNED_ON:
        names += ["embeddings", f"synthesizer/{TUNED_ON[source]}"]
      names.append(f"samples/{source}")
  return [*dict.fromkeys(names), f"arms/{arm}"]


def _state_bytes(model: LlamaConfig) -> float:
  """Parameters, gradients and AdamW's two moments, all float32."""
  return 16.0 * model.num_parameters
