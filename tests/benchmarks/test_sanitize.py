"""Every kernel is launched by the script, which runs in Triton's interpreter; what the tools say is read as they print it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sanitize
from benchmarks.sanitize import check, kernel_names

ROOT = Path(__file__).parents[2]

TOOL = """#!/bin/sh
echo "$@" >> {log}
echo "cache $PYTORCH_NO_CUDA_MEMORY_CACHING"
case "$2" in
memcheck) echo "========= ERROR SUMMARY: {memory} errors" ;;
racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
esac
exit {code}
"""


def tool_in(folder, memory=0, code=0):
    path = folder / "compute-sanitizer"
    path.write_text(TOOL.format(log=folder / "log", memory=memory, code=code))
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_every_kernel_runs_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.sanitize", "--launch"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    launched = done.stdout.splitlines()[-1].removeprefix("sanitize: launched ").split(", ")
    assert set(launched) == kernel_names()


def test_the_kernels_are_those_of_the_sources():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py")]
    assert len(kernel_names()) > 15
    assert {"forward_kernel", "online_jvp_kernel", "add_noise_kernel", "update_kernel"} <= kernel_names()
    assert all(any(f"def {name}(" in text for text in sources) for name in kernel_names())


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_a_clean_run_counts_no_errors(tool, tmp_path):
    found = check(tool, str(tool_in(tmp_path)), 60)
    assert (found["code"], found["errors"], found["clean"]) == (0, 0, True)
    assert f"--tool {tool}" in (tmp_path / "log").read_text()
    assert "cache 1" in found["output"]


@pytest.mark.parametrize(("memory", "code"), [(3, 9), (0, 9), (3, 0)])
def test_errors_and_codes_are_not_clean(memory, code, tmp_path):
    found = check("memcheck", str(tool_in(tmp_path, memory, code)), 60)
    assert (found["errors"], found["clean"]) == (memory, False)


def test_a_tool_that_counts_nothing_or_hangs_is_not_clean(tmp_path):
    path = tool_in(tmp_path)
    path.write_text("#!/bin/sh\necho Device not supported\n")
    assert (check("memcheck", str(path), 60)["errors"], check("memcheck", str(path), 60)["clean"]) == (None, False)
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    found = check("memcheck", str(path), 0.5)
    assert (found["code"], found["clean"]) == (None, False)
    assert "stopped after" in found["output"]


@pytest.mark.parametrize("present", [False, True])
def test_without_the_program_or_a_gpu_it_says_so(present, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize"])
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: str(tool_in(tmp_path)) if present else None)
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        sanitize.main()
    assert ended.value.code == 2
    assert ("no CUDA device" if present else "compute-sanitizer is not on the PATH") in capsys.readouterr().err


@pytest.mark.parametrize("memory", [0, 2])
def test_the_file_counts_the_tools_that_failed(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanitize", "--json", str(tmp_path / "r.json")])
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: str(tool_in(tmp_path, memory)))
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "environment", lambda device: {})
    with pytest.raises(SystemExit) as ended:
        sanitize.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert (bool(ended.value.code), result["failed"]) == (memory > 0, int(memory > 0))
    assert set(result["tools"]) == {"memcheck", "racecheck"}
