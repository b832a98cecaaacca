"""Evaluates a checkpoint on benchmarks, prompted and scored as lm-eval does.

  python -m selfimprove_jax.main --config=configs/evaluation.py --workdir=runs/evaluation \
      --config.checkpoint=SmolLM2-135M --config.tasks=arc_easy,sciq --config.data_dir=evals

The checkpoint is a Hugging Face folder, a GGUF file, a folder of ours, or the address of an
endpoint that gives log-probabilities (with `--config.endpoint.model=NAME`). `data_dir` holds a
JSON-lines file per task; evaluation/tasks/builtin.py says which, and with which fields. A task of
your own is the path of a YAML file.

sbp: the nine benchmarks of SBP's paper.  closed_book: QuALITY's questions without their articles.
math: GSM8K and MATH-500 (extra `math`).
"""

import ml_collections as mlc

from configs import parts
from selfimprove_jax.pipelines import evaluation
from selfimprove_jax.runtime.config import page

_TASKS = {
  "sbp": parts.SBP_TASKS,
  "closed_book": "quality",
  "math": "gsm8k,math500",
}


def get_config(variant: str = "sbp") -> mlc.ConfigDict:
  parts.check_variant(variant, _TASKS)
  return page(
    evaluation.Config,
    pipeline="evaluation",
    title="Evaluation",
    runtime=dict(),
    checkpoint="checkpoint",
    endpoint=dict(),
    tasks=_TASKS[variant],
    data_dir="evals",
    examples_per_shard=100,
    mesh=dict(data=-1),
    compute=dict(),
    engine=dict(num_slots=16, max_length=2048),
  )
