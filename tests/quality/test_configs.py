"""Every shipped configuration is short, names its source, loads, builds and prints what loads back."""

import re

import pytest
import torch
import yaml
from click.testing import CliRunner
from source_tree import ROOT

from fastcm.cli import cli
from fastcm.config import Config, load_config, shipped_configs
from fastcm.nn.build import build_network
from fastcm.train.build import build_objective, sampling_form

FILES = sorted((ROOT / "configs").glob("*.yaml"))
MAX_LINES = 40
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})\b")
OWN_RECIPES = {"digits": "scikit-learn"}  # these follow no paper; their comment says where the images come from

every_config = pytest.mark.parametrize("name", [path.stem for path in FILES])


def dry_run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["train", *arguments, "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_file_is_shipped():
    assert shipped_configs() == [path.stem for path in FILES]


@every_config
def test_config_is_short_and_names_its_source(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    comments = " ".join(line.partition("#")[2] for line in text.splitlines())
    assert len(text.splitlines()) <= MAX_LINES
    assert ARXIV.search(comments) or OWN_RECIPES.get(name, "no source") in comments


@every_config
def test_dry_run_prints_a_configuration_that_loads_back_equal(name, tmp_path):
    printed = tmp_path / "printed.yaml"
    printed.write_text(dry_run(name), encoding="utf-8")
    assert load_config(str(printed)) == load_config(name)
    assert dry_run(str(printed)) == dry_run(name)


@every_config
def test_config_builds_its_network_and_objectives(name):
    config = load_config(name)
    resolution = config.data.resolution or 8
    for phase in config.phases.values():
        objective = build_objective(phase.objective)
        assert all(isinstance(value, float) for value in objective.schedule(0).values())
        sampling_form(phase.objective)
        with torch.device("meta"):
            net = build_network(
                config.network, (3, resolution, resolution), 10 * config.data.conditional, 9 * bool(phase.augment), 0.1
            )
        assert sum(parameter.numel() for parameter in net.parameters()) > 10_000


@every_config
def test_an_override_changes_value_and_hash(name):
    config = load_config(name, ["seed=7"])
    assert config.seed == 7
    assert config.hash != load_config(name).hash
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_the_installed_command_dry_runs(fastcm_cli):
    done = fastcm_cli("train", "ect_cifar10_1hour", "phases.tune.init=edm.safetensors", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "edm.safetensors" in done.stdout
