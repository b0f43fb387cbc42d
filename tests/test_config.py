"""Configuration: strict, frozen, overridable, reproducible."""

import pytest
from pydantic import ValidationError

from fastcm.config import load_config, parse_config, shipped_configs
from fastcm.errors import ConfigError

PHASE = "phases: {p: {objective: {kind: edm}, duration_images: 10}}\n"


def write(tmp_path, text, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def message(*overrides, name="digits"):
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    return str(caught.value)


def test_every_shipped_configuration_loads():
    assert {"digits", "edm_cifar10", "ect_cifar10", "ect_cifar10_1hour", "ect_imagenet64_adm", "smoke_cifar10"} <= set(
        shipped_configs()
    )
    for name in shipped_configs():
        assert load_config(name).phases


def test_resolved_yaml_loads_back_to_the_same_configuration(tmp_path):
    config = load_config("ect_cifar10_1hour")
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config
    assert again.hash == config.hash


def test_hash_changes_with_any_value():
    hashes = {load_config("digits", [o]).hash for o in ("seed=1", "seed=2", "phases.tune.optimizer.lr=1e-5", "data.xflip=true")}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("phases.tune.optimizer.learning_rate=1", "phases.tune.optimizer: unknown key 'learning_rate'; known keys: kind, lr"),
        ("phases.tune.objective.qq=2", "phases.tune.objective: unknown key 'qq'; did you mean 'q'?"),
        ("phases.tune.optimizer.lr=fast", "phases.tune.optimizer.lr: Input should be a valid number (got 'fast')"),
        ("phases.tune.optimizer.lr=-1", "phases.tune.optimizer.lr: Input should be greater than 0 (got -1)"),
        ("seed=1.5", "seed: Input should be a valid integer (got 1.5)"),
        ("seed=true", "seed: Input should be a valid integer (got True)"),
        ("phases.tune.batch_size=64.0", "phases.tune.batch_size"),
        ("phases.tune.objective.kind=gan", "does not match any of the expected tags: 'edm', 'ect'"),
        ("phases.tune.microbatch_size=48", "microbatch_size 48 does not divide batch_size"),
        ("phases.tune.emas={}", "phases.tune.emas"),
        ("phases={}", "phases"),
        ("phases.new.batch_size=3", "phases.new.objective: Field required"),
        ("network.channel_mult=[1,a]", "network.channel_mult.1"),
        ("data=3", "data: Input should be a valid dictionary"),
        ("data.kind.x=3", "'kind' is a value, not a section"),
        ("data.path=cifar.tar.gz", "path is 'cifar.tar.gz', but the digits come with the package: set kind"),
        ("network={num_blocks: 1, num_blocks: 2}", "the key 'num_blocks' is given twice"),
        ("seed", "expected key.path=value"),
        ("seed=[1", "not valid YAML"),
        ("phases.tune.optimizer.lr=.inf", "finite"),
        ("phases.tun=null", "phases.tun: Input should be a valid dictionary"),
        ("phases.tune.optimizer.kind.x=null", "override 'phases.tune.optimizer.kind.x=null'"),
        ("phases.tune.optimizer.lr=", "override 'phases.tune.optimizer.lr=': give a value, null to remove"),
    ],
)
def test_wrong_override_is_explained(override, expected):
    assert expected in message(override)


def test_unknown_configuration_names_the_nearest_and_all():
    text = message(name="digit")
    assert "did you mean 'digits'?" in text
    assert "ect_cifar10_1hour" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n", "found list"),
        ("", "found NoneType"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
    ],
)
def test_file_that_is_no_configuration_is_refused(tmp_path, text, expected):
    assert expected in message(name=write(tmp_path, text))


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    text = PHASE.replace("10}", "10, optimizer: {lr: 1e-4}}")
    assert load_config(write(tmp_path, text)).phases["p"].optimizer.lr == 1e-4


def test_base_is_merged_section_by_section_and_null_removes(tmp_path):
    write(tmp_path, PHASE + "seed: 5\ncompute: {tf32: true, dtype: bfloat16}\n", "parent.yaml")
    child = load_config(write(tmp_path, "base: parent.yaml\ncompute: {dtype: null}\nphases: {p: {batch_size: 4}}\n"))
    assert (child.seed, child.compute.tf32, child.compute.dtype) == (5, True, "float32")
    assert (child.phases["p"].batch_size, child.phases["p"].duration_images) == (4, 10)


def test_null_on_the_command_line_removes_a_phase_and_a_value():
    config = load_config("digits", ["phases.tune=null", "phases.pretrain.batch_size=null"])
    assert list(config.phases) == ["pretrain"]
    assert config.phases["pretrain"].batch_size == 128


def test_null_for_an_option_that_is_off_anyway_changes_nothing():
    assert load_config("ctm_digits", ["phases.distill.objective.gan=null"]) == load_config("ctm_digits")


def test_base_of_a_base_is_refused(tmp_path):
    write(tmp_path, "base: digits\n", "parent.yaml")
    assert "one level is allowed" in message(name=write(tmp_path, "base: parent.yaml\n"))


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_words_that_yaml_takes_for_truth_values_can_be_written_plainly(word):
    assert load_config("digits", [f"compute.compile={word}"]).compute.compile == word


def test_configuration_is_frozen():
    config = load_config("digits")
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3


def test_evaluation_needs_the_embedded_digits():
    assert "telemetry.evaluate needs data.kind 'digits'" in message("data.kind=cifar10")


def test_phase_name_that_cannot_be_a_file_name_is_refused():
    with pytest.raises(ConfigError, match="phase name"):
        parse_config({"phases": {"../x": {"objective": {"kind": "edm"}, "duration_images": 1}}}, "test")
