"""The Hugging Face layout, with and without huggingface_hub, and ``fastcm export``."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from integration_cases import SMALL, header_of, images, model_of, write_bundle
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastcm
from fastcm.cli import main
from fastcm.errors import CheckpointError
from fastcm.integrations import HubModel, export_hub, import_hub
from fastcm.io.bundle import load, read_bundle, save_bundle

FILES = {"config.json", "model.safetensors", "README.md"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def bundle(tmp_path):
    """A bundle of a class-conditional model."""
    path = tmp_path / "bundle.safetensors"
    write_bundle(path, header_of(label_dim=5))
    return path


@pytest.fixture
def folder(bundle, tmp_path):
    """The same in the Hugging Face layout."""
    export_hub(bundle, tmp_path / "hub")
    return tmp_path / "hub"


def names(folder):
    return {path.name for path in folder.iterdir()}


def edit_config(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def test_saved_model_comes_back_bit_for_bit(bundle, tmp_path):
    model = HubModel.from_bundle(bundle)
    model.save_pretrained(tmp_path / "saved")
    assert names(tmp_path / "saved") == FILES
    back = HubModel.from_pretrained(tmp_path / "saved")
    expected, x, labels = load(bundle), images(2), torch.tensor([1, 4])
    for other in (model, back):
        assert torch.equal(other(x, 0.7, labels), expected(x, 0.7, labels))
        assert other.sampling == expected.sampling
        assert other.precond == expected.precond
    assert back.header == model.header
    assert not back.training
    assert torch.equal(fastcm.sample(back, 2, seed=3), fastcm.sample(expected, 2, seed=3))


@pytest.mark.parametrize(
    "header",
    [
        header_of({"family": "ddpmpp", "model_channels": 32, "num_blocks": 1}, augment_dim=9),
        header_of({"family": "ncsnpp", "model_channels": 32, "num_blocks": 1}, preconditioner={"kind": "ve"}),
        header_of({"family": "edm2", "model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}),
        header_of(SMALL | {"overrides": {"adaptive_scale": False}}, preconditioner={"kind": "edm"}),
    ],
    ids=lambda header: header.network["family"],
)
def test_every_network_has_this_layout(header, tmp_path):
    expected = model_of(header)
    HubModel(expected, header).save_pretrained(tmp_path)
    back, again = import_hub(tmp_path)
    assert torch.equal(back(images(2), 0.7), expected(images(2), 0.7))
    assert again.preconditioner == header.preconditioner


def test_weights_and_precision_are_those_asked_for(tmp_path):
    averaged, raw = write_bundle(tmp_path / "model.safetensors", header_of())
    for ema, expected in (("", averaged), ("main", averaged), ("net", raw)):
        HubModel.from_bundle(tmp_path, ema=ema).save_pretrained(tmp_path / "out")
        back = HubModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert torch.equal(back.net.out_conv.weight, expected.net.out_conv.weight)
        assert back.header.trained["weights"] == (ema or "main")
        assert back.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no weight average 'best'"):
        HubModel.from_bundle(tmp_path, ema="best")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_as_they_are(folder, dtype):
    stored = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors")
    weights = HubModel.from_pretrained(folder).net.state_dict()
    assert all(weights[name].dtype == torch.float32 for name in stored)
    assert all(torch.equal(weights[name], value.float()) for name, value in stored.items())


def test_files_are_plain_and_those_of_the_mixin(bundle, folder, tmp_path):
    HubModel.from_bundle(bundle).save_pretrained(tmp_path / "mixin")
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "mixin" / name).read_bytes()
    content = json.loads((folder / "config.json").read_text())
    assert content["format"] == 1
    assert content["library_name"] == "fastcm"
    assert content["network"]["family"] == "openai"
    sampling = content["sampling"]
    assert (sampling["sampler"], sampling["mid_sigmas"], sampling["renoise_sigma_min"]) == ("consistency", [0.8], 0.002)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(load(bundle).net.state_dict())


def test_card_says_how_to_use_the_model_and_is_never_overwritten(bundle, folder):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "fastcm"
    assert "HubModel.from_pretrained" in card.text
    assert "16x16 images of 5 classes" in card.text
    (folder / "README.md").write_text("my own words")
    export_hub(bundle, folder)
    HubModel.from_bundle(bundle).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "my own words"


def test_saving_twice_replaces_the_model(bundle, folder):
    HubModel.from_bundle(bundle, ema="net").save_pretrained(folder)
    assert torch.equal(import_hub(folder)[0].net.out_conv.weight, load(bundle, ema="net").net.out_conv.weight)


def test_push_sends_three_files_to_the_repository(bundle, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, **arguments):
            sent["token"] = arguments["token"]

        def create_repo(self, repo_id, private, exist_ok):
            sent["created"] = (repo_id, private, exist_ok)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, folder_path, **arguments):
            sent["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            sent.update({name: arguments[name] for name in ("repo_id", "repo_type", "commit_message")})
            return "the commit"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    model = HubModel.from_bundle(bundle)
    assert model.push_to_hub("someone/small", private=True, token="secret", commit_message="first") == "the commit"
    assert sent["created"] == ("someone/small", True, True)
    assert (sent["repo_id"], sent["repo_type"], sent["commit_message"]) == ("someone/small", "model", "first")
    assert set(sent["files"]) == FILES
    assert sent["token"] == "secret"
    assert not any(b"secret" in content for content in sent["files"].values())


def test_model_is_loaded_from_a_repository(folder, monkeypatch):
    asked = []

    def download(repo_id, name, **options):
        asked.append((repo_id, name, options["revision"]))
        return str(folder / name)

    monkeypatch.setattr("fastcm.integrations.hub.hf_hub_download", download)
    model = HubModel.from_pretrained("someone/small", revision="v1")
    assert asked == [("someone/small", "config.json", "v1"), ("someone/small", "model.safetensors", "v1")]
    assert torch.equal(model(images(1), 1.0), import_hub(folder)[0](images(1), 1.0))


@pytest.mark.parametrize("name", ["someone/small", "no/such/folder", "../nowhere"])
def test_a_repository_that_cannot_be_reached_says_so(name, tmp_path):
    with pytest.raises(CheckpointError, match=f"{name}: no such folder, and config.json could not be fetched"):
        HubModel.from_pretrained(name, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("preconditioner"), "damaged at preconditioner"),
        (lambda config: config.pop("format"), "format is None, this version of fastcm reads format 1"),
        (lambda config: config.update(format=2), "format is 2"),
        (lambda config: config.update(library_name="other"), "library_name is 'other'"),
        (lambda config: config.update(classes=3), "unknown key 'classes'"),
        (lambda config: config.update(emas=["net"]), "unknown key 'emas'"),
        (lambda config: config["sampling"].update(depth=3), "unknown key 'sampling.depth'"),
        (lambda config: config["network"].update(depth=3), "depth"),
        (lambda config: config["network"].update(model_channels=33), "config.json: .*33"),
        (lambda config: config["network"].update(family="resnet"), "resnet|family"),
        (lambda config: config["preconditioner"].update(kind="none"), "none"),
        (lambda config: config["preconditioner"].update(beta=1), "beta"),
        (lambda config: config.update(label_dim="5"), "'label_dim' is '5'"),
        (lambda config: config.update(image_shape=[3, 16]), "image_shape"),
        (lambda config: config.update(label_dim=6), r"model.safetensors: 'map_label.weight' has shape \(128, 5\)"),
    ],
)
def test_a_damaged_config_is_refused_by_key(folder, change, message):
    edit_config(folder, change)
    for read in (import_hub, HubModel.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("out_norm.bias"), "'out_norm.bias' is missing"),
        (lambda tensors: tensors.update(other=torch.zeros(1)), "'other' is not part of this network"),
        (lambda tensors: tensors.update({"out_norm.bias": torch.zeros(2)}), r"'out_norm.bias' has shape \(2,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        HubModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    huge = (2**31).to_bytes(8, "little") + b"{" * 99  # a header of 2 GB, by its own account
    for damaged in (b"", b"[]", content[: len(content) // 2], b"\x00" * 100, huge):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            HubModel.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        HubModel.from_pretrained(folder)


def test_a_pickle_in_place_of_the_weights_is_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which fastcm never reads"):
        HubModel.from_pretrained(folder)


def test_without_huggingface_hub_only_hub_model_is_missing(bundle, tmp_path):
    code = f"""
import sys
sys.modules["huggingface_hub"] = sys.modules["diffusers"] = None
import fastcm, fastcm.integrations as integrations
integrations.export_hub({str(bundle)!r}, "hub")
integrations.import_hub("hub")
from fastcm.errors import ConfigError
try:
    integrations.HubModel
except ConfigError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("HubModel needs the package huggingface_hub: pip install fastcm[hub]"), done.stderr


def test_unknown_integration_is_an_attribute_error():
    import fastcm.integrations

    with pytest.raises(AttributeError, match="no attribute 'HubModels'"):
        fastcm.integrations.HubModels  # noqa: B018


def test_export_command_writes_each_format(bundle, tmp_path, capsys):
    for layout, name in (("hf", "hub"), ("diffusers", "pipe"), ("safetensors", "small.safetensors")):
        main(["export", str(bundle), str(tmp_path / name), "--format", layout, "--ema", "net"])
        assert f"{layout}: {tmp_path / name}" in capsys.readouterr().out
    assert names(tmp_path / "hub") == FILES
    assert names(tmp_path / "pipe") == {"model_index.json", "unet", "scheduler"}
    small = tmp_path / "small.safetensors"
    expected = load(bundle, ema="net")(images(2), 0.7)
    assert torch.equal(load(small)(images(2), 0.7), expected)
    assert not any(name.startswith("ema/") for name in read_bundle(small)[0])
    assert torch.equal(import_hub(tmp_path / "hub")[0](images(2), 0.7), expected)


def test_exported_folder_makes_a_bundle_again(bundle, folder, tmp_path):
    model, header = import_hub(folder)
    save_bundle(tmp_path / "again.safetensors", header, model.net.state_dict(), {})
    assert torch.equal(load(tmp_path / "again.safetensors")(images(1), 1.0), load(bundle)(images(1), 1.0))


def test_export_command_refuses_with_the_documented_exit_codes(bundle, tmp_path, capsys):
    for arguments, code, words in (
        ([bundle, bundle, "--format", "safetensors"], 2, "choose another destination"),
        ([bundle, tmp_path / "x", "--format", "onnx"], 2, "onnx"),
        ([tmp_path / "none", tmp_path / "x", "--format", "hf"], 3, "no such file"),
        ([bundle, tmp_path / "x", "--format", "hf", "--ema", "best"], 3, "no weight average 'best'"),
        ([bundle, bundle, "--format", "hf"], 2, "would overwrite the bundle"),
        ([bundle, bundle, "--format", "openai"], 2, "would overwrite the bundle"),
    ):
        before = bundle.read_bytes()
        with pytest.raises(SystemExit) as ended:
            main(["export", *map(str, arguments)])
        assert ended.value.code == code
        assert words in capsys.readouterr().err
        assert bundle.read_bytes() == before


def test_export_into_the_folder_of_a_run_leaves_its_model_alone(bundle, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(bundle, run / "model.safetensors")
    before = (run / "model.safetensors").read_bytes()
    for form, destination in (("hf", run), ("edm", run / "model.safetensors"), ("safetensors", run / "model.safetensors")):
        with pytest.raises(SystemExit):
            main(["export", str(run), str(destination), "--format", form])
        assert "would overwrite" in capsys.readouterr().err
    assert (run / "model.safetensors").read_bytes() == before
