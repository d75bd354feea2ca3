# SPDX-License-Identifier: Apache-2.0
"""What a run of hours shows while it runs: items, tokens per second, time left."""

from svsk_eval.bench.progress import RunProgress, Step, duration


class Clock:
    """A clock that is put forward by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def generated(done: int, *, kept: int = 0, tokens: int = 0, place: int = 1) -> Step:
    return Step(f"task{place}", done, 100, kept, tokens, items=100, place=place, places=2)


def test_items_speed_and_time_left() -> None:
    clock = Clock()
    run = RunProgress(["reference", "variant"], log=False, now=clock)
    first = run.take("reference", generated(20, kept=20))
    assert first.title == "reference (1 of 2): task1 (1 of 2)"
    assert first.detail == "20 of 100 items"
    clock.seconds += 10
    # 5000 tokens in ten seconds without a finished answer: a speed, but no time left yet
    assert run.take("reference", generated(20, kept=20, tokens=5000)).detail == (
        "20 of 100 items · 500 tokens/s"
    )
    clock.seconds += 30
    # 40 new answers in 40 seconds; those of the earlier run cost none
    shown = run.take("reference", generated(60, kept=20, tokens=20000))
    assert shown.detail == "60 of 100 items · 500 tokens/s · about 40 s left"
    assert shown.lines == ()


def test_the_time_of_the_tasks_to_come_is_that_of_the_model_before() -> None:
    clock = Clock()
    run = RunProgress(["reference", "variant"], log=False, now=clock)
    for place, seconds in ((1, 100), (2, 300)):
        run.take("reference", generated(0, place=place))
        clock.seconds += seconds
        shown = run.take("reference", generated(100, place=place, tokens=1000))
    # the variant's tasks take as long as the reference's: 100 + 300 seconds
    assert shown.detail.endswith("about 0 s left, 7 min in all")
    run.take("variant", generated(0))
    clock.seconds += 50
    shown = run.take("variant", generated(50, tokens=1000))
    assert shown.detail.endswith("about 50 s left, 6 min in all")
    run.take("variant", generated(0, place=2))
    clock.seconds += 30
    assert run.take("variant", generated(10, place=2, tokens=1)).detail.endswith("about 4 min left")


def test_items_of_multiple_choice_are_several_requests() -> None:
    clock = Clock()
    run = RunProgress(["x"], log=False, now=clock)
    run.take("x", Step("mc", 0, 400, items=100, place=1, places=1))
    clock.seconds += 10
    shown = run.take("x", Step("mc", 102, 400, items=100, place=1, places=1))
    assert shown.title == "x: mc"
    assert shown.detail == "25 of 100 items · about 29 s left"


def test_a_log_gets_a_line_a_minute_and_one_at_the_end() -> None:
    clock = Clock()
    run = RunProgress(["x"], log=True, now=clock)
    lines: list[str] = []
    for second in range(0, 201, 20):
        clock.seconds = 1000.0 + second
        step = Step("task", 10 + second // 10, 30, 10, second * 50, items=30, place=1, places=1)
        lines += run.take("x", step).lines
    lines += run.take("x", step).lines  # nothing new
    assert lines == [
        "x: task",
        "x: task: 16 of 30 items · 50.0 tokens/s · about 2 min left",
        "x: task: 22 of 30 items · 50.0 tokens/s · about 80 s left",
        "x: task: 28 of 30 items · 50.0 tokens/s · about 20 s left",
        "x: task: 30 items, 10 of which had an answer already · 10000 tokens at 50.0 tokens/s"
        " · answered in 3 min",
    ]


def test_a_screen_gets_only_the_ends() -> None:
    clock = Clock()
    run = RunProgress(["x"], log=False, now=clock)
    assert run.take("x", Step("starting")).lines == ()
    assert run.take("x", Step("task", 0, 2, items=2, place=1, places=1)).lines == ()
    clock.seconds += 100
    shown = run.take("x", Step("task", 2, 2, items=2, place=1, places=1))
    assert shown.lines == ("x: task: 2 items · answered in 2 min",)


def test_what_is_no_task_is_counted_too() -> None:
    clock = Clock()
    run = RunProgress(["x", "y"], log=True, now=clock)
    assert run.take("y", Step("text, hf", 0, 8)).detail == "0 of 8"
    clock.seconds += 8
    assert run.take("y", Step("text, hf", 2, 8)).detail == "2 of 8 · about 24 s left"
    for log in (True, False):
        noted = RunProgress(["x", "y"], log=log, now=clock).take("y", Step("note: cut"))
        assert noted.lines == ("y (2 of 2): note: cut",)


def test_durations() -> None:
    spans = {0.4: "0 s", 89: "89 s", 100: "2 min", 5340: "89 min", 12000: "3 h 20 min"}
    assert {seconds: duration(seconds) for seconds in spans} == spans
