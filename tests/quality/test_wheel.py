"""What is built and installed: one package, complete, with sane metadata."""

import email
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from source_tree import ROOT

PACKAGES = {"fastcm": "fastcm", "kernels": "fastcm/kernels", "configs": "fastcm/configs"}
INPUTS = (*PACKAGES, "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A wheel of a copy of the sources: building must leave nothing behind in the checkout."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def names(built) -> set[str]:
    return set(zipfile.ZipFile(built).namelist())


@pytest.fixture(scope="module")
def metadata(built, names) -> Message:
    (name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(zipfile.ZipFile(built).read(name))


def test_fastcm_is_the_only_top_level_package(names):
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastcm"}


def test_wheel_holds_every_file_of_the_packages_and_no_other(names):
    expected = set()
    for folder, package in PACKAGES.items():
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        expected |= {f"{package}/{path.as_posix()}" for path in files if path.suffix != ".pyc" and path.name[0] != "."}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_wheel_holds_what_is_no_python_code(names):
    assert {"fastcm/train/report.html", "fastcm/configs/digits.yaml", "fastcm/kernels/philox/reference.py"} <= names


def test_metadata_says_what_it_must(metadata):
    assert metadata["Name"] == "fastcm"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Summary"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# fastcm")


def test_license_is_apache_2_as_an_spdx_expression_with_its_text(metadata, names):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/LICENSE") for name in names)
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_torch_and_python_versions_are_bounded(metadata):
    (torch,) = [line for line in metadata.get_all("Requires-Dist") if line.startswith(("torch<", "torch>"))]
    assert "<" in torch
    assert ">=" in torch


def test_version_is_that_of_the_package(metadata):
    import fastcm

    assert metadata["Version"] == fastcm.__version__


def test_installed_wheel_works_away_from_the_checkout(built, tmp_path):
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    code += "import fastcm.kernels.philox, fastcm.cli, fastcm.config, importlib.util\n"
    code += "assert importlib.util.find_spec('kernels') is None\n"
    code += "print(fastcm.kernels.philox.__file__); fastcm.cli.main(['train', 'digits', '--dry-run'])"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site" / "fastcm" / "kernels"))
    assert "phases:" in done.stdout
