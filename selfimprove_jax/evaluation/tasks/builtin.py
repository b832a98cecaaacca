"""The benchmarks, prompted and scored as lm-eval 0.4.13 does where it has them.

Local files have the shapes that each function reads. Differs from lm-eval in the shots, which are
the first ones of their file for every example instead of some drawn anew for each; and in GSM8K and
MATH-500, whose answers `reasoning.math_answers` compares.
"""

import difflib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from selfimprove_jax.evaluation.tasks import hub, user
from selfimprove_jax.evaluation.tasks.items import Choices, Document, Generation, Item
from selfimprove_jax.evaluation.tasks.task import Row, Task

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN_WORDS = 12  # of a text without a title, to say which one it is


def _plain_choices(context: str, texts: Iterable[str], gold: tuple[int, ...]) -> Choices:
  texts = tuple(texts)
  continuations = tuple(" " + text for text in texts)
  return Choices(contexts=(context,), continuations=continuations, texts=texts, gold=gold)


def _index(name: str, value: Any, number: int, *, first: int = 0) -> int:
  """Returns the index of a right choice, from 0."""
  if isinstance(value, bool) or not isinstance(value, int) or not first <= value < first + number:
    raise ValueError(
      f"{name} is {value!r}; it must be the number of a choice, from {first} to "
      f"{first + number - 1}"
    )
  return value - first


def lettered(question: str, texts: Iterable[str]) -> tuple[str, str]:
  """Returns a prompt that names each choice by a letter, and the letters.

  Raises:
    ValueError: there are more choices than letters.
  """
  texts = list(texts)
  if len(texts) > len(_LETTERS):
    raise ValueError(f"{len(texts)} choices; there are letters for {len(_LETTERS)}")
  letters = _LETTERS[: len(texts)]
  lines = [question.strip(), *(f"{a}. {text}" for a, text in zip(letters, texts)), "Answer:"]
  return "\n".join(lines), letters


def _arc(record: Row) -> Item:
  gold = _index("gold", record["gold"], len(record["choices"]))
  return _plain_choices(record["query"] + "\nAnswer:", record["choices"], (gold,))


def _sciq(record: Row) -> Item:
  context = f"{record['support'].lstrip()}\nQuestion: {record['question']}\nAnswer:"
  texts = (*record["distractors"], record["correct_answer"])
  return _plain_choices(context, texts, (len(texts) - 1,))


def _winogrande(record: Row) -> Item:
  contexts = tuple(record["context_options"])
  rest = record["continuation"].strip()
  gold = _index("gold", record["gold"], len(contexts))
  # Normalization has nothing to count: all choices have the same continuation.
  texts = (rest,) * len(contexts)
  return Choices(contexts=contexts, continuations=(" " + rest,), texts=texts, gold=(gold,))


def _mmlu(record: Row) -> Item:
  context, letters = lettered(record["question"], record["choices"])
  if record["answer"] not in tuple(letters):
    raise ValueError(f"answer is {record['answer']!r}; it must be one of {', '.join(letters)}")
  return _plain_choices(context, letters, (letters.index(record["answer"]),))


def _mmlu_description(record: Row) -> str:
  subject = record["subject"].replace("_", " ")
  return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def _triviaqa(record: Row) -> Item:
  question = record["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
  return Generation(
    prompt=f"Question: {question}?\nAnswer:",  # with a second question mark, as in lm-eval
    stop=("\n", ".", ","),
    max_tokens=24,
    answers=tuple(dict.fromkeys([record["answer"], *record["aliases"]])),
    shown=record["answer"],
  )


def _webqs(record: Row) -> Item:
  texts: list[str] = []
  for answer in sorted(record["answers"]):
    # An answer that continues another one is greedy only if that one is.
    if not texts or not answer.startswith(texts[-1]):
      texts.append(answer)
  context = f"Question: {record['qText']}\nAnswer:"
  return _plain_choices(context, texts, tuple(range(len(texts))))


def _lambada(record: Row) -> Item:
  return _plain_choices(record["context"], [record["continuation"]], (0,))


def _openwebtext(record: Row) -> Item:
  return Document(text=record["text"])


def _gsm8k(record: Row) -> Item:
  _, mark, right = record["answer"].rpartition("####")
  if not mark:
    raise ValueError(f"answer has no '####': {record['answer'][-80:]!r}")
  return Generation(
    prompt=f"Question: {record['question']}\nAnswer:",
    stop=("Question:",),
    max_tokens=256,
    answers=(right.strip(),),
    shown=record["answer"],
    grader="numbers",
  )


def _math500(record: Row) -> Item:
  return Generation(
    prompt=f"Problem:\n{record['problem']}\n\nSolution:",
    stop=("Problem:",),
    max_tokens=512,
    answers=(record["answer"],),
    shown=record["solution"],
    grader="math",
  )


def _questions(line: Row) -> Iterator[Row]:
  """Yields the questions of an article, with what its line says of it."""
  about = {key: value for key, value in line.items() if key not in ("questions", "article")}
  about["article"] = line.get("article", "")
  for question in line["questions"]:
    yield {**about, **question}


def _about(record: Row) -> str:
  """Names the text of a closed-book question, by its title or else by its first words."""
  if not record.get("title"):
    words = record["article"].split()
    if not words:
      raise ValueError("there is neither a title nor an article, so a question names no text")
    return f'the text that begins "{" ".join(words[:_SHOWN_WORDS])} ..."'
  author = f" by {record['author']}" if record.get("author") else ""
  year = f" ({record['year']})" if record.get("year") else ""
  return f'"{record["title"]}"{author}{year}'


def _closed_book(record: Row) -> tuple[str, str]:
  question = record["question"].strip()
  asked = f"A question about {_about(record)}: {question[:1].lower()}{question[1:]}"
  return lettered(asked, record["options"])


def _quality(record: Row) -> Item:
  context, letters = _closed_book(record)
  gold = _index("gold_label", record["gold_label"], len(letters), first=1)
  return _plain_choices(context, letters, (gold,))


def _hard_questions(line: Row) -> Iterator[Row]:
  for question in _questions(line):
    if "difficult" not in question:
      raise KeyError("a question has no field `difficult` (1 for a hard one, else 0)")
    if question["difficult"]:
      yield question


def _coursera(record: Row) -> Item:
  """Scores every set of letters; a line's end, so that none is the beginning of another."""
  context, letters = _closed_book(record)
  sizes = range(1, len(letters) + 1)
  sets = ["".join(some) for n in sizes for some in itertools.combinations(letters, n)]
  right = "".join(sorted(set(record["answer"])))
  if right not in sets:
    raise ValueError(
      f"answer is {record['answer']!r}; it must be one or more of the letters {letters}"
    )
  return Choices(
    contexts=(context,),
    continuations=tuple(f" {some}\n" for some in sets),
    texts=tuple(sets),
    gold=(sets.index(right),),
  )


_ARC_FIELDS = ("query", "choices", "gold")
_ACCURACIES = ("acc", "acc_norm", "acc_bytes")

TASKS: dict[str, Task] = {
  task.name: task
  for task in (
    Task(
      name="arc_challenge",
      version=1,
      file="arc_challenge.jsonl.gz",
      fields=_ARC_FIELDS,
      make=_arc,
      metrics=_ACCURACIES,
      hub=hub.ARC_CHALLENGE,
    ),
    Task(
      name="arc_easy",
      version=1,
      file="arc_easy.jsonl.gz",
      fields=_ARC_FIELDS,
      make=_arc,
      metrics=_ACCURACIES,
      hub=hub.ARC_EASY,
    ),
    Task(
      name="sciq",
      version=1,
      file="sciq.jsonl.gz",
      fields=("question", "correct_answer", "distractors", "support"),
      make=_sciq,
      metrics=_ACCURACIES,
      hub=hub.SCIQ,
    ),
    Task(
      name="winogrande",
      version=1,
      file="winogrande.jsonl.gz",
      fields=("context_options", "continuation", "gold"),
      make=_winogrande,
      metrics=("acc",),
      hub=hub.WINOGRANDE,
    ),
    Task(
      name="mmlu",
      version=1,
      file="mmlu.jsonl.gz",
      fields=("subject", "question", "choices", "answer"),
      make=_mmlu,
      metrics=("acc_micro", "acc_macro", "ppl", "ppl_choices"),
      shots_file="mmlu_dev.jsonl.gz",
      num_shots=5,
      group_field="subject",
      description=_mmlu_description,
      hub=hub.MMLU,
    ),
    Task(
      name="triviaqa",
      version=1,
      file="triviaqa.jsonl.gz",
      fields=("context", "answer", "aliases"),
      make=_triviaqa,
      metrics=("exact_match",),
      shots_file="triviaqa.jsonl.gz",
      num_shots=1,
      hub=hub.TRIVIAQA,
    ),
    Task(
      name="webqs",
      version=1,
      file="webquestions.jsonl.gz",
      fields=("qText", "answers"),
      make=_webqs,
      metrics=("greedy_acc",),
      shots_file="webquestions_train.jsonl.gz",
      num_shots=1,
      hub=hub.WEBQS,
    ),
    Task(
      name="lambada",
      version=1,
      file="lambada.jsonl.gz",
      fields=("context", "continuation"),
      make=_lambada,
      metrics=("ppl_word", "greedy_acc"),
      hub=hub.LAMBADA,
    ),
    Task(
      name="openwebtext",
      version=1,
      file="openwebtext.jsonl.gz",
      fields=("text",),
      make=_openwebtext,
      metrics=("ppl_token", "bits_per_byte"),
      hub=hub.OPENWEBTEXT,
    ),
    Task(
      name="gsm8k",
      version=1,
      file="gsm8k.jsonl.gz",
      fields=("question", "answer"),
      make=_gsm8k,
      metrics=("number_match",),
      shots_file="gsm8k.jsonl.gz",
      num_shots=5,
      hub=hub.GSM8K,
    ),
    Task(
      name="math500",
      version=1,
      file="math500.jsonl.gz",
      fields=("problem", "solution", "answer", "subject"),
      make=_math500,
      metrics=("math_match",),
      shots_file="math500.jsonl.gz",
      num_shots=4,
      group_field="subject",
      hub=hub.MATH500,
    ),
    *(
      Task(
        name=name,
        version=1,
        file="quality.jsonl.gz",
        fields=("article_id", "question", "options", "gold_label"),
        make=_quality,
        metrics=("acc", "ppl_choices"),
        rows=rows,
        group_field="article_id",
      )
      for name, rows in (("quality", _questions), ("quality_hard", _hard_questions))
    ),
    Task(
      name="coursera",
      version=1,
      file="coursera.jsonl.gz",
      fields=("article_id", "question", "options", "answer"),
      make=_coursera,
      metrics=("acc",),
      rows=_questions,
      group_field="article_id",
    ),
  )
}


def get(name: str) -> Task:
  """Returns a task, by its name here or by the path of the YAML file that defines it.

  Raises:
    ValueError: there is none of this name; the message has the three nearest names. Or the file is
      not a task's.
  """
  if name.endswith((".yaml", ".yml")):
    task = user.load(name)
    if task.name in TASKS:
      raise ValueError(f"{name}: task={task.name!r} is the name of a task of ours; choose another")
    return task
  if name not in TASKS:
    nearest = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.0)
    raise ValueError(
      f"there is no task {name!r}; the nearest names are {', '.join(nearest)}. A task of your own "
      f"is the path of a .yaml file"
    )
  return TASKS[name]


def named(tasks: str) -> dict[str, tuple[str, Task]]:
  """Returns the tasks of a comma-separated list by name, each with what the list calls it.

  Raises:
    ValueError: like `get`; or the list has a task twice.
  """
  paths = [path.strip() for path in tasks.split(",") if path.strip()]
  found = {(task := get(path)).name: (path, task) for path in paths}
  if len(found) != len(paths):
    raise ValueError(f"tasks={tasks!r} must name no task twice")
  return found
