"""The demo's distances as a result file: train the embedded digits by the command that a user has, keep what it measured.

    python -m benchmarks.digits_demo [KEY=VALUE]... [--run FOLDER] [--json FILE]

The run is resumed where it is unfinished; its time counts only where this command saw all of it. It is the processor's,
which other work on the machine changes less than the clock's.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measuring.result_file import RESULTS, write_result
from fastcm.config import load_config
from fastcm.io.run_files import RunFiles

CONFIG = "digits"


def measure(run: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate in the folder ``run``: the distances, and the seconds of processor time of a whole run."""
    files, before = RunFiles(run), os.times()
    whole = not files.run.exists()
    subprocess.run([sys.executable, "-m", "fastcm", "train", CONFIG, *overrides, "--out", str(run)], check=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "what": "Frechet distances on the features of a small digit classifier, 898 images a set",
        "environment": {"threads": load_config(CONFIG, overrides).compute.threads},
        "processor_seconds": seconds if whole else None,
        "distances": json.loads(files.evaluation.read_text(encoding="utf-8")),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--run", type=Path, default=Path("runs") / CONFIG)
    parser.add_argument("--json", type=Path, default=RESULTS / f"cpu-digits-{datetime.now(UTC):%Y-%m-%d}.json")
    arguments = parser.parse_args()
    module = " ".join(["digits_demo", *arguments.overrides])
    write_result(arguments.json, module, {}, measure(arguments.run, arguments.overrides))


if __name__ == "__main__":
    main()
