"""The scheduler of processes: order, slots, failures, retries, signals, input and output."""

import os
import signal
import sys
import threading
import time

import pytest

from selfimprove_jax.runs import processes
from selfimprove_jax.runs.processes import Process, Task


def script(code: str, **options) -> Process:
  return Process(argv=[sys.executable, "-S", "-c", code], **options)


def task(name: str, code: str = "pass", after=(), **options) -> Task:
  return Task(name=name, make=lambda slot: [script(code)], after=frozenset(after), **options)


def events(tasks, **options) -> list[tuple[str, str]]:
  """Runs tasks and returns (start or end, task) in order."""
  seen: list[tuple[str, str]] = []
  processes.run(
    tasks,
    on_start=lambda task, attempt: seen.append(("start", task.name)),
    on_end=lambda end: seen.append(("end", end.task)),
    **options,
  )
  return seen


def is_running(pid: int) -> bool:
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def test_tasks_wait_for_those_they_run_after_and_run_next_to_others():
  tasks = [
    task("a"),
    task("b", "import time; time.sleep(0.3)", after=["a"]),
    task("c", "import time; time.sleep(0.3)", after=["a"]),
    task("d", after=["b", "c"]),
  ]
  seen = events(tasks, slots=range(2))
  assert seen[:4] == [("start", "a"), ("end", "a"), ("start", "b"), ("start", "c")]
  assert set(seen[4:6]) == {("end", "b"), ("end", "c")}
  assert seen[6:] == [("start", "d"), ("end", "d")]


def test_a_slot_belongs_to_one_task_at_a_time(tmp_path):
  """Each process takes a lock file named by its slot, which fails while another holds it."""

  def make(slot):
    code = "import os, sys, time; os.mkdir(sys.argv[1]); time.sleep(0.15); os.rmdir(sys.argv[1])"
    return [Process(argv=[sys.executable, "-S", "-c", code, str(tmp_path / slot)])]

  running, most = 0, 0

  def count(change):
    nonlocal running, most
    running += change
    most = max(most, running)

  ends = processes.run(
    [Task(name=name, make=make) for name in "abcde"],
    slots=["x", "y", "z"],
    on_start=lambda task, attempt: count(1),
    on_end=lambda end: count(-1),
  )
  assert [end.returncode for end in ends] == [0] * 5
  assert most == 3


def test_a_failure_stops_the_others_and_starts_no_more_if_asked():
  tasks = [
    task("bad", "import sys; sys.exit(3)"),
    task("long", "import time; time.sleep(30)"),
    task("next"),
  ]
  ends = {end.task: end for end in processes.run(tasks, slots=range(2), stop_on_failure=True)}
  assert set(ends) == {"bad", "long"}
  assert (ends["bad"].returncode, ends["bad"].stopped) == (3, False)
  assert (ends["long"].returncode, ends["long"].stopped) == (-signal.SIGTERM, True)


def test_a_failure_leaves_out_only_the_tasks_that_run_after_it():
  tasks = [
    task("bad", "import sys; sys.exit(3)"),
    task("after", after=["bad"]),
    task("after that", after=["after"]),
    task("other"),
  ]
  ends = processes.run(tasks, slots=range(1))
  assert [(end.task, end.returncode) for end in ends] == [("bad", 3), ("other", 0)]


def test_a_failing_task_is_repeated_after_the_waiting_ones(tmp_path):
  code = f"import os; os.mkdir({str(tmp_path / 'tried')!r})"
  ends: list[processes.End] = []
  last = processes.run(
    [task("once", code), task("twice", code, retries=2), task("other", retries=2)],
    slots=range(1),
    on_end=ends.append,
  )
  seen = [(end.task, end.attempt, end.returncode) for end in ends]
  assert seen == [
    ("once", 1, 0),
    ("twice", 1, 1),
    ("other", 1, 0),
    ("twice", 2, 1),
    ("twice", 3, 1),
  ]
  assert last[-1] == ends[-1]


def test_input_environment_and_output_reach_and_leave_a_process(tmp_path, capsys):
  code = "import os, sys; print(os.environ['NAME'], len(sys.stdin.buffer.read()), file=sys.stderr)"
  given = {"environment": {"NAME": "two words"}, "stdin": b"x" * 1_000_000}
  log = tmp_path / "log"
  log.write_text("before\n")
  relayed, logged = script(code, **given), script(code, **given, log=log)
  processes.run([Task(name="a", make=lambda slot: [relayed, logged])], slots=range(1))
  assert capsys.readouterr().out == "two words 1000000\n"
  assert log.read_text() == "before\ntwo words 1000000\n"


def test_lines_are_relayed_while_the_process_runs(capsys):
  code = "import time; print('early'); time.sleep(30)"
  seen = []

  def wait_for_line():
    while "early" not in "".join(seen):
      seen.append(capsys.readouterr().out)
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=wait_for_line)
  thread.start()
  with pytest.raises(processes.Stopped):
    processes.run([task("a", code)], slots=range(1))
  thread.join()


def test_one_failing_process_ends_its_task_and_is_the_one_reported():
  made = [script("import time; time.sleep(30)"), script("import sys; sys.exit(9)")]
  [end] = processes.run([Task(name="a", make=lambda slot: made)], slots=range(1))
  assert (end.returncode, end.process, end.stopped) == (9, 1, False)


def test_a_command_that_does_not_exist_fails_and_ends_its_task(capsys):
  made = [script("import time; time.sleep(30)"), Process(argv=["not-there"])]
  [end] = processes.run([Task(name="a", make=lambda slot: made)], slots=range(1))
  assert (end.returncode, end.process) == (127, 1)
  assert "not-there cannot be started: No such file" in capsys.readouterr().out


def test_what_a_process_started_dies_with_it(tmp_path):
  code = (
    "import os, signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = os.fork()\n"
    "if not child: time.sleep(30)\n"
    f"open({str(tmp_path / 'child')!r}, 'w').write(str(child))\n"
  )
  processes.run([task("a", code)], slots=range(1))
  child = int((tmp_path / "child").read_text())
  deadline = time.monotonic() + 5
  while is_running(child):
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.parametrize(("grace", "signals"), [(0.1, 1), (60.0, 2)])
def test_after_the_grace_or_a_second_signal_a_process_is_killed(grace, signals, tmp_path):
  ready = tmp_path / "ready"
  code = (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    f"open({str(ready)!r}, 'w').close()\n"
    "time.sleep(30)\n"
  )

  def send():
    while not ready.exists():
      time.sleep(0.02)
    for _ in range(signals):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.1)

  before = signal.getsignal(signal.SIGINT)  # ignored in jobs that a shell put in the background
  ends: list[processes.End] = []
  thread = threading.Thread(target=send)
  thread.start()
  with pytest.raises(processes.Stopped) as stopped:
    processes.run(
      [task("a", code, retries=1), task("b")],
      slots=range(1),
      grace_seconds=grace,
      on_end=ends.append,
    )
  thread.join()
  assert stopped.value.code == 128 + signal.SIGINT
  assert [(end.task, end.returncode, end.stopped) for end in ends] == [("a", -9, True)]
  assert signal.getsignal(signal.SIGINT) is before


def test_a_callback_that_raises_leaves_no_process_behind():
  pids = []
  started = processes._start

  def fail(end):
    raise KeyError(end.task)

  with pytest.MonkeyPatch.context() as patch:

    def start(*args):
      process = started(*args)
      pids.append(process.pid)
      return process

    patch.setattr(processes, "_start", start)
    with pytest.raises(KeyError, match="quick"):
      processes.run(
        [task("quick"), task("long", "import time; time.sleep(30)")], slots=range(2), on_end=fail
      )
  assert len(pids) == 2
  assert not any(is_running(pid) for pid in pids)


def test_outside_the_main_thread_tasks_run_without_handling_signals():
  ends: list[processes.End] = []
  thread = threading.Thread(target=lambda: ends.extend(processes.run([task("a")], slots=range(1))))
  thread.start()
  thread.join()
  assert [end.returncode for end in ends] == [0]


@pytest.mark.parametrize(
  ("tasks", "slots", "message"),
  [
    ([task("a"), task("a")], 1, "two tasks are named 'a'"),
    ([task("a", after=["b"])], 1, r"'a' runs after 'b', which is not among \['a'\]"),
    ([task("a", after=["b"]), task("b", after=["a"])], 1, "cycle"),
    ([task("a")], 0, "no slot"),
  ],
)
def test_tasks_that_cannot_run_are_refused(tasks, slots, message):
  with pytest.raises(ValueError, match=message):
    processes.run(tasks, slots=range(slots))
