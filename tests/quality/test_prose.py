"""No file tells where or by whom it was written."""

import re
import shutil
import subprocess

import pytest
from source_tree import ROOT

# In pieces, so that this file does not find itself.
PLACES = [
    "/" + "work/",
    "/" + "root/",
    "/" + "home/[a-z]",
    "shared/" + "(reference|golden|design)",
    r"\bbash" + "_jobs",
    "/" + "tmp/",
]
PEOPLE = [r"\bH-" + "[A-D]\\b", r"\bthe " + "lead\\b", r"\bsub" + "-?agent", r"\bthis " + "session", r"\bcontract" + r"\.md"]
FORBIDDEN = re.compile("|".join(PLACES + PEOPLE))


def tracked_files() -> list[str]:
    """Files in version control and new ones that would enter it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_file_mentions_a_machine_or_a_workplace():
    found = []
    for name in tracked_files():
        data = (ROOT / name).read_bytes()
        if b"\0" not in data[:8192] and not name.endswith(".safetensors"):
            lines = data.decode("utf-8").splitlines()
            found += [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if FORBIDDEN.search(line)]
    assert found == []


@pytest.mark.parametrize(
    "text", ["see /" + "work/main/x.py", "shared/" + "reference/methods.md", "/" + "root/.cache", "as H-" + "C says"]
)
def test_a_mention_is_noticed(text):
    assert FORBIDDEN.search(text)
