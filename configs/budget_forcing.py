"""Sequential against parallel test-time compute on math questions (s1; arXiv 2501.19393, 3 and 5).

  python -m selfimprove_jax.main --config=configs/budget_forcing.py --workdir=runs/budget_forcing \
      --config.checkpoint=/models/SmolLM2-1.7B-Instruct --config.questions.path=/data/gsm8k.jsonl.gz

A chat model answers each question in many settings. Sequential: budget forcing, by a maximum of
thinking and by suppressed ends. Parallel: several samples and a majority vote. Beside them, as in
the paper, rejection sampling and prompts that ask for a length, alone and with budget forcing.

default: a chat model without a thinking format; its reply is its thinking. s1: the delimiters of
s1-32B. quick: SmolLM2-135M-Instruct on a laptop, 16 questions. smoke: a few questions and tokens.
The last two are too small to mean a thing. For MATH500:
--config.questions.question_field=problem --config.questions.answer_format=plain
--config.grading.checker=math_verify (extra `math`).
"""

import ml_collections as mlc

_GREEDY = dict(temperature=0.0)
_AT_ONE = dict(temperature=1.0)


def _arm(method: str, *, demanded: tuple[int, int | None] = (0, None), **changes) -> dict:
  """One setting; `demanded` is the least and the most thinking tokens that it asks for."""
  settings = dict(
    method=method,
    demanded=dict(min_tokens=demanded[0], max_tokens=demanded[1]),
    condition=None,
    max_tokens="auto",
    num_ignored=0,
    min_tokens=0,
    min_unstopped_tokens=0,
    num_samples=1,
    votes=[1],
    max_tries=0,
    sampling=_GREEDY,
  )
  if unknown := changes.keys() - settings.keys():
    raise TypeError(f"an arm has no settings {sorted(unknown)}")
  return settings | changes


def _arms(*, maxima: list[int], ignored: list[int], samples: int, tries: int, steps: list[int]):
  """The methods of the paper's Table 3, and parallel scaling, at several budgets each.

  What a short and a long thought are is not in the paper: here, up to half of the largest maximum,
  and more.
  """
  most = max(maxima)
  arms = {f"forcing_{n}": _arm("budget forcing", demanded=(0, n), max_tokens=n) for n in maxima}
  for n in ignored:
    arms[f"forcing_{most}_wait_{n}"] = _arm(
      "budget forcing", demanded=(0, most), max_tokens=most, num_ignored=n
    )
  votes = [2**n for n in range(samples.bit_length())]
  arms["parallel"] = _arm(
    "majority vote", max_tokens=most, num_samples=samples, votes=votes, sampling=_AT_ONE
  )
  for n in maxima:
    arms[f"rejection_{n}"] = _arm(
      "rejection sampling", demanded=(0, n), max_tokens=n, max_tries=tries, sampling=_AT_ONE
    )
  conditions = [("token", n, (0, n)) for n in maxima]
  conditions += [("step", n, (0, 100 * n)) for n in steps]
  conditions += [("class", "short", (0, most // 2)), ("class", "long", (most // 2, None))]
  for kind, amount, demanded in conditions:
    condition = dict(kind=kind, amount=amount)
    arms[f"{kind}_{amount}"] = _arm(f"{kind}-conditional", demanded=demanded, condition=condition)
    if kind != "class":
      arms[f"{kind}_{amount}_forcing"] = _arm(
        f"{kind}-conditional + budget forcing",
        demanded=demanded,
        condition=condition,
        max_tokens=demanded[1],
      )
  return arms


_NO_FORMAT = dict(
  think_start="", think_end="\n\nFinal Answer:", answer_start="", ignore="\nWait", stop=[]
)
_S1 = dict(
  think_start="<|im_start|>think",
  think_end="<|im_start|>answer",
  answer_start="\nFinal Answer:",
  ignore="Wait",
  stop=["<|im_start|>"],
)


def _size(variant: str) -> dict:
  """How much is asked, and of how large a window."""
  match variant:
    case "default":
      return dict(
        checkpoint="SmolLM2-1.7B-Instruct",
        questions=200,
        questions_per_shard=50,
        num_slots=64,
        max_length=2048,
        max_answer_tokens=64,
        arms=_arms(
          maxima=[128, 256, 512, 1024], ignored=[1, 2, 4], samples=16, tries=16, steps=[1, 2, 4, 8]
        ),
      )
    case "s1":
      return _size("default") | dict(
        checkpoint="s1-32B",
        max_length=8192,
        max_answer_tokens=512,
        arms=_arms(
          maxima=[500, 1000, 2000, 4000],
          ignored=[1, 2, 4, 6],
          samples=64,
          tries=16,
          steps=[4, 16, 32],
        ),
      )
    case "quick":
      return dict(
        checkpoint="SmolLM2-135M-Instruct",
        questions=16,
        questions_per_shard=16,
        num_slots=16,
        max_length=512,
        max_answer_tokens=32,
        arms=_arms(maxima=[32, 64, 128], ignored=[1, 2], samples=4, tries=4, steps=[1]),
      )
    case "smoke":
      return _size("quick") | dict(
        questions=4,
        questions_per_shard=2,
        num_slots=4,
        max_answer_tokens=4,
        arms=_arms(maxima=[4, 8], ignored=[1], samples=2, tries=2, steps=[1]),
      )
  raise ValueError(
    f"variant {variant!r} is unknown; there are 'default', 's1', 'quick' and 'smoke'"
  )


def get_config(variant: str = "default") -> mlc.ConfigDict:
  size = _size(variant)
  small = variant in ("quick", "smoke")
  c = mlc.ConfigDict()
  c.pipeline = "budget_forcing"
  c.title = "Sequential and parallel test-time compute" + (f" ({variant})" if small else "")
  c.seed = 0
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = size["checkpoint"]
  c.questions = dict(
    path="gsm8k.jsonl.gz",
    question_field="question",
    answer_field="answer",
    answer_format="gsm8k",
    id_field=mlc.config_dict.placeholder(str),
    num_questions=size["questions"],
  )
  c.prompt = dict(chat=True, system="", text="{question}")
  c.thinking = _S1 if variant == "s1" else _NO_FORMAT
  c.response = {name: size[name] for name in ("max_answer_tokens", "questions_per_shard")}
  c.compute = dict(dtype="float32" if small else "bfloat16")
  c.engine = {name: size[name] for name in ("num_slots", "max_length")}
  c.arms = size["arms"]
  c.grading = dict(checker="numbers", timeout_seconds=10.0, num_processes=2)
  c.runtime = dict(parallel_stages=1)
  return c
