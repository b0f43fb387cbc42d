"""The measured numbers of README.md and docs/*.md, written from benchmarks/results/*.json and from nowhere else.

    python -m benchmarks.readme_tables [--check]

A document marks a region by two comments, ``numbers: TABLE`` before it and ``end of numbers`` after it; TABLE is a key of
TABLES. Everything between them is made from the newest result file of that kind, which the text names. --check changes
nothing and ends with code 1 where a document differs from its files. A shown result that was measured with changes that no
commit has is a warning.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.goals import commit_of
from benchmarks.gpu.table import COMMAND, step_rates, table
from benchmarks.measuring.result_file import ROOT
from fastcm.io.atomic import atomic_write

REGION = re.compile(r"(<!-- numbers: ([\w-]+) -->\n)(.*?)(<!-- end of numbers -->)", re.DOTALL)
DATED = re.compile(r"(.+)-(\d{4}-\d{2}-\d{2})\.json")

Results = Mapping[str, tuple[str, dict[str, Any]]]  # what was measured: file name, content


class Table(NamedTuple):
    """Which results are shown, by a pattern of their file names without the date, and how; what stands where there are none."""

    pattern: str
    text: Callable[[Results], str]
    otherwise: str | None = None


def newest_results(folder: Path, pattern: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The newest file of each name that the pattern matches, by that name; files are called NAME-YYYY-MM-DD.json."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem[-10:]):
        match = DATED.fullmatch(path.name)
        if match and re.fullmatch(pattern, match[1]):
            found[match[1]] = path
    return {name: (path.name, json.loads(path.read_text(encoding="utf-8"))) for name, path in sorted(found.items())}


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:#.3g}".rstrip(".")


def files(results: Results) -> str:
    """The names of the files, as a text shows them, one a line."""
    return ",\n".join(f"`benchmarks/results/{name}`" for name, _ in results.values())


def place(environment: Mapping[str, Any]) -> str:
    """What a CPU's numbers were measured on."""
    threads = f"{environment['threads']} thread" + "s" * (environment["threads"] != 1)
    return f"{environment['processor']}, {threads}, torch {environment['packages']['torch']}"


def measured_on(results: Results) -> str:
    """Where the results were measured, as far as they say so, and their files; each place once."""
    places: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {}
    for name, (file, result) in results.items():
        where = f"Measured on {place(result['environment'])}:\n" if "environment" in result else ""
        places.setdefault(where, {})[name] = (file, result)
    return "\n\n".join(f"{where}{files(found)}" for where, found in places.items())


def digits(results: Results) -> str:
    """Distances of the demo, and their ratio to what a perfect generator would get."""
    ((_, result),) = results.values()
    distances = result["distances"]
    real = distances["real against real"]
    lines = [(name, short(value), short(value / real)) for name, value in sorted(distances.items(), key=lambda pair: pair[1])]
    rows = table(("set", "distance", "times real against real"), lines)
    seconds = result["processor_seconds"]
    took = f", {seconds:.0f} s of processor time" if seconds else ""
    return f"{rows}\n\nMeasured with seed 0 on {place(result['environment'])}{took}\n({files(results)})."


def ctm_digits(results: Results) -> str:
    """Distances by steps and gamma."""
    ((_, result),) = results.values()
    found = {tuple(re.findall(r"[\d.]+", name)): value for name, value in result["distances"].items()}
    gammas, steps = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    lines = [(number, *(short(found[gamma, number]) for gamma in gammas)) for number in steps]
    real = f"Real against real: {short(result['real against real'])} ({files(results)})."
    return table(("steps", *(f"gamma {gamma}" for gamma in gammas)), lines) + f"\n\n{real}"


def cpu_step(results: Results) -> str:
    """How many times as fast as the plain step, by network and objective."""
    objectives = list(dict.fromkeys(row["objective"] for _, result in results.values() for row in result["rows"]))
    lines = []
    for _, result in results.values():
        ratios = {row["objective"]: f"{row['ratio']:.2f}" for row in result["rows"]}
        lines.append((f"`{result['config']}`, {result['batch_size']}", *(ratios.get(name, "-") for name in objectives)))
    return table(("network, batch", *objectives), lines) + f"\n\n{measured_on(results)}"


def cpu_boundary(results: Results) -> str:
    """How many times as fast a step is that leaves out the targets nobody reads."""
    lines = [(f"`{r['config']}`, {r['batch_size']}", f"{r['q']:g}", f"{r['ratio']:.2f}") for _, r in results.values()]
    return table(("network, batch", "q", "times as fast"), lines) + f"\n\n{measured_on(results)}"


def gpu(results: Results) -> str:
    """Steps on each GPU that was measured."""
    blocks = []
    for name, result in results.values():
        facts = result["parts"]["environment"]["items"]["environment"]
        versions = f"torch {facts['packages']['torch']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}"
        title = f"{facts['device']}, {versions},\nby `{COMMAND}` (`benchmarks/results/{name}`):"
        blocks.append(f"{title}\n\n{step_rates(result)}")
    return "\n\n".join(blocks)


def cifar10_20min(results: Results) -> str:
    """Times and distances of the real training, and its pictures."""
    blocks = []
    for name, result in results.values():
        stages, distances = result["stages"], result["stages"]["measure"]["distances"]
        title = (
            f"`cifar10_20min` on {result['environment']['device']}: {stages['train']['seconds'] / 60:.1f} minutes of training"
        )
        lines = [(which, short(value)) for which, value in sorted(distances.items(), key=lambda pair: pair[1])]
        tool = stages["measure"].get("tool", "none")
        blocks += [f"{title}\n(`benchmarks/results/{name}`);\ndistances by `{tool}`, {result['num']:,} images a set, not FID:"]
        blocks.append(table(("set", "distance"), lines))
    blocks.append("![Real images, samples by Heun's method, in 2 steps, in 1 step](docs/cifar10_20min.png)")
    return "\n\n".join([*blocks, "![Samples in 1 step above their nearest training images](docs/cifar10_20min_nearest.png)"])


TABLES = {
    "digits": Table("cpu-digits", digits),
    "ctm-digits": Table("cpu-ctm-digits", ctm_digits),
    "cpu-step": Table(r"cpu-step-\w+", cpu_step),
    "cpu-boundary": Table(r"cpu-ect-boundary-[\w-]+", cpu_boundary),
    "cifar10-20min": Table(r"(?!smoke-)[\w-]+-cifar10-20min", cifar10_20min, "`cifar10_20min` has not run yet."),
    "gpu": Table(r"(?!cpu-|smoke-)[\w-]+(?<!-cifar10-20min)(?<!-sanitize)", gpu, "No number here was measured on a GPU yet."),
}


def rewrite(text: str, folder: Path) -> str:
    """The document with its regions made anew; raises SystemExit for an unknown table, or one whose result is missing."""

    def region(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if name not in TABLES:
            raise SystemExit(f"readme_tables: no table '{name}'; the tables are {', '.join(TABLES)}")
        chosen = TABLES[name]
        results = newest_results(folder, chosen.pattern)
        if not results and chosen.otherwise is None:
            raise SystemExit(f"readme_tables: {folder} has no result for table '{name}' ({chosen.pattern}-YYYY-MM-DD.json)")
        return f"{start}{chosen.text(results) if results else chosen.otherwise}\n{end}"

    return REGION.sub(region, text)


def uncommitted(text: str, folder: Path) -> list[str]:
    """The result files that a document shows and whose commit ends in "+": what was measured differs from every commit."""
    shown = [newest_results(folder, TABLES[name].pattern) for _, name, _, _ in REGION.findall(text) if name in TABLES]
    return [file for results in shown for file, result in results.values() if (commit_of(result) or "").endswith("+")]


def documents(root: Path) -> list[Path]:
    """README.md and the Markdown files of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; end with code 1 where something would change")
    check, stale = parser.parse_args().check, []
    for path in documents(ROOT):
        text = path.read_text(encoding="utf-8")
        fresh = rewrite(text, ROOT / "benchmarks" / "results")
        for file in uncommitted(text, ROOT / "benchmarks" / "results"):
            print(f"readme_tables: warning: {file} was measured with uncommitted changes, measure it anew", file=sys.stderr)
        if fresh != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                atomic_write(path, fresh)
    if stale:
        print(f"readme_tables: {', '.join(stale)} {'differs from its result files' if check else 'written'}")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
