"""What the command line says of itself, and how it ends when it is misused.

FASTCM_UPDATE_SNAPSHOTS=1 writes the files in help/ anew; read the difference before you commit it.
"""

import os
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastcm.cli import cli, main

HELP = Path(__file__).parent / "help"
UPDATE = "FASTCM_UPDATE_SNAPSHOTS"
BELOW = [f"{name} {verb}" for name, command in cli.commands.items() for verb in getattr(command, "commands", ())]
PAGES = ["fastcm", *cli.commands, *BELOW]


def page(name: str) -> str:
    verb = [] if name == "fastcm" else name.split()
    done = CliRunner().invoke(cli, [*verb, "--help"], prog_name="fastcm", terminal_width=100)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("name", PAGES)
def test_help_is_the_recorded_one(name):
    file = HELP / f"{name.replace(' ', '-')}.txt"
    if os.environ.get(UPDATE) == "1":
        file.write_text(page(name), encoding="utf-8")
    # Word by word: click's releases break lines differently.
    assert page(name).split() == file.read_text(encoding="utf-8").split(), f"if this is meant, run again with {UPDATE}=1"


def test_every_recorded_page_has_a_verb():
    assert {file.stem for file in HELP.glob("*.txt")} == {name.replace(" ", "-") for name in PAGES}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "trian"),
        (["train"], "CONFIG"),
        (["train", "digits", "--dry"], "--dry"),
        (["train", "digit", "--dry-run"], "did you mean 'digits'"),
        (["train", "digits", "seeed=1", "--dry-run"], "did you mean 'seed'"),
        (["train", "digits", "data.kind=pictures", "--dry-run"], "data.kind"),
        (["train", "digits", "seed", "--dry-run"], "key.path=value"),
        (["sample", "model.safetensors", "--num", "0"], "--num"),
        (["sample", "model.safetensors", "--device", "tpu"], "--device"),
        (["evaluate"], "MODEL"),
    ],
)
def test_misuse_ends_with_exit_code_2_and_says_why(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert words in output.err
    assert output.out == ""
    assert "Traceback" not in output.err


def test_the_console_script_is_main():
    (script,) = entry_points(group="console_scripts", name="fastcm")
    assert script.load() is main
