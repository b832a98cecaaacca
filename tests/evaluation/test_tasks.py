"""Tasks: prompts, shots, bad records, and a user's own."""

import json

import pytest

from selfimprove_jax.evaluation.tasks import builtin, hub, user
from selfimprove_jax.evaluation.tasks.items import Choices, Example


def _examples(name, *records, shots=()):
  return list(builtin.get(name).examples(records, shots))


def _arc(**changes):
  return {"query": "Question: why?", "choices": ["a", "b"], "gold": 1} | changes


def _mmlu(question="Why?", **changes):
  record = {"subject": "high_school_art", "question": question, "choices": list("wxyz")}
  return record | {"answer": "C"} | changes


def test_an_unknown_task_is_told_the_three_nearest_names():
  with pytest.raises(ValueError, match="'arc_eazy'; the nearest names are arc_easy, ") as caught:
    builtin.get("arc_eazy")
  assert str(caught.value).split("names are ")[1].split(". A task")[0].count(",") == 2


def test_arc_scores_the_choices_texts():
  [example] = _examples("arc_easy", _arc())
  assert example.item.pairs() == [
    ("Question: why?\nAnswer:", " a"),
    ("Question: why?\nAnswer:", " b"),
  ]
  assert example.item.gold == (1,)
  assert (example.id, example.group) == ("arc_easy:1", "arc_easy:1")


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"gold": 2}, "line 1: gold is 2; it must be the number of a choice, from 0 to 1"),
    ({"gold": -1}, "gold is -1"),
    ({"gold": None}, "gold is None"),
    ({"gold": True}, "gold is True"),
    ({"choices": ["a", ""]}, "none empty"),
    ({"choices": []}, "line 1: "),
  ],
)
def test_a_bad_record_is_named_by_its_line(changes, told):
  with pytest.raises(ValueError, match=told):
    _examples("arc_easy", _arc(**changes))


def test_a_record_that_lacks_a_field_is_named_by_its_line():
  with pytest.raises(ValueError, match="line 2: there is no gold; a record has query, choices"):
    _examples("arc_easy", _arc(), {"query": "", "choices": []})


def test_mmlu_has_the_shots_of_its_subject_and_names_as_many_letters_as_choices():
  """lighteval #1265: a prompt that names fewer letters than there are options."""
  shots = [_mmlu(f"Shot {number}?") for number in range(6)]
  shots += [_mmlu(subject="other")] * 5
  [example] = _examples("mmlu", _mmlu(choices=list("uvwxyz"), answer="F"), shots=shots)
  [context] = example.item.contexts
  assert context.startswith(
    "The following are multiple choice questions (with answers) about high school art.\n\n"
    "Shot 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\nShot 1?"
  )
  assert context.endswith("\n\nWhy?\nA. u\nB. v\nC. w\nD. x\nE. y\nF. z\nAnswer:")
  assert "Shot 4?" in context and "Shot 5?" not in context
  assert example.item.continuations == (" A", " B", " C", " D", " E", " F")
  assert example.item.gold == (5,)
  with pytest.raises(ValueError, match="answer is 'G'; it must be one of A, B, C, D"):
    _examples("mmlu", _mmlu(answer="G"), shots=shots)
  with pytest.raises(ValueError, match="2 shots for 'high_school_art', and num_shots=5"):
    _examples("mmlu", _mmlu(), shots=shots[:2])
  with pytest.raises(ValueError, match="27 choices; there are letters for 26"):
    _examples("mmlu", _mmlu(choices=["x"] * 27), shots=shots)


def test_a_shot_that_is_the_example_is_left_out():
  shots = [_mmlu(f"Shot {number}?") for number in range(6)]
  [example] = _examples("mmlu", shots[2], shots=shots)
  [context] = example.item.contexts
  assert context.count("Shot 2?") == 1 and "Shot 5?" in context
  [example] = _examples("mmlu", shots[2], shots=shots[:5])
  assert example.item.contexts[0].count("Shot") == 5  # four shots and the question


def test_webqs_drops_answers_that_continue_another():
  record = {"qText": "who?", "answers": ["Ann Lee", "Bob", "Ann"]}
  shot = {"qText": "what?", "answers": ["It", "An it"]}
  [example] = _examples("webqs", record, shots=[shot])
  assert example.item.texts == ("Ann", "Bob")
  assert example.item.gold == (0, 1)
  assert example.item.contexts == ("Question: what?\nAnswer: An it\n\nQuestion: who?\nAnswer:",)


def test_triviaqa_stops_at_the_end_of_an_answer():
  """lm-eval #1239: without a stop, the text after an answer makes it wrong."""
  records = [
    {"context": f"Question: {number}?\nAnswer:", "answer": "Hat", "aliases": ["Hats", "Hat"]}
    for number in range(2)
  ]
  first, second = _examples("triviaqa", *records, shots=records)
  assert first.item.stop == ("\n", ".", ",")
  assert first.item.answers == ("Hat", "Hats")
  assert second.item.prompt == "Question: 0??\nAnswer: Hat\n\nQuestion: 1??\nAnswer:"
  assert first.item.prompt == "Question: 1??\nAnswer: Hat\n\nQuestion: 0??\nAnswer:"


def _article(**changes):
  question = {"question": "Who is Ann?", "options": list("wxyz"), "gold_label": 4, "difficult": 1}
  questions = [question, question | {"gold_label": 1, "difficult": 0}]
  return {"article_id": "7", "article": "It was a dark night .", "questions": questions} | changes


def test_quality_counts_labels_from_one_and_groups_by_article():
  first, second = _examples("quality", _article(title="Night", author="A. Lee", year=1950))
  assert first.item.gold == (3,) and second.item.gold == (0,)
  assert (first.id, first.group, second.id) == ("quality:1.1", "7", "quality:1.2")
  assert first.item.contexts == (
    'A question about "Night" by A. Lee (1950): who is Ann?\nA. w\nB. x\nC. y\nD. z\nAnswer:',
  )
  assert first.item.contexts[0].count("dark") == 0  # closed-book
  [untitled, _] = _examples("quality", _article())
  assert 'the text that begins "It was a dark night . ...": who is' in untitled.item.contexts[0]
  bad = _article(questions=[{"question": "Why?", "options": list("wx"), "gold_label": 0}])
  with pytest.raises(ValueError, match=r"gold_label is 0; it must be .* from 1 to 2"):
    _examples("quality", bad)


def test_quality_hard_takes_the_hard_questions():
  [example] = _examples("quality_hard", _article())
  assert example.item.gold == (3,)
  easy = {"question": "Why?", "options": list("wx"), "gold_label": 1}
  with pytest.raises(ValueError, match=r"line 1: .*no field `difficult`"):
    _examples("quality_hard", _article(questions=[easy]))


def test_coursera_scores_every_set_of_letters():
  question = {"question": "Which?", "options": ["x", "y", "z"], "answer": "CA"}
  record = {"article_id": "3", "title": "Week 1", "questions": [question]}
  [example] = _examples("coursera", record)
  assert example.item.texts == ("A", "B", "C", "AB", "AC", "BC", "ABC")
  assert example.item.gold == (4,)
  # " A" would be the beginning of " AB", and so never less likely.
  assert all(text.endswith("\n") for text in example.item.continuations)
  for wrong in ("", "D", "A, B"):
    with pytest.raises(ValueError, match="one or more of the letters ABC"):
      _examples("coursera", record | {"questions": [question | {"answer": wrong}]})


def test_gsm8k_reads_the_number_behind_the_mark():
  records = [
    {"question": f"How many? {n}", "answer": f"<<1+1=2>>Two.\n#### 1,{n}00"} for n in range(6)
  ]
  example = _examples("gsm8k", *records, shots=records)[0]
  assert example.item.answers == ("1,000",)
  assert example.item.prompt.count("####") == 5
  with pytest.raises(ValueError, match="answer has no '####'"):
    _examples("gsm8k", {"question": "?", "answer": "2"}, shots=records)


def test_examples_are_equal_after_json():
  lines = (json.dumps(_arc()), json.dumps(_arc(gold=0)))
  made = _examples("arc_easy", *map(json.loads, lines))
  assert [Example.from_json(json.loads(json.dumps(e.to_json()))) for e in made] == made


@pytest.mark.parametrize(
  ("source", "record", "expected"),
  [
    (
      hub.ARC_EASY,
      {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
      {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1},
    ),
    (
      hub.WINOGRANDE,
      {"sentence": "Ann saw Eve so _ ran.", "option1": "Ann", "option2": "Eve", "answer": "2"},
      {
        "context_options": ["Ann saw Eve so Ann", "Ann saw Eve so Eve"],
        "continuation": "ran.",
        "gold": 1,
      },
    ),
    (
      hub.LAMBADA,
      {"text": "He said the word"},
      {"context": "He said the", "continuation": "word"},
    ),
  ],
  ids=["arc", "winogrande", "lambada"],
)
def test_records_of_the_hub_get_the_shape_of_files(source, record, expected):
  assert source.convert(record) == expected


def test_data_sets_on_disk_are_read_under_the_hubs_names(tmp_path):
  datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")
  records = {
    "question": ["Why?", "How?"],
    "subject": ["art", "art"],
    "choices": [list("wxyz")] * 2,
    "answer": [2, 0],
  }
  splits = {name: datasets.Dataset.from_dict(records) for name in ("test", "dev")}
  datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "cais/mmlu/all"))
  found = list(hub.read(hub.MMLU, "test", folder=str(tmp_path)))
  assert [record["answer"] for record in found] == ["C", "A"]
  with pytest.raises(ValueError, match="cais/mmlu all, split train: "):
    list(hub.read(hub.MMLU, "train", folder=str(tmp_path)))


_YAML = """
task: capitals
file: capitals.jsonl
prompt: "Question: {{ question }}\\nAnswer:"
choices: options
gold: right
group_field: country
metrics: [acc, acc_norm]
"""


def _load(tmp_path, text):
  (tmp_path / "task.yaml").write_text(text)
  return builtin.get(str(tmp_path / "task.yaml"))


def test_a_users_task_is_ten_lines_of_yaml(tmp_path):
  task = _load(tmp_path, _YAML)
  record = {"question": "Where?", "options": ["Bonn", "Rome"], "right": "Rome", "country": "Italy"}
  [example] = task.examples([record], ())
  assert example.item == Choices(
    contexts=("Question: Where?\nAnswer:",),
    continuations=(" Bonn", " Rome"),
    texts=("Bonn", "Rome"),
    gold=(1,),
  )
  assert (example.id, example.group) == ("capitals:1", "Italy")
  with pytest.raises(ValueError, match="line 1: there is no question; a record has"):
    list(task.examples([{"options": ["a"], "right": 0, "country": ""}], ()))
  with pytest.raises(ValueError, match=r"right is 2; it must be the text of a choice,"):
    list(task.examples([record | {"right": 2}], ()))
  assert _load(tmp_path, _YAML + "version: 2\n").definition != task.definition


def test_a_users_task_generates_answers(tmp_path):
  text = "task: sums\nfile: f.jsonl\nprompt: '{{q}}='\nanswers: sum\ngrader: numbers\n"
  text += "metrics: [number_match]\nshots_file: f.jsonl\nnum_shots: 1\n"
  records = [{"q": "1+1", "sum": "2"}, {"q": "2+2", "sum": ["4", "four"]}]
  first, second = _load(tmp_path, text).examples(records, records)
  assert second.item.prompt == "1+1= 2\n\n2+2="
  assert second.item.answers == ("4", "four")
  assert first.item.prompt == "2+2= 4\n\n1+1="


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (("gold: right", ""), "choices are given without gold"),
    (("choices: options", ""), "none of choices, answers, text is given"),
    (("acc_norm", "acc_nrom"), "no metric 'acc_nrom'; did you mean 'acc_norm'"),
    (("gold:", "glod:"), "glod='right': there is no such knob"),
    (('Answer:"', 'Answer: "'), "ends with a space"),
    (("capitals\n", "arc_easy\n"), "is the name of a task of ours"),
    (("task: capitals", "- 1"), "task.yaml"),
    (("{{ question }}", "{{ question"), "task.yaml"),
  ],
)
def test_a_users_task_that_is_wrong_is_refused_by_its_field(tmp_path, change, told):
  with pytest.raises(ValueError, match=told):
    _load(tmp_path, _YAML.replace(*change))


def test_a_users_task_that_is_not_there_is_named():
  with pytest.raises(ValueError, match=r"the task nowhere.yaml: "):
    user.load("nowhere.yaml")
