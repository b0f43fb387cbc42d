"""What is to be reached on a GPU, where each value stands in the result files, and whether it was reached.

    python -m benchmarks.gpu.goals benchmarks/results/<gpu>-<date>.json

The figures are for an H200; those that are ratios of measurements of one run hold on any GPU.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.size import GPU_TESTS
from fastcm.bench.cases import cases
from fastcm.bench.measure import OK
from fastcm.bench.report import text_table

Result = dict[str, Any]
Row = dict[str, Any]
SHAPE_SETS = ("ddpmpp32", "adm64")
MAIN = "256x32x32 "  # how the label of the main shape of group norm begins: 256 channels, 32x32
BATCH = 128


class Found(NamedTuple):
    """A value, and of how many of how many cases it is the worst (1 of 1 where there is one)."""

    value: float
    measured: int = 1
    wanted: int = 1


class Goal(NamedTuple):
    """At least, or at most, so much; ``value`` reads it from the results, None where it was not measured.

    source: "report", "training" (cifar10_20min) or "sanitize"; only_on: the GPU that an absolute figure is for.
    """

    name: str
    least: float | None
    most: float | None
    value: Callable[[Result], Found | None]
    source: str = "report"
    only_on: str = ""

    @property
    def wanted(self) -> str:
        """The goal in words."""
        return f"at least {self.least:,g}" if self.most is None else f"at most {self.most:,g}"

    def missed_by(self, value: float) -> float:
        """The share of the goal that is missing, or too much; 0 or less where it was reached."""
        return 1 - value / self.least if self.most is None else value / self.most - 1 if self.most else float(value)


def item(result: Result, part: str, name: str) -> dict[str, Any] | None:
    """What an item of a part measured; None where it was not, could not be, or failed."""
    found = result["parts"].get(part, {"items": {}})["items"].get(name)
    return None if found is None or {"error", "unavailable"} & found.keys() else found


def rows(result: Result) -> list[Row]:
    """All rows of the kernel benchmark."""
    items = result["parts"].get("kernels", {"items": {}})["items"].values()
    return [row for value in items for row in value.get("rows", [])]


@cache
def num_cases(op: str, directions: tuple[str, ...], begins: str) -> int:
    """How many shapes of both networks an op has in these passes."""
    chosen = [case for name in SHAPE_SETS for case in cases(op, name, BATCH, torch.bfloat16, directions)]
    return sum(case.label.startswith(begins) for case in chosen)


def by_case(result: Result, op: str, directions: tuple[str, ...], begins: str) -> Iterator[dict[str, Row]]:
    """The rows of each shape that could be timed, by backend."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows(result):
        if row["op"] == op and row["pass"] in directions and row["shape"].startswith(begins) and row["status"] == OK:
            found.setdefault((row["pass"], row["shapes"], row["shape"]), {})[row["backend"]] = row
    yield from found.values()


def microseconds(row: Row) -> float:
    """Time of a call on the device."""
    return (row["kernel"] or row["call"])["median_us"]


def worst(values: list[float], wanted: int) -> Found | None:
    """The least of the values that there are."""
    return Found(min(values), len(values), wanted) if values else None


def copy_share(op: str, direction: str, begins: str = "") -> Callable[[Result], Found | None]:
    """Bytes per second of our kernel as a share of those of a copy, at its worst shape."""

    def read(result: Result) -> Found | None:
        shares = [row["triton"]["copy_share"] for row in by_case(result, op, (direction,), begins) if "triton" in row]
        return worst(shares, num_cases(op, (direction,), begins))

    return read


def over_floor(op: str) -> Callable[[Result], Found | None]:
    """Time of our kernel over that of a copy of as many bytes, at its worst shape."""

    def read(result: Result) -> Found | None:
        found = copy_share(op, "fwd")(result)
        return found and found._replace(value=1 / found.value)

    return read


def kernel_ratio(op: str, directions: tuple[str, ...], others: str, begins: str = "") -> Callable[[Result], Found | None]:
    """Time of the fastest other backend whose name matches, over ours, at the worst shape."""

    def read(result: Result) -> Found | None:
        ratios = []
        for found in by_case(result, op, directions, begins):
            times = [microseconds(row) for name, row in found.items() if re.fullmatch(others, name)]
            if times and "triton" in found:
                ratios.append(min(times) / microseconds(found["triton"]))
        return worst(ratios, num_cases(op, directions, begins))

    return read


def speed_ratio(part: str, other: str) -> Callable[[Result], Found | None]:
    """Images per second of our step over those of another of the same part."""

    def read(result: Result) -> Found | None:
        mine, theirs = item(result, part, "fastcm triton"), item(result, part, other)
        return Found(mine["images_per_s"] / theirs["images_per_s"]) if mine and theirs else None

    return read


def speed(result: Result) -> Found | None:
    """Images per second of the ECT step at batch 128."""
    mine = item(result, "ect-128", "fastcm triton")
    return mine and Found(mine["images_per_s"])


def convolution_floor(conv: Mapping[str, float], batch: int) -> float:
    """Milliseconds of an ECT step's convolutions alone: two forward passes and both gradients at the times cuDNN needed.

    It counts the gradient of the images too, which a step does not need: that of the first convolution.
    conv: the ceiling of the network's convolutions, measured at a batch size of its own.
    """
    return (2 * conv["fprop_ms"] + conv["dgrad_ms"] + conv["wgrad_ms"]) * batch / conv["batch"]


def conv_share(result: Result) -> Found | None:
    """Time of a step's convolutions alone over that of the whole step."""
    mine, conv = item(result, "ect-128", "fastcm triton"), item(result, "ceilings", "conv ddpmpp32")
    if not mine or not conv:
        return None
    return Found(convolution_floor(conv, mine["batch"]) / mine["step_ms"]["median"])


def sampling_overhead(result: Result) -> Found | None:
    """Time of a call over the sum of its kernels' times, one image in one step."""
    found = item(result, "sampler", "fastcm triton, 1 steps, batch 1")
    return found and Found(found["call"]["median_us"] / 1e3 / found["kernel_ms"])


def failed_tests(result: Result) -> Found | None:
    """Files with a test for a GPU that fails; None until every such file has run."""
    items = result["parts"].get("correctness", {"items": {}})["items"]
    if not set(GPU_TESTS) <= items.keys():
        return None
    return Found(sum("error" in items[name] for name in GPU_TESTS))


GOALS = (
    Goal("files with failing GPU tests", None, 0, failed_tests),
    Goal("compute-sanitizer tools that report an error", None, 0, lambda result: Found(result["failed"]), "sanitize"),
    Goal("group norm forward, 256 channels, 32x32: share of copy bandwidth", 0.90, None, copy_share("group_norm", "fwd", MAIN)),
    Goal("group norm backward, same shape", 0.85, None, copy_share("group_norm", "bwd", MAIN)),
    Goal("group norm JVP, same shape", 0.85, None, copy_share("group_norm", "jvp", MAIN)),
    Goal("group norm at every shape: times as fast as torch.compile", 1.0, None,
         kernel_ratio("group_norm", ("fwd", "bwd", "jvp"), "compile")),
    Goal("group norm at the main shape: times as fast as torch.compile", 1.5, None,
         kernel_ratio("group_norm", ("fwd", "bwd", "jvp"), "compile", MAIN)),
    Goal("attention forward and backward at every shape: times as fast as the best SDPA backend", 1.0, None,
         kernel_ratio("attention", ("fwd", "bwd"), "sdpa-.*")),
    Goal("attention JVP at every shape: times as fast as the math path", 2.0, None,
         kernel_ratio("attention", ("jvp",), "torch")),
    Goal("optimizer with one average: times its byte floor", None, 1.3, over_floor("optimizer")),
    Goal("ECT step, DDPM++, batch 128: times as fast as literal eager TF32", 3.0, None, speed_ratio("ect-128", "eager tf32")),
    Goal("the same against compiled channels_last bf16", 1.1, None, speed_ratio("ect-128", "compiled bf16")),
    Goal("the same as a share of the measured convolution ceiling", 0.55, None, conv_share),
    Goal("the same in images/s", 2630, None, speed, only_on="H200"),
    Goal("the same against the official step with TF32 on", 3.0, None, speed_ratio("peers", "ect tf32")),
    Goal("the same against FastGen's CM step with its AMP", 2.0, None, speed_ratio("peers", "fastgen amp")),
    Goal("1-step sampling at batch 1: times the sum of its kernels' times", None, 1.2, sampling_overhead),
    Goal("cifar10_20min: minutes of training", None, 20, lambda result: Found(result["stages"]["train"]["seconds"] / 60),
         "training", only_on="H200"),
)  # fmt: skip


NOT_MEASURED = "not measured"
HEADER = ("goal", "wanted", "measured", "outcome")


def goal_lines(results: Mapping[str, Result]) -> list[tuple[str, str, str, str]]:
    """Per goal: name, goal, measured value, and whether it was reached or by how much it was missed.

    results: by source; the report tells the device. A value of another source says its commit where that is not the report's.
    """
    facts = item(results["report"], "environment", "environment")
    device = facts["device"] if facts else ""
    lines = []
    for goal in GOALS:
        shown, outcome = _outcome(goal, results.get(goal.source), device)
        differs = "" if shown == NOT_MEASURED else _other_commit(results["report"], goal.source, results[goal.source])
        lines.append((goal.name, goal.wanted, shown, outcome + differs))
    return lines


def _other_commit(report: Result, source: str, result: Result) -> str:
    """Both commits, where they are not the same."""
    found, expected = commit_of(result), commit_of(report)
    return "" if found == expected else f" ({source} at commit {found or 'unknown'}, report at {expected or 'unknown'})"


def commit_of(result: Result) -> str | None:
    """The commit that a result was measured at; a report has its environment as a part. None where it does not say."""
    facts = item(result, "environment", "environment") if "parts" in result else result.get("environment")
    return facts and facts.get("commit")


def _outcome(goal: Goal, result: Result | None, device: str) -> tuple[str, str]:
    found = goal.value(result) if result else None
    if found is None:
        return NOT_MEASURED, "-"
    shown = f"{found.value:,.3g}" if found.value < 1000 else f"{found.value:,.0f}"
    missed = goal.missed_by(found.value)
    if goal.only_on not in device:
        return shown, f"the goal is for {goal.only_on}"
    if missed > 0:
        return shown, f"missed by {missed:.1%}" if goal.most != 0 else "missed"
    partly = f" on {found.measured} of {found.wanted} shapes, the others were not measured" * (found.measured < found.wanted)
    return shown, "reached" + partly


def read_report(path: Path) -> Result:
    """A report from its file; raises OSError where it cannot be read and ValueError where it is none."""
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not {"smoke", "parts"} <= report.keys():
        raise ValueError("no report of a GPU, which has the keys 'smoke' and 'parts'")
    return report


def beside(report: Path) -> dict[str, Result]:
    """A report and the newest results of the same GPU that lie beside it."""
    name = re.sub(r"-\d{4}-\d{2}-\d{2}$", "", report.stem)
    kinds = {"training": "cifar10-20min", "sanitize": "sanitize"}
    found = {key: sorted(report.parent.glob(f"{name}-{kind}-????-??-??.json")) for key, kind in kinds.items()}
    paths = {key: paths[-1] for key, paths in found.items() if paths}
    return {key: json.loads(path.read_text(encoding="utf-8")) for key, path in paths.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    path = parser.parse_args().report
    try:
        report = read_report(path)
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}; expected a file that python -m benchmarks.gpu_report has written")
    if report["smoke"]:
        parser.error(f"{path} is a smoke report of a CPU at toy size: its numbers mean nothing")
    print(text_table(HEADER, goal_lines({"report": report, **beside(path)})))


if __name__ == "__main__":
    main()
