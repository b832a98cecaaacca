"""Sequential against parallel test-time compute on math questions (s1; arXiv 2501.19393, 3 and 5).

  python -m selfimprove_jax.main --config=configs/budget_forcing.py --workdir=runs/budget_forcing \
      --config.checkpoint.path=/models/SmolLM2-1.7B-Instruct \
      --config.questions.path=/data/gsm8k.jsonl.gz

A chat model answers each question in many settings. Sequential: budget forcing, by a maximum of
thinking and by suppressed ends. Parallel: several samples and a majority vote. Controls, as in the
paper: rejection sampling, and prompts that ask for a length, alone and with budget forcing.

default: a chat model without a thinking format; its reply is its thinking.  s1: the delimiters of
s1-32B.  quick: SmolLM2-135M-Instruct on a laptop, 16 questions.  smoke: 2 questions and a few
tokens.  The last two are too small to mean anything.  For MATH500:
--config.questions.question_field=problem --config.questions.answer_format=plain
--config.grading.checker=math_verify (extra `math`).
"""

from collections.abc import Sequence
from typing import Any

import ml_collections as mlc

from configs import parts
from selfimprove_jax.pipelines import budget_forcing
from selfimprove_jax.runtime.config import page

_AT_ONE = dict(temperature=1.0)
_S1 = dict(
  think_start="<|im_start|>think",
  think_end="<|im_start|>answer",
  answer_start="\nFinal Answer:",
  ignore="Wait",
  stop=("<|im_start|>",),
)
_SIZES = {
  "default": dict(
    checkpoint="SmolLM2-1.7B-Instruct",
    num_questions=200,
    response=dict(max_answer_tokens=64, questions_per_shard=50),
    engine=dict(num_slots=64, max_length=2048),
    arms=dict(
      maxima=(128, 256, 512, 1024), ignored=(1, 2, 4), samples=16, tries=16, steps=(1, 2, 4, 8)
    ),
  ),
  "s1": dict(
    checkpoint="s1-32B",
    num_questions=200,
    response=dict(max_answer_tokens=512, questions_per_shard=50),
    engine=dict(num_slots=64, max_length=8192),
    arms=dict(
      maxima=(500, 1000, 2000, 4000), ignored=(1, 2, 4, 6), samples=64, tries=16, steps=(4, 16, 32)
    ),
  ),
  "quick": dict(
    checkpoint="SmolLM2-135M-Instruct",
    num_questions=16,
    response=dict(max_answer_tokens=32, questions_per_shard=16),
    engine=dict(num_slots=16, max_length=512),
    arms=dict(maxima=(32, 64, 128), ignored=(1, 2), samples=4, tries=4, steps=(1,)),
  ),
  "smoke": dict(
    checkpoint="SmolLM2-135M-Instruct",
    num_questions=2,
    response=dict(max_answer_tokens=4, questions_per_shard=1),
    engine=dict(num_slots=2, max_length=256),
    arms=dict(maxima=(4,), ignored=(1,), samples=2, tries=2, steps=()),
  ),
}


def get_config(variant: str = "default") -> mlc.ConfigDict:
  parts.check_variant(variant, _SIZES)
  size = _SIZES[variant]
  small = variant in ("quick", "smoke")
  return page(
    budget_forcing.Config,
    pipeline="budget_forcing",
    title="Sequential and parallel test-time compute" + (f" ({variant})" if small else ""),
    runtime=dict(),
    seed=0,
    mesh=dict(),
    checkpoint=dict(path=size["checkpoint"]),
    questions=dict(path="gsm8k.jsonl.gz", num_questions=size["num_questions"]),
    prompt=dict(),
    thinking=_S1 if variant == "s1" else dict(),
    response=size["response"],
    compute=dict(dtype="float32" if small else "bfloat16"),
    engine=size["engine"],
    arms=_arms(**size["arms"]),
    grading=dict(),
  )


def _arms(
  *, maxima: Sequence[int], ignored: Sequence[int], samples: int, tries: int, steps: Sequence[int]
) -> dict[str, dict[str, Any]]:
  """Returns the methods of the paper's Table 3, and parallel samples, at several budgets each.

  The paper does not say how long a short and a long thought are; here a short one has up to half of
  the largest maximum, and a long one more.
  """
  most = max(maxima)
  arms = {f"forcing_{n}": _forcing(n) for n in maxima}
  arms |= {f"forcing_{most}_wait_{n}": _forcing(most, num_ignored=n) for n in ignored}
  arms["parallel"] = dict(
    method="majority vote",
    budget=dict(max_tokens=most),
    num_samples=samples,
    votes=tuple(2**n for n in range(samples.bit_length())),
    sampling=_AT_ONE,
  )
  for n in maxima:
    arms[f"rejection_{n}"] = dict(
      method="rejection sampling",
      demanded=dict(max_tokens=n),
      budget=dict(max_tokens=n),
      max_tries=tries,
      sampling=_AT_ONE,
    )
  conditions = [("token", n, n) for n in maxima] + [("step", n, 100 * n) for n in steps]
  for kind, amount, longest in conditions:
    method, limit = f"{kind}-conditional", dict(max_tokens=longest)
    arm = dict(method=method, demanded=limit, condition=dict(kind=kind, amount=amount))
    arms[f"{kind}_{amount}"] = arm
    arms[f"{kind}_{amount}_forcing"] = arm | dict(method=f"{method} + budget forcing", budget=limit)
  lengths = {"short": dict(max_tokens=most // 2), "long": dict(min_tokens=most // 2)}
  for kind, demanded in lengths.items():
    arms[f"class_{kind}"] = dict(
      method="class-conditional", demanded=demanded, condition=dict(kind=kind)
    )
  return arms


def _forcing(max_tokens: int, num_ignored: int = 0) -> dict[str, Any]:
  return dict(
    method="budget forcing",
    demanded=dict(max_tokens=max_tokens),
    budget=dict(max_tokens=max_tokens, num_ignored=num_ignored),
  )
