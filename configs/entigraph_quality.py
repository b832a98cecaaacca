"""EntiGraph on QuALITY with Llama-3-8B (arXiv 2409.07431, sections 2, 4 and appendix D).

  python -m selfimprove_jax.main --config=configs/entigraph_quality.py --workdir=runs/entigraph \
      --config.initial.path=/models/Meta-Llama-3-8B \
      --config.sources.documents.paths='("/data/quality.train", "/data/quality.dev")' \
      --config.replay.source.paths='("/data/redpajama_sample/*.jsonl",)'

paper: the documents themselves, rephrasings and EntiGraph.  rivals: EntiGraph, SPA (arXiv
2603.22213), Active Reading (2508.09494), and questions and answers with focal rewrites
(2603.23562), at equal training tokens.  scaling: EntiGraph and rephrasings at parts of their
tokens, two passes each.

The articles and questions are QuALITY v1.0.1's files train and dev, without HTML. The generator is
an endpoint (extra `endpoint`): its key is in OPENAI_API_KEY. `--dry_run` prints calls, tokens and
dollars, and needs none of the files; `--config.generator.endpoint.max_usd` is a hard cap.
Replay: the 1T sample of RedPajama, as JSON lines. The nine benchmarks are read from
`evals` (`--config.benchmarks.data_dir`; `--config.benchmarks.tasks=` scores none).
configs/entigraph_quick.py is the same pipeline on a laptop.

Differs from the paper: prompts are our own; passages are found by TF-IDF and reranked by the
initial model, where the paper uses two paid services, and their settings are not tuned; no token
sees another document (the paper cuts blocks of 2048 from one concatenation, without a mask); replay
is exactly a tenth of the rows, without replacement, instead of each row with that probability;
attempts without an answer are counted as wrong in `acc_asked`. Parameters and moments are float32,
and the computation is bfloat16. Never run at this size.
"""

from typing import Any

import ml_collections as mlc

from configs import parts
from selfimprove_jax.pipelines import entigraph
from selfimprove_jax.runtime.config import page

_M = 1_000_000
_TOKENS = 455 * _M  # synthetic tokens of EntiGraph


def _arm(target_tokens: int, **corpora: float) -> dict[str, Any]:
  return dict(corpora=corpora, target_tokens=target_tokens, replay_share=0.1)


_ARMS = {
  # Tokens of the paper: 4 passes over 1.3M tokens, 2 passes over 38M and over 455M.
  "paper": dict(
    raw=_arm(5 * _M, raw=1.0),
    rephrase=_arm(76 * _M, rephrase=1.0),
    entigraph=_arm(2 * _TOKENS, entigraph=1.0),
  ),
  "rivals": dict(
    entigraph=_arm(2 * _TOKENS, entigraph=1.0),
    spa=_arm(2 * _TOKENS, spa=1.0),
    active_reading=_arm(2 * _TOKENS, active_reading=1.0),
    mixed=_arm(2 * _TOKENS, qa=1.0, focal=1.0),
  ),
  "scaling": {
    f"{corpus}_{round(1000 * share)}_of_1000": _arm(round(2 * share * tokens), **{corpus: 1.0})
    | dict(corpus_share=share, curve=corpus)
    for corpus, tokens in (("entigraph", _TOKENS), ("rephrase", 38 * _M))
    for share in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
  },
}
# Samples per document and prompt, for about as many tokens as EntiGraph has.
_SYNTHESIS = {
  "paper": dict(rephrase_samples=40),
  "scaling": dict(rephrase_samples=40),
  "rivals": dict(
    rephrase_styles=("qa",),
    rephrase_samples=300,
    spa_samples=200,
    active_reading_samples=60,
    focal_samples=50,
  ),
}


def get_config(variant: str = "paper") -> mlc.ConfigDict:
  parts.check_variant(variant, _ARMS)
  return page(
    entigraph.Config,
    pipeline="entigraph",
    title="EntiGraph: continued pretraining of Llama-3-8B on QuALITY",
    runtime=dict(parallel_stages=1),
    seed=0,
    seq_len=2048,
    mesh=dict(data=1, fsdp=-1),
    sources=dict(
      documents=dict(
        kind="quality",
        paths=("QuALITY.v1.0.1.htmlstripped.train", "QuALITY.v1.0.1.htmlstripped.dev"),
      ),
      validation_fraction=0.2,
    ),
    generator=dict(
      kind="endpoint",
      url="https://api.openai.com/v1",
      endpoint=dict(
        model="gpt-4-turbo",
        api_key_env="OPENAI_API_KEY",
        cache="entigraph_calls.sqlite",
        input_usd_per_million=10.0,
        output_usd_per_million=30.0,
        max_concurrent=64,
      ),
    ),
    synthesis=dict(relations=dict(max_tokens=_TOKENS), **_SYNTHESIS[variant]),
    corpora=dict(batch_documents=1000),
    initial=dict(
      path="Meta-Llama-3-8B",
      special_tokens=dict(
        bos_token="<|begin_of_text|>",  # 128000
        eos_token="<|end_of_text|>",  # 128001
        sep_token="<|reserved_special_token_0|>",  # not used here
        pad_token="<|end_of_text|>",  # never seen or predicted
      ),
    ),
    replay=dict(
      source=dict(kind="jsonl", paths=("redpajama_sample/*.jsonl",), text_field="text"),
      split=dict(
        num_shards=8,
        validation_fraction=0.0,
        test_fraction=0.002,
        max_passage_chars=10**9,  # nothing is cut here; packing cuts documents longer than a row
        min_passage_chars=1,
        order="document",
        shingle_size=20,
      ),
    ),
    replay_tokens=1000 * _M,
    arms=_ARMS[variant],
    model=parts.llama(
      "llama3_8b",
      vocab_size=128_256,
      dtype="bfloat16",
      rope_theta=500_000.0,
      qk_norm=False,
      tie_embeddings=False,
      norm_eps=1e-5,
      remat="qkv_context",
    ),
    training=dict(
      batch_rows=16,
      peak_lr=5e-6,
      final_lr=0.0,
      warmup_fraction=0.05,
      b1=0.9,
      b2=0.999,
      eps=1e-8,
      clip_norm=1.0,
      num_evaluations=20,
      num_checkpoints=20,
    ),
    weight_decay=0.01,
    evaluation=dict(batch_rows=16, max_validation_rows=256),
    questions=dict(
      formats=("chain_of_thought", "choices"),
      num_samples=64,
      engine=dict(num_slots=64, max_length=4096),
    ),
    open_book=dict(
      rag=dict(
        max_chars=1024,
        embedding=dict(method="tfidf_svd", dim=512),
        search=dict(num_neighbors=128),
      ),
      num_passages=8,
      num_candidates=128,
      reranks=True,
    ),
    benchmarks=dict(tasks=parts.SBP_TASKS, data_dir="evals"),
  )
