"""Asks questions about source documents: choices, short answers, and chains of thought.

Each of the three makes examples for `evaluation.scoring.run`, whose ids are those of the questions,
and whose groups are the documents:

  examples = qa.short_answer_examples(documents)
  measured = qa.short_answer_metrics(list(scoring.run(model, examples)))

With `passages`, which maps the id of each question to texts found for it, the questions are
open-book. The best passage is the last one, and so the nearest to the question; arXiv 2409.07431
(appendix F) found passages before the question to work much better than after it.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from selfimprove_jax.data.sources import SourceDocument, SourceQuestion
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.evaluation.tasks import metrics
from selfimprove_jax.evaluation.tasks.builtin import lettered
from selfimprove_jax.evaluation.tasks.items import Choices, Example, Generation, Record

Passages = Mapping[str, Sequence[str]]
ChoiceFormat = Literal["texts", "named_texts", "letters"]

CHOICE_METRICS = ("acc", "acc_norm", "margin", "gold_nats")
SHORT_ANSWER_METRICS = ("contains", "f1", "exact_match")
COT_METRICS = ("attempt_rate", "acc_asked")

_ASKED_LETTER = "Exactly one of the choices is right."


def self_contained(document: SourceDocument, question: str) -> str:
  """Returns a question that says which document it is about: 'In "Emma" by ..., who ...?'."""
  by = f" by {document.author}" if document.author else ""
  year = f" ({document.year})" if document.year else ""
  return f'In "{document.name}"{by}{year}, {question[:1].lower()}{question[1:]}'


def retrieval_query(document: SourceDocument, question: SourceQuestion) -> str:
  """Returns the text to find passages for a question with: it and its choices, self-contained."""
  asked = self_contained(document, question.question)
  if not question.choices:
    return asked
  return lettered(asked, question.choices)[0].removesuffix("\nAnswer:")


def choice_examples(
  documents: Sequence[SourceDocument],
  format: ChoiceFormat = "texts",
  *,
  passages: Passages | None = None,
) -> list[Example]:
  """Makes an example, scored by log-likelihood, of each question with choices.

  Args:
    format: "texts" scores the choices' texts after "Question: ...\\nAnswer:", the form for small
      models; "named_texts" lets the question say which document it is about; "letters" also lists
      the choices before "Answer:", and scores their letters.

  Raises:
    ValueError: no question has choices, or one has no entry in `passages`.
  """
  examples = []
  for document, question in _asked(documents, lambda one: one.choices, "choices"):
    asked, texts = question.question, question.choices
    if format != "texts":
      asked = self_contained(document, asked)
    context = f"Question: {asked}\nAnswer:"
    if format == "letters":
      context, texts = lettered(f"Question: {asked}", texts)
    item = Choices(
      contexts=(_passages_text(question.id, passages) + context,),
      continuations=tuple(f" {text}" for text in texts),
      texts=tuple(texts),
      gold=(question.gold,),
    )
    examples.append(Example(id=question.id, group=document.id, item=item))
  return examples


def short_answer_examples(
  documents: Sequence[SourceDocument],
  num_shots: int = 2,
  *,
  named: bool = False,
  max_tokens: int = 16,
  seed: int = 0,
  passages: Passages | None = None,
) -> list[Example]:
  """Makes an example of each question with short answers; the answer is generated greedily.

  Shots are questions of other documents with their answers, the same ones for as many questions as
  possible, so that a model computes them once. Where other documents have too few questions, other
  questions of the document itself are shots.

  Args:
    named: lets each question say which document it is about.
    max_tokens: of an answer, which ends with its line.
    seed: chooses the shots, whatever the order of the documents.
    passages: shots have theirs, too.

  Raises:
    ValueError: no question has short answers, there are too few for the shots, or one has no entry
      in `passages`.
  """
  pairs = list(_asked(documents, lambda one: one.short_answers, "short answers"))
  prompts = {}
  for document, question in pairs:
    asked = self_contained(document, question.question) if named else question.question
    prompts[question.id] = f"{_passages_text(question.id, passages)}Question: {asked}\nAnswer:"
  candidates = _shots(pairs, seed)
  examples = []
  for document, question in pairs:
    others = (shot for owner, shot in candidates if owner != document.id)
    own = (s for owner, s in candidates if owner == document.id and s.id != question.id)
    shots = list(itertools.islice(itertools.chain(others, own), num_shots))
    if len(shots) < num_shots:
      raise ValueError(
        f"num_shots={num_shots}, but there are only {len(shots)} other questions with short answers"
      )
    preamble = "".join(f"{prompts[shot.id]} {shot.short_answers[0]}\n\n" for shot in shots)
    item = Generation(
      prompt=preamble + prompts[question.id],
      stop=("\n",),
      max_tokens=max_tokens,
      answers=question.short_answers,
      shown=question.short_answers[0],
      grader="squad",
      preamble=len(preamble),
    )
    examples.append(Example(id=question.id, group=document.id, item=item))
  return examples


def cot_examples(
  documents: Sequence[SourceDocument],
  *,
  num_samples: int = 8,
  temperature: float = 0.1,
  max_tokens: int = 300,
  passages: Passages | None = None,
) -> list[Example]:
  """Makes an example, answered with a chain of thought, of each question with choices.

  The prompt shows five solved examples about well-known books, and makes the question
  self-contained (arXiv 2409.07431, section 4.1 and its code; the paper takes 64 samples, the code
  8). The code stops at each text that states an answer. Here a sample stops where the next example
  would begin, since endpoints take few stop strings and do not say which one they found, and
  `metrics.stated_letter` looks for the first such text.

  Raises:
    ValueError: no question has choices, or one has no entry in `passages`.
  """
  is_open_book = passages is not None
  shown = [_solved(number, shot, is_open_book) for number, shot in enumerate(_SHOTS, 1)]
  preamble = "".join(shown) + _header(len(_SHOTS) + 1)
  examples = []
  for document, question in _asked(documents, lambda one: one.choices, "choices"):
    asked = f"{self_contained(document, question.question)} {_ASKED_LETTER}"
    prompt, letters = _with_choices(asked, question.choices)
    right = letters[question.gold]
    item = Generation(
      prompt=f"{preamble}{_passages_text(question.id, passages)}{prompt}",
      stop=(_HEADER,),
      max_tokens=max_tokens,
      answers=(right,),
      shown=right,
      grader="letter",
      preamble=len(preamble),
      num_samples=num_samples,
      temperature=temperature,
      letters=letters,
    )
    examples.append(Example(id=question.id, group=document.id, item=item))
  return examples


@dataclasses.dataclass(frozen=True)
class Measured:
  """A metric, its error clustered by document, and what guessing gives; None if no accuracy."""

  estimate: Estimate
  chance: float | None


def choice_metrics(*trainings: Sequence[Record]) -> dict[str, Measured]:
  """Measures `choice_examples`.

  Args:
    trainings: the records of each training of a model, as in `metrics.estimate`.

  Returns:
    acc: share of questions whose right choice has the largest log-likelihood.
    acc_norm: the same, with log-likelihoods divided by characters.
    margin: log-likelihood of the right choice minus that of the likeliest wrong one, in nats.
    gold_nats: negative log-likelihood of the right choices, in nats per token.
  """
  return _measured(CHOICE_METRICS, trainings)


def short_answer_metrics(*trainings: Sequence[Record]) -> dict[str, Measured]:
  """Measures `short_answer_examples`.

  Args:
    trainings: as in `choice_metrics`.

  Returns:
    contains: share of answers in which an accepted one occurs as whole words.
    f1: F1 of an answer's words, with the accepted answer that fits best.
    exact_match: share of answers that equal an accepted one, both as SQuAD compares them.
  """
  return _measured(SHORT_ANSWER_METRICS, trainings)


def cot_metrics(*trainings: Sequence[Record]) -> dict[str, Measured]:
  """Measures `cot_examples` by the first sample of each question that states an answer.

  Args:
    trainings: as in `choice_metrics`.

  Returns:
    attempt_rate: share of questions with such a sample.
    acc_attempted: accuracy over these questions, the paper's number; missing if there are none.
    acc_asked: accuracy over all questions, those without such a sample being wrong.
  """
  names = list(COT_METRICS)
  if any(metrics.stated_letter(record) is not None for records in trainings for record in records):
    names.insert(1, "acc_attempted")
  return _measured(names, trainings)


def subsets(documents: Sequence[SourceDocument]) -> dict[str, frozenset[str]]:
  """Returns the ids of the questions of each subset: all, hard and not hard ones, each kind.

  The names are "all", "hard", "not_hard" and "kind/KIND"; subsets without questions are missing.
  """
  found: dict[str, set[str]] = {}
  for document in documents:
    for question in document.questions:
      names = ["all"]
      if question.is_hard is not None:
        names.append("hard" if question.is_hard else "not_hard")
      if question.kind:
        names.append(f"kind/{question.kind}")
      for name in names:
        found.setdefault(name, set()).add(question.id)
  return {name: frozenset(ids) for name, ids in found.items()}


def by_subset(
  measure: Callable[..., dict[str, Measured]],
  documents: Sequence[SourceDocument],
  *trainings: Sequence[Record],
) -> dict[str, dict[str, Measured]]:
  """Measures the records of each subset (see `subsets`) that has some.

  Args:
    measure: `choice_metrics`, `short_answer_metrics` or `cot_metrics`.
    trainings: as in `choice_metrics`.
  """
  made = {}
  for name, ids in subsets(documents).items():
    parts = [[record for record in records if record["id"] in ids] for records in trainings]
    if all(parts):
      made[name] = measure(*parts)
  return made


def _measured(names: Collection[str], trainings: Sequence[Sequence[Record]]) -> dict[str, Measured]:
  return {
    name: Measured(metrics.estimate(name, *trainings), metrics.chance(name, trainings[0]))
    for name in names
  }


def _asked(
  documents: Sequence[SourceDocument], has: Callable[[SourceQuestion], Any], what: str
) -> Iterator[tuple[SourceDocument, SourceQuestion]]:
  """Yields the questions that have what an example needs, each with its document."""
  pairs = [(one, question) for one in documents for question in one.questions if has(question)]
  if not pairs:
    raise ValueError(f"no question of {len(documents)} documents has {what}")
  yield from pairs


def _passages_text(id_: str, passages: Passages | None) -> str:
  """Returns the numbered passages of a question, each followed by a blank line."""
  if passages is None:
    return ""
  if id_ not in passages:
    raise ValueError(
      f"passages: there are none for question {id_!r}; each question needs an entry, which may be "
      f"empty"
    )
  return _numbered(passages[id_])


def _numbered(texts: Sequence[str]) -> str:
  return "".join(f"Passage {n}: {text.strip()}\n\n" for n, text in enumerate(texts, 1))


def _shots(
  pairs: Sequence[tuple[SourceDocument, SourceQuestion]], seed: int
) -> list[tuple[str, SourceQuestion]]:
  """Returns all questions with their documents' ids, shuffled; one of each document comes first."""
  by_document: dict[str, list[SourceQuestion]] = {}
  for document, question in sorted(pairs, key=lambda pair: (pair[0].id, pair[1].id)):
    by_document.setdefault(document.id, []).append(question)
  rng = random.Random(seed)
  owners = list(by_document)
  rng.shuffle(owners)
  rounds = []
  for owner in owners:
    rng.shuffle(by_document[owner])
    rounds += [(n, owner, question) for n, question in enumerate(by_document[owner])]
  rounds.sort(key=lambda one: one[0])
  return [(owner, question) for _, owner, question in rounds]


@dataclasses.dataclass(frozen=True)
class _Shot:
  """A solved example; its passages are for open-book questions."""

  document: SourceDocument
  question: str
  choices: tuple[str, ...]
  thought: str
  answer: str
  passages: tuple[str, ...]


_HEADER = "## Example"


def _header(number: int) -> str:
  return f"{_HEADER} {number}\n\n"


def _with_choices(asked: str, choices: Sequence[str]) -> tuple[str, str]:
  """Returns a prompt that ends where a thought begins, and the letters of the choices."""
  text, letters = lettered(f"Question: {asked}\nChoices:", choices)
  return f"{text.removesuffix('Answer:')}Thought process:", letters


def _solved(number: int, shot: _Shot, is_open_book: bool) -> str:
  asked = f"{self_contained(shot.document, shot.question)} {_ASKED_LETTER}"
  passages = _numbered(shot.passages) if is_open_book else ""
  prompt, _ = _with_choices(asked, shot.choices)
  return f"{_header(number)}{passages}{prompt} {shot.thought}\nAnswer: {shot.answer}.\n\n"


def _book(title: str, author: str, year: str) -> SourceDocument:
  return SourceDocument(title, title, author, year, "", ())


# The right letters are those of the paper's examples, in its order.
_SHOTS = (
  _Shot(
    _book("Pride and Prejudice", "Jane Austen", "1813"),
    "What does Elizabeth Bennet hold against Mr. Darcy when she refuses his first proposal?",
    (
      "He has gambled away the money that his father left him.",
      "He is already engaged to Miss de Bourgh.",
      "He parted her sister Jane from Mr. Bingley and, as she believes, ruined Mr. Wickham.",
      "He wants to marry her for her inheritance.",
    ),
    "Darcy is rich, so A does not fit him. Lady Catherine wishes him to marry her daughter, but "
    "there is no engagement, which excludes B. Elizabeth has almost no inheritance, so D is wrong. "
    "She has just learned that Darcy kept Bingley away from Jane, and she still believes what "
    "Wickham told her about him. That is C.",
    "C",
    (
      "Mr. Collins proposes to Elizabeth and will not believe that she means to refuse him.",
      "Elizabeth answers Darcy that he has destroyed the happiness of a beloved sister, and that "
      "Wickham's account of him had decided her opinion long before.",
    ),
  ),
  _Shot(
    _book("Frankenstein", "Mary Shelley", "1818"),
    "Who writes the letters with which the novel opens, and to whom?",
    (
      "Victor Frankenstein to his fiancee Elizabeth",
      "Robert Walton, an explorer, to his sister in England",
      "Henry Clerval to his father in Geneva",
      "the creature to the family in the cottage",
    ),
    "The novel begins before Victor appears: an explorer on the way to the North Pole tells his "
    "sister, Mrs. Saville, about his voyage and about the stranger whom he takes aboard. The "
    "explorer is Robert Walton. Neither Clerval nor the creature writes these letters. So it is B.",
    "B",
    (
      "The creature learns to speak by listening to a family through the wall of a cottage.",
      "From St. Petersburg and Archangel, Walton writes to Mrs. Saville, his sister in England, "
      "that he will sail for the pole.",
    ),
  ),
  _Shot(
    _book("The Time Machine", "H. G. Wells", "1895"),
    "What does the Time Traveller show his guests that speaks for his story?",
    (
      "two white flowers of an unknown kind that Weena put into his pocket",
      "a photograph of the Morlocks in their tunnels",
      "a book from the library of the green palace",
      "a metal tool that the Eloi had made",
    ),
    "He had no camera with him in the future, and the books that he found there had decayed, so B "
    "and C are out. The Eloi make no tools, which excludes D. Weena filled his pockets with "
    "flowers, and he lays two withered white ones on the table. That is A.",
    "A",
    (
      "In the green palace the traveler finds the remains of books, fallen to rags.",
      "The Time Traveller puts his hand into his pocket and lays two withered white flowers on the "
      "table; the Medical Man cannot name their order.",
    ),
  ),
  _Shot(
    _book("A Christmas Carol", "Charles Dickens", "1843"),
    "What was Jacob Marley to Ebenezer Scrooge?",
    (
      "his business partner, who has been dead for seven years",
      "his elder brother, who went to sea",
      "his clerk, who asks for a day off",
      "his nephew, who invites him to dinner",
    ),
    "The clerk is Bob Cratchit and the nephew is Fred, so C and D name other people. Scrooge has a "
    "sister, Fan, and no brother at sea. The firm is still called Scrooge and Marley, and Marley "
    "died on Christmas Eve seven years before the story. So it is A.",
    "A",
    (
      "Bob Cratchit, the clerk, tries to warm himself at a candle.",
      "Scrooge never painted out the name of his dead partner; seven years later Scrooge and "
      "Marley still stood above the door.",
    ),
  ),
  _Shot(
    _book("Moby-Dick", "Herman Melville", "1851"),
    "What keeps Ishmael afloat after the Pequod has sunk?",
    (
      "a whaleboat that Starbuck had lowered in time",
      "the carcass of the white whale",
      "a cask of oil from the hold",
      "a coffin that had been made for Queequeg",
    ),
    "All boats are lost in the chase, and the whale swims away, which excludes A and B. No cask "
    "saves him in the story. Queequeg fell ill and had a coffin made, which later became a life "
    "buoy. It shoots up from the whirlpool, and Ishmael drifts on it until the Rachel finds him. "
    "That is D.",
    "D",
    (
      "Captain Ahab nails a gold coin to the mast for the first man who sights the white whale.",
      "The coffin that the carpenter had built for Queequeg, sealed as a life buoy, bursts up from "
      "the vortex and carries Ishmael for a day and a night.",
    ),
  ),
)
