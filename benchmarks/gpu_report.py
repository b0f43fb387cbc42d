"""All there is to measure on a GPU, in one file: one command of at most nine minutes a call, called twice or more.

    python -m benchmarks.gpu_report [--only PART,PART] [--out FILE.json] [--minutes 8.75] [--peer NAME=PATH]... [--smoke]

The first call measures environment, ceilings, correctness, steps with their memory and launches, kernels and a short training:
their limits together fit into one call. The same command again goes on where it stopped: what failed or ran out of time, then
sampling, the step by category of kernel, other projects and modes of compilation; what that call has no time for, the next
one does. --only names parts instead.

Each part runs in a process of its own with a time limit; after each the results are written to
benchmarks/results/<gpu>-<date>.json, with a Markdown table beside it. A part that fails or runs out of time leaves what it had
and its error, and the others go on. Nothing that was measured is measured again. Without a CUDA device it ends with code 2;
--smoke tries every part at toy size on the CPU instead, and its numbers mean nothing.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.peers import PEERS, variable
from benchmarks.gpu.goals import beside
from benchmarks.gpu.table import markdown
from benchmarks.measuring.result_file import RESULTS, ROOT, gpu_slug
from fastcm.bench.report import as_json
from fastcm.io.atomic import atomic_write

FORMAT = 2

MINUTES = 8.75  # of a call; the rest of nine is for its own start and end

# Seconds that a part may take, in the order in which they run: what matters most, first.
# The first call has time for all of its own.
FIRST_CALL = {
    "environment": 15.0,
    "ceilings": 40.0,
    "correctness": 120.0,
    "ect-128": 105.0,
    "kernels": 80.0,
    "edm-128": 50.0,
    "ect-512": 45.0,
    "edm-512": 40.0,
    "training": 30.0,
}
LIMITS = FIRST_CALL | {"sampler": 45.0, "breakdown": 60.0, "peers": 120.0, "compile-modes": 300.0}
MIN_SECONDS = 10.0  # with less left a part is not worth its start
DONE, FAILED, TIMED_OUT, NOT_STARTED = "done", "failed", "timed out", "not started"

Result = dict[str, Any]
Command = Callable[[str, Path, list[str]], list[str]]  # part, file for its lines, items that are done


def part_command(part: str, lines: Path, done: list[str], smoke: bool) -> list[str]:
    """How a part is started."""
    items = [word for item in done for word in ("--done", item)]
    return [sys.executable, "-m", "benchmarks.gpu.parts", part, "--lines", str(lines), *items, *(["--smoke"] if smoke else [])]


def read_result(path: Path, smoke: bool) -> Result:
    """What an earlier run left, or an empty result; a file of another kind ends the program."""
    if not path.exists():
        return {"format": FORMAT, "smoke": smoke, "parts": {}}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        fits = (result["format"], result["smoke"]) == (FORMAT, smoke) and isinstance(result["parts"], dict)
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        fail(f"{path} is no {'smoke ' if smoke else ''}result of this program: move it away or choose another --out")
    return result


def due_parts(result: Result) -> list[str]:
    """What a call without --only runs: the parts of the first call until each of them was tried, then all that there are."""
    tried = {name for name, part in result["parts"].items() if part["status"] != NOT_STARTED}
    return list(LIMITS if FIRST_CALL.keys() <= tried else FIRST_CALL)


def run_report(
    limits: Mapping[str, float],
    result: Result,
    command: Command,
    save: Callable[[Result], None],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the parts that are not done, each within its limit and all within ``seconds``; ``save`` is called after each."""
    end = clock() + seconds
    for part, limit in limits.items():
        before = result["parts"].get(part, {"items": {}, "seconds": 0.0})
        if before.get("status") == DONE and all(map(measured, before["items"].values())):
            continue
        start = clock()
        left = min(limit, end - start)
        if left < min(MIN_SECONDS, limit):
            outcome: Result = {"status": NOT_STARTED, "error": "the whole report was out of time"}
        else:
            say(f"{part} (at most {left:.0f} s)")
            outcome = run_part(part, before["items"], command, left)
        items = {**before["items"], **outcome.pop("items", {})}
        if outcome["status"] == DONE and any("error" in item for item in items.values()):
            outcome |= {"status": FAILED, "error": "; ".join(name for name, item in items.items() if "error" in item)}
        result["parts"][part] = {**outcome, "seconds": before["seconds"] + clock() - start, "items": items}
        save(result)
        say(f"{part}: {outcome['status']}" + (f": {outcome['error'][:200]}" if outcome["error"] else ""))


def run_part(part: str, items: Mapping[str, Any], command: Command, limit: float) -> Result:
    """One part in a process group of its own, which is killed at the limit: status, error, and the items it finished."""
    done = [name for name, item in items.items() if measured(item)]
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines", Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(part, lines, done), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=limit)
                status = DONE if code == 0 else FAILED
                error = None if code == 0 else f"ended with code {code}: {last_words(log)}"
            except subprocess.TimeoutExpired:
                status, error = TIMED_OUT, f"stopped after {limit:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return {"status": status, "error": error, "items": read_lines(lines)}


def measured(item: Mapping[str, Any]) -> bool:
    """Whether there is no reason to try an item again: it did not fail, and what it needs was there."""
    return "error" not in item and "unavailable" not in item


def read_lines(path: Path) -> dict[str, Result]:
    """The items that a part wrote; a last line that was cut off is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            item = json.loads(line)
            found[item.pop("item")] = item
    return found


def last_words(log: Path) -> str:
    """The end of what a part printed."""
    return log.read_text(encoding="utf-8", errors="replace").strip()[-600:]


def say(line: str) -> None:
    """A line for the one who waits."""
    print(f"gpu_report: {line}", flush=True)


def fail(line: str) -> None:
    """End with code 2 and one line."""
    print(f"gpu_report: error: {line}", file=sys.stderr)
    sys.exit(2)


def default_path(smoke: bool) -> Path:
    """benchmarks/results/<gpu>-<date>.json."""
    return RESULTS / f"{'smoke-cpu' if smoke else gpu_slug()}-{datetime.now(UTC):%Y-%m-%d}.json"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"parts, separated by commas: {', '.join(LIMITS)}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of the whole run")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help=f"a checkout of {', '.join(PEERS)}")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    for peer, _, path in (word.partition("=") for word in arguments.peer):
        if peer not in PEERS or not path:
            fail(f"--peer {peer}={path}: expected NAME=PATH with a name of {', '.join(PEERS)}")
        os.environ[variable(peer)] = path
    wanted = list(filter(None, arguments.only.split(",")))
    if unknown := set(wanted) - set(LIMITS):
        fail(f"--only: no part {', '.join(sorted(unknown))}; the parts are {', '.join(LIMITS)}")
    if not arguments.smoke and not torch.cuda.is_available():
        fail("no CUDA device here; --smoke tries every part on the CPU")
    path = arguments.out or default_path(arguments.smoke)

    def save(result: Result) -> None:
        atomic_write(path, as_json(result, indent=1) + "\n")
        atomic_write(path.with_suffix(".md"), markdown(result, beside(path)))

    def command(part: str, lines: Path, done: list[str]) -> list[str]:
        return part_command(part, lines, done, arguments.smoke)

    result = read_result(path, arguments.smoke)
    wanted = wanted or due_parts(result)
    run_report({part: LIMITS[part] for part in LIMITS if part in wanted}, result, command, save, arguments.minutes * 60)
    say(f"{path} and {path.with_suffix('.md').name}")
    missing = [part for part in wanted if result["parts"][part]["status"] != DONE]
    if missing:
        say(f"not done: {', '.join(missing)}; the same command goes on")
        sys.exit(1)
    if later := [part for part in LIMITS if part not in result["parts"]]:
        say(f"not measured yet: {', '.join(later)}; the same command goes on with them")


if __name__ == "__main__":
    main()
