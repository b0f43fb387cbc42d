"""The tuner's search and its editing of the tables, with a timer that is a formula."""

import json
import math

import pytest
import torch

from fastcm.bench import tune
from fastcm.bench.cases import cases
from fastcm.bench.tune import Found, Question, format_table, neighbours, pin, questions, search, with_rule
from fastcm.errors import CheckpointError
from fastcm.kernels.attention import preferred_backend
from fastcm.kernels.runtime import pinned as pinned_module
from fastcm.kernels.runtime.pinned import answering, pinned

QUESTION = Question("noise", "forward", "sm80", (("elements", 3072), ("batch", 128)))
START = {"block": 256, "num_warps": 4, "even": True, "layout": "rows"}


def test_neighbours_change_one_parameter():
    assert [use["num_warps"] for use in neighbours(START, "num_warps")] == [1, 2, 8, 16]
    assert [use["block"] for use in neighbours(START, "block")] == [64, 128, 512, 1024]
    assert [use["block"] for use in neighbours({"block": 1}, "block")] == [2, 4]
    assert [use["even"] for use in neighbours(START, "even")] == [False]
    assert neighbours(START, "layout") == []
    assert all(use["layout"] == "rows" and len(use) == 4 for name in START for use in neighbours(START, name))


def cost(use):
    """Best at block 2048, 8 warps and odd; large blocks with few warps do not compile."""
    if use["block"] > 512 and use["num_warps"] < 8:
        return math.inf
    return 1 + abs(math.log2(use["block"] / 2048)) + abs(math.log2(use["num_warps"] / 8)) + use["even"]


def test_search_finds_the_best_through_what_fails():
    calls = []
    found = search(QUESTION, START, lambda use: calls.append(use) or cost(use))
    assert found.use == {"block": 2048, "num_warps": 8, "even": False, "layout": "rows"}
    assert (found.use_s, found.before_s) == (1.0, cost(START))
    assert found.better
    assert found.tried == len(calls) == len({json.dumps(use) for use in calls})  # nothing is timed twice


def test_what_is_best_is_kept_and_noise_is_no_gain():
    assert not search(QUESTION, START, lambda use: 1.0).better
    assert not search(QUESTION, START, lambda use: 1.0 if use == START else 0.995).better
    assert search(QUESTION, START, lambda use: 1.0 if use == START else 0.98).better


def test_parameters_that_fail_from_the_start_are_replaced():
    found = search(QUESTION, START, lambda use: math.inf if use["block"] == 256 else 1.0)
    assert found.better
    assert found.use["block"] != 256


TABLE = {"forward": [{"when": {"elements": [0, 512]}, "use": {"block": 1}}, {"use": {"block": 2}}], "backward": [{"use": {}}]}


def test_an_exact_rule_stands_before_the_others_and_replaces_its_like():
    once = with_rule(TABLE, QUESTION, {"block": 4})
    rule = {"when": {"elements": [3072, 3072], "batch": [128, 128]}, "use": {"block": 4}}
    assert once == {"forward": [rule, *TABLE["forward"]], "backward": TABLE["backward"]}
    assert with_rule(once, QUESTION, {"block": 8})["forward"] == [{**rule, "use": {"block": 8}}, *TABLE["forward"]]
    assert TABLE["forward"][0]["use"] == {"block": 1}


def test_tables_are_written_one_rule_a_line():
    text = format_table(TABLE)
    assert json.loads(text) == TABLE
    assert len(text.splitlines()) == 2 + 2 * 2 + 3


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of its own for every op and architecture."""
    path = tmp_path / "sm80.json"
    path.write_text(json.dumps(TABLE))
    monkeypatch.setattr(pinned_module, "table_path", lambda op, arch: path)
    monkeypatch.setattr(tune, "table_path", lambda op, arch: path)
    pinned_module.forget_tables()
    yield path
    monkeypatch.undo()
    pinned_module.forget_tables()


def found(use):
    return Found(QUESTION, {"block": 2}, use, 2.0, 1.0, 5)


def test_a_pinned_rule_holds_at_once_and_for_its_facts_alone(table):
    assert pinned("noise", "forward", "sm80", elements=3072, batch=128) == {"block": 2}
    pin(found({"block": 4}))
    assert pinned("noise", "forward", "sm80", elements=3072, batch=128) == {"block": 4}
    assert pinned("noise", "forward", "sm80", elements=3072, batch=64) == {"block": 2}
    assert pinned("noise", "forward", "sm80", elements=12, batch=128) == {"block": 1}


def test_an_interrupted_write_leaves_the_table_whole(table, monkeypatch):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        pin(found({"block": 4}))
    assert json.loads(table.read_text()) == TABLE
    assert [path.name for path in table.parent.iterdir()] == ["sm80.json"]


def ask():
    return pinned("noise", "forward", "sm80", elements=3072, batch=128), pinned("noise", "forward", "sm80", elements=5, batch=1)


def test_questions_of_a_call_are_heard_with_their_answers(table):
    assert questions(ask) == {
        QUESTION: {"block": 2},
        QUESTION._replace(facts=(("elements", 5), ("batch", 1))): {"block": 1},
    }


def test_a_trial_answers_its_own_question_and_ends_with_its_block(table):
    with answering(lambda question, use: {"block": 64} if question == QUESTION else use):
        assert ask() == ({"block": 64}, {"block": 1})
    assert ask() == ({"block": 2}, {"block": 1})
    with pytest.raises(ZeroDivisionError), answering(lambda question, use: {}):
        raise ZeroDivisionError
    assert ask() == ({"block": 2}, {"block": 1})


def test_tuning_a_case_pins_only_what_gains_and_asks_each_question_once(table, monkeypatch):
    times = {1: 0.5, 4: 1.0, 8: 2.0}  # 1 would be fastest, and is wrong

    class Work:
        set_bytes = 1
        backends = (type("Backend", (), {"name": "triton"})(),)

        def __init__(self, case, device):
            pass

        def prepare(self, backend, index):
            return ask

        def judge(self, backend):
            wrong = "wrong" if ask()[0]["block"] == 1 else None
            return type("Verdict", (), {"problem": wrong})()

    def time_graph(thunks, budget_s):
        seconds = times.get(thunks[0]()[0]["block"], 3.0)
        return type("Timing", (), {"median_us": seconds * 1e6})()

    monkeypatch.setattr(tune.functional, "Work", Work)
    monkeypatch.setattr(tune, "time_graph", time_graph)
    case = type("Case", (), {"op": "add_noise", "label": "toy", "shape": None})()
    results = tune.tune([case, case], torch.device("cpu"), 0.0)
    assert [(result.use, result.better) for result in results] == [({"block": 4}, True), ({"block": 1}, False)]
    assert pinned("noise", "forward", "sm80", elements=3072, batch=128) == {"block": 4}
    assert len(json.loads(table.read_text())["forward"]) == 3
    lines = tune.summary(results).splitlines()
    assert lines[1].endswith("block=4")
    assert lines[2].endswith("kept")


@pytest.mark.parametrize(
    ("seconds", "best"), [((1.0, 2.0, 3.0), "triton"), ((3.0, 2.0, 1.0), "xformers"), ((9.0, 2.0, None), "torch")]
)
def test_attention_goes_to_the_fastest_that_is_right(table, monkeypatch, seconds, best):
    table.write_text(json.dumps({"dispatch": [{"use": {"backend": "triton"}}]}))
    pinned_module.forget_tables()
    times = dict(zip(("triton", "torch", "xformers"), seconds, strict=True))

    def rows(case, settings):
        (name,) = settings.wanted
        kernel = {"median_us": (times[name] or 0) * 1e6 * (1 if case.direction == "fwd" else 2)}
        yield {"status": "ok" if times[name] else "unavailable", "kernel": kernel}

    monkeypatch.setattr(tune, "rows", rows)
    monkeypatch.setattr(tune, "_tune_case", lambda *arguments: [])
    chosen = list(cases("attention", "digits8", 2, torch.bfloat16, ("fwd", "bwd", "jvp")))
    (found,) = tune.tune(chosen, torch.device("cpu"), 0.0)
    assert found.use == {"backend": best}
    assert found.use_s == 3 * times[best]
    assert preferred_backend(16, 32, "sm80") == best
    assert preferred_backend(17, 32, "sm80") == "triton"
