"""Questions about documents become prompts without leaks, and answers are scored as by hand."""

import dataclasses
import itertools
import json
import math
import re

import pytest

from selfimprove_jax.data import sources
from selfimprove_jax.data.sources import SourceDocument, SourceQuestion
from selfimprove_jax.evaluation import qa, scoring
from selfimprove_jax.evaluation.tasks import metrics
from selfimprove_jax.evaluation.tasks.items import Example, Generation
from selfimprove_jax.language_models.protocol import Reply, Score, Usage
from selfimprove_jax.pipelines.common import grading


class _Model:
  """A model elsewhere: scores a continuation by minus its length, and says what it is told to."""

  name = "fake"

  def __init__(self, *replies):
    self._replies = itertools.cycle(replies or ("",))
    self.asked = []

  def generate(self, requests):
    for request in requests:
      self.asked.append(request)
      text, reason = next(self._replies), "stop"
      if isinstance(text, tuple):
        text, reason = text
      yield Reply(id=request.id, text=text, finish_reason=reason, usage=Usage(1, 1))

  def score(self, requests):
    for request in requests:
      self.asked.append(request)
      words = len(request.continuation.split())
      yield Score(
        id=request.id,
        logprob=-float(len(request.continuation)),
        num_tokens=words,
        is_greedy=False,
      )

  def close(self):
    pass


def _question(id_, question="Who came?", **fields):
  given = {
    "choices": ("Ada", "Grace Hopper", "no one", "all"),
    "gold": 1,
    "short_answers": ("Grace Hopper", "Hopper"),
  }
  return SourceQuestion(id=id_, question=question, **{**given, **fields})


def _document(id_, *questions, title="", author="", year=""):
  return SourceDocument(id_, title, author, year, f"Text of {id_}.", questions)


def _numbered(id_, number):
  questions = (
    _question(f"{id_}{n}", f"Question {n} of {id_}?", short_answers=(f"answer {n} of {id_}",))
    for n in range(number)
  )
  return _document(id_, *questions)


def test_choices_are_scored_after_the_question_and_measured_by_document():
  documents = [
    _document("a", _question("a1"), _question("a2", gold=0)),
    _document("b", _question("b1", choices=("seven", "two"), gold=0)),
  ]
  model = _Model()
  records = list(scoring.run(model, qa.choice_examples(documents)))
  assert model.asked[0].context == "Question: Who came?\nAnswer:"
  assert model.asked[1].continuation == " Grace Hopper"
  assert [record["group"] for record in records] == ["a", "a", "b"]
  measured = qa.choice_metrics(records)
  # Log-likelihoods: -4, -13, -7, -4 (twice) and -6, -4. By character: -4/3, -13/12, -7/6, -4/3;
  # and -6/5, -4/3.
  margins = [-13.0 + 4.0, 0.0, -6.0 + 4.0]
  assert measured["acc"].estimate.value == pytest.approx(1 / 3)
  assert measured["acc"].chance == pytest.approx((0.25 + 0.25 + 0.5) / 3)
  assert measured["acc_norm"].estimate.value == pytest.approx(2 / 3)
  assert measured["margin"].estimate.value == pytest.approx(sum(margins) / 3)
  assert measured["margin"].chance is None
  assert measured["gold_nats"].estimate.value == pytest.approx((13 + 4 + 6) / (2 + 1 + 1))
  assert {one.estimate.num_groups for one in measured.values()} == {2}


def test_formats_name_the_document_and_list_the_letters():
  document = _document("a", _question("q", "Why go?"), title="Emma", author="Jane A.", year="1815")
  [named] = qa.choice_examples([document], "named_texts")
  assert named.item.contexts == ('Question: In "Emma" by Jane A. (1815), why go?\nAnswer:',)
  [lettered] = qa.choice_examples([document], "letters")
  assert lettered.item.contexts[0].endswith("\nD. all\nAnswer:")
  assert (lettered.item.texts, lettered.item.gold) == (("A", "B", "C", "D"), (1,))
  [untitled] = qa.choice_examples([_document("leval_00", _question("q"))], "named_texts")
  assert untitled.item.contexts == ('Question: In "leval_00", who came?\nAnswer:',)
  assert qa.retrieval_query(document, document.questions[0]).splitlines() == [
    'In "Emma" by Jane A. (1815), why go?',
    *("A. Ada", "B. Grace Hopper", "C. no one", "D. all"),
  ]


def test_passages_stand_before_the_question_numbered_and_in_their_order():
  document = _document("a", _question("q"))
  passages = {"q": ["Worse.", " Best.\n"]}
  before = "Passage 1: Worse.\n\nPassage 2: Best.\n\nQuestion: "
  [choice] = qa.choice_examples([document], passages=passages)
  assert choice.item.contexts == (f"{before}Who came?\nAnswer:",)
  [short] = qa.short_answer_examples([document], 0, passages=passages)
  assert short.item.prompt == f"{before}Who came?\nAnswer:"
  [cot] = qa.cot_examples([document], passages=passages)
  assert f"## Example 6\n\n{before}In " in cot.item.prompt
  assert cot.item.prompt.count("Passage 2: ") == 6  # the solved examples have theirs
  [closed] = qa.cot_examples([document])
  assert "Passage" not in closed.item.prompt
  with pytest.raises(ValueError, match="passages: there are none for question 'q'"):
    qa.choice_examples([document], passages={"other": ["x"]})


def _shown(example):
  return re.findall(r"of (\w)\?", example.item.prompt[: example.item.preamble])


def test_shots_are_of_other_documents_and_shared():
  documents = [_numbered(id_, 3) for id_ in "abcd"]
  examples = qa.short_answer_examples(documents, 2)
  assert examples == qa.short_answer_examples(documents, 2)
  assert sorted(qa.short_answer_examples(documents[::-1], 2), key=lambda e: e.id) == examples
  assert examples != qa.short_answer_examples(documents, 2, seed=1)
  preambles = {}
  for example in examples:
    shown = _shown(example)
    assert len(set(shown)) == 2 and example.group not in shown
    preambles.setdefault(example.item.prompt[: example.item.preamble], set()).add(example.group)
    assert example.item.prompt.endswith(
      f"Question: Question {example.id[1]} of {example.group}?\nAnswer:"
    )
  # Documents that own none of the two shots share them.
  assert sorted(map(len, preambles.values())) == [1, 1, 2]
  [preamble, *_] = preambles
  assert re.fullmatch(
    r"(Question: Question (\d) of (\w)\?\nAnswer: answer \2 of \3\n\n){2}", preamble
  )


def test_shots_of_one_document_never_show_the_example_itself():
  examples = qa.short_answer_examples([_numbered("a", 5)], 2)
  prompts = {example.item.prompt[: example.item.preamble] for example in examples}
  assert len(prompts) == 3  # one for the questions that are no shots, and one for each that is
  for example in examples:
    assert f"Question {example.id[1]} of" not in example.item.prompt[: example.item.preamble]
    assert example.item.prompt.count("Question: ") == 3
  with pytest.raises(ValueError, match="num_shots=2, but there are only 1 other questions"):
    qa.short_answer_examples([_numbered("a", 2)], 2)
  mixed = qa.short_answer_examples([_numbered("a", 2), _numbered("b", 1)], 2)
  assert [_shown(example) for example in mixed] == [["b", "a"], ["b", "a"], ["a", "a"]]


def test_short_answers_are_measured_as_by_hand():
  asked = _question("a1", short_answers=("the grade 30", "30"))
  documents = [
    _document("a", asked, dataclasses.replace(asked, id="a2"), dataclasses.replace(asked, id="a3")),
    _document("b", dataclasses.replace(asked, id="b1")),
  ]
  model = _Model(" Grade-30.", " a grade of 30, in steel", " 5.30", " Grade 30!")
  records = list(scoring.run(model, qa.short_answer_examples(documents, 1)))
  assert [(request.temperature, request.stop, request.max_tokens) for request in model.asked] == [
    (0.0, ("\n",), 16)
  ] * 4
  measured = qa.short_answer_metrics(records)
  # "grade30" is one word to SQuAD; "grade of 30 in steel" has 2 of its 5 words in the 2 of "grade
  # 30"; "530" is not "30".
  assert measured["f1"].estimate.value == pytest.approx((0 + 4 / 7 + 0 + 1) / 4)
  assert measured["exact_match"].estimate.value == pytest.approx(1 / 4)
  assert measured["contains"].estimate.value == pytest.approx(3 / 4)
  assert measured["contains"].chance == 0.0 and measured["f1"].chance is None
  # By document 2/3 and 1; residuals 2 - 3 * 3/4 and 1 - 3/4; 2 / 1 * (1/16 + 1/16) / 4**2.
  assert measured["contains"].estimate.stderr == pytest.approx(math.sqrt(2 * 2 / 16 / 16))
  graded = grading.graded(records)
  assert [record["correct"] for record in graded] == [False, False, False, True]


@pytest.mark.parametrize(
  ("text", "answer", "is_contained"),
  [
    ("It was Thale.", "thale", True),
    ("It was Thales.", "Thale", False),
    ("the   Tr\u2019en, again", "Tren", True),
    ("at 5.6 metres", "6", False),
    ("at 5.6metres", "5.6 metres", True),
    ("18,600 people", "18600", True),
    ("grade-30 steel", "Grade 30", True),
    ("anything", "?", False),
    ("", "x", False),
    ("Cafe\u0301", "caf\u00e9", True),
  ],
)
def test_an_answer_is_contained_as_whole_words(text, answer, is_contained):
  assert metrics.contains(text, answer) == is_contained


def test_the_prompt_of_a_thought_shows_five_solved_examples():
  document = _document("a", _question("q"), title="Emma", author="Jane Austen", year="1815")
  [example] = qa.cot_examples([document])
  item = example.item
  assert re.findall(r"Answer: (\w)\.\n", item.prompt) == ["C", "B", "A", "A", "D"]
  assert item.prompt[item.preamble :] == (
    'Question: In "Emma" by Jane Austen (1815), who came? Exactly one of the choices is right.\n'
    "Choices:\nA. Ada\nB. Grace Hopper\nC. no one\nD. all\nThought process:"
  )
  assert item.prompt[: item.preamble].endswith("## Example 6\n\n")
  assert (item.answers, item.letters, item.num_samples, item.temperature, item.max_tokens) == (
    ("B",),
    "ABCD",
    8,
    0.1,
    300,
  )
  assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example


def _stated(*texts, letters="ABCD", reason="length"):
  return metrics.stated_letter(
    {"generations": list(texts), "finish_reasons": [reason] * len(texts), "letters": letters}
  )


def test_an_answer_is_stated_by_any_permutation_of_some_letters():
  """The paper's code stops at 64 strings, and takes the letter before the period."""
  strings = [
    f"Answer: {''.join(letters)}.\n"
    for size in range(1, 5)
    for letters in itertools.permutations("ABCD", size)
  ]
  assert len(strings) == 64
  assert [_stated(f"So. {string}Answer: A.\n") for string in strings] == [s[-3] for s in strings]


def test_samples_without_an_answer_are_passed_over():
  assert _stated("It is B.\n", "Answer: E.\n", "Answer: AA.\n", "Answer: C.\nAnswer: D.\n") == "C"
  assert _stated("Answer: B") is None
  assert _stated("Answer: B.") is None  # cut before the line ended
  assert _stated("Answer: B.", reason="stop") == "B"
  assert _stated("Answer: C.\n", letters="AB") is None


def test_thoughts_are_measured_over_attempted_and_all_questions():
  documents = [
    _document("a", _question("a1", is_hard=True), _question("a2", is_hard=False, kind="fact")),
    _document("b", _question("b1", is_hard=True, choices=("x", "y"), gold=0)),
  ]
  right, wrong, none = " So it is.\nAnswer: B.\n\n", " No.\nAnswer: A.\n", (" I go on", "length")
  model = _Model(none, right, none, none, wrong, right)
  records = list(scoring.run(model, qa.cot_examples(documents, num_samples=2)))
  assert [(r.id, r.sample, r.temperature) for r in model.asked] == [
    (id_, sample, 0.1) for id_ in ("a1", "a2", "b1") for sample in (0, 1)
  ]
  assert model.asked[0].stop == ("## Example",)
  assert records[0]["generations"] == [none[0], right]
  assert records[0]["finish_reasons"] == ["length", "stop"]
  measured = qa.by_subset(qa.cot_metrics, documents, records)
  assert set(measured) == {"all", "hard", "not_hard", "kind/fact"}
  values = {k: {n: m.estimate.value for n, m in v.items()} for k, v in measured.items()}
  # a1 is right by its second sample, a2 is not attempted, b1 is right by its first: A.
  assert values["all"] == pytest.approx(
    {"attempt_rate": 2 / 3, "acc_attempted": 1.0, "acc_asked": 2 / 3}
  )
  assert values["hard"] == {"attempt_rate": 1.0, "acc_attempted": 1.0, "acc_asked": 1.0}
  assert values["not_hard"] == {"attempt_rate": 0.0, "acc_asked": 0.0}
  assert measured["all"]["acc_attempted"].chance == pytest.approx((0.25 + 0.25 + 0.5) / 3)
  assert measured["all"]["attempt_rate"].chance is None
  assert measured["all"]["acc_asked"].estimate.num_groups == 2
  assert set(qa.by_subset(qa.cot_metrics, documents, records[:1])) == {"all", "hard"}
  graded = grading.graded(records)
  assert [record["prediction"] for record in graded] == ["B", None, "A"]
  assert [record["correct"] for record in graded] == [True, False, True]


def test_trainings_may_attempt_other_questions():
  documents = [_document("a", _question("q1")), _document("b", _question("q2"))]
  examples = qa.cot_examples(documents, num_samples=1)
  right, none = "Answer: B.\n", ("no", "length")
  first = list(scoring.run(_Model(right, none), examples))
  second = list(scoring.run(_Model("Answer: A.\n", right), examples))
  assert "generations" not in first[0]
  # Right 1 of 1 and 1 of 2: together 2 of 3.
  assert qa.cot_metrics(first, second)["acc_attempted"].estimate.value == pytest.approx(2 / 3)
  with pytest.raises(ValueError, match="compare acc_asked"):
    metrics.compare("acc_attempted", [first], [second])
  compared = metrics.compare("acc_asked", [first], [second])
  assert (compared.won, compared.lost) == (1, 1)


def test_a_larger_margin_and_f1_are_better():
  record = {"id": "q", "group": "g", "gold": [0], "choices": ["x", "y"], "num_tokens": [1, 1]}
  first = [{**record, "logprobs": [-3.0, -2.0]}]
  second = [{**record, "logprobs": [-1.0, -2.0]}]
  assert metrics.compare("margin", [first], [second]).won == 1
  assert metrics.compare("gold_nats", [first], [second]).won == 1
  answered = {"id": "q", "group": "g", "answers": ["x y"]}
  texts = [{**answered, "generation": "x"}], [{**answered, "generation": "x y"}]
  assert metrics.compare("f1", [texts[0]], [texts[1]]).won == 1


def test_wrong_sampling_and_missing_questions_are_refused():
  with pytest.raises(ValueError, match="num_samples=2 with temperature=0"):
    qa.cot_examples([_document("a", _question("q"))], num_samples=2, temperature=0.0)
  with pytest.raises(ValueError, match="grader='letter' with letters=''"):
    Generation(prompt="x", stop=(), max_tokens=1, answers=("A",), shown="A", grader="letter")
  open_question = _question("q", choices=(), gold=None, short_answers=())
  for make, what in ((qa.choice_examples, "choices"), (qa.short_answer_examples, "short answers")):
    with pytest.raises(ValueError, match=f"no question of 1 documents has {what}"):
      make([_document("a", open_question)])


def test_real_documents_give_examples_of_all_three_forms(real_data):
  niche = sources.read_sources(sources.NicheConfig(folder=str(real_data / "niche")))
  choices, short = qa.choice_examples(niche), qa.short_answer_examples(niche)
  assert len(choices) == len(short) == 144
  # An oracle that repeats the accepted answer is right in every way.
  oracle = _Model(*(f" {example.item.answers[0]}" for example in short))
  measured = qa.short_answer_metrics(list(scoring.run(oracle, short)))
  assert [one.estimate.value for one in measured.values()] == [1.0, 1.0, 1.0]
  assert measured["f1"].estimate.num_groups == 6
  for example in short:
    assert not any(
      f"Question: {question.question}\n" in example.item.prompt[: example.item.preamble]
      for document in niche
      if document.id == example.group
      for question in document.questions
    )
  by_kind = qa.by_subset(qa.choice_metrics, niche, list(scoring.run(_Model(), choices)))
  assert set(by_kind) == {"all", "kind/fact", "kind/relation"}
  assert by_kind["all"]["acc"].chance == 0.25
  path = str(real_data / "quality/quality.jsonl.gz")
  quality = sources.read_sources(sources.QualityConfig(paths=(path,)))
  thoughts = qa.cot_examples(quality, num_samples=1)
  assert len(thoughts) == 251
  assert (
    'In "LOST IN TRANSLATION" by LARRY M. HARRIS, why did the Tr\'en' in thoughts[0].item.prompt
  )
