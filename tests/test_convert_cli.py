"""``fastcm convert`` and ``fastcm export`` as a user runs them: every published format, options, and what goes wrong."""

import hashlib
import json
import math
import os
import signal
from collections import OrderedDict

import checkpoint_files as files
import pytest
import torch
from convert_cases import EDM_OPTIONS, SOURCES, edm2_training_state, edm_pickle, official_state, state_dict, tensors_file
from golden_cases import load_case
from integration_cases import header_of, write_bundle
from safetensors.torch import load_file, save_file

from fastcm.cli import main
from fastcm.convert import bundle as conversion
from fastcm.convert.options import PRESETS
from fastcm.io.bundle import load, read_bundle


@pytest.fixture
def run(capsys):
    """The command line in this process: what it prints; an error raises SystemExit."""

    def run(*arguments) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    """The command line in this process: its exit code and what it says."""

    def run(*arguments) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code, capsys.readouterr().err

    return run


def convert(run, source, path):
    return run("convert", source.write(path / "source"), path / "bundle.safetensors", *source.options)


@pytest.mark.parametrize("name", SOURCES)
def test_bundle_of_every_format_computes_the_official_images(name, run, tmp_path):
    source = SOURCES[name]
    said = convert(run, source, tmp_path)
    with torch.no_grad():
        source.check(load_case(source.case), load(tmp_path / "bundle.safetensors"))
    for words in source.says:
        assert words in said
    assert "bit for bit" in said
    assert "guess:" not in said or "state dict" in said or "log variance" in said
    assert sorted(os.listdir(tmp_path)) == ["bundle.safetensors", "source"]


EXPORTED = {name: source for name, source in SOURCES.items() if "weights" not in name and "training form" not in name}


@pytest.mark.parametrize("name", EXPORTED)
def test_export_gives_the_original_tensors_bit_for_bit(name, run, tmp_path):
    source = EXPORTED[name]
    convert(run, source, tmp_path)
    layout = read_bundle(tmp_path / "bundle.safetensors")[1].trained["source"]["layout"]["name"]
    run("export", tmp_path / "bundle.safetensors", tmp_path / "out.safetensors", "--format", layout)
    exported, original = load_file(tmp_path / "out.safetensors"), official_state(source.case)
    if name == "EDM state dict without model.":
        original = {key.removeprefix("model."): value for key, value in original.items()}
    if name == "EDM2 without log variance":
        original = {key: value for key, value in original.items() if not key.startswith("logvar")}
    if name == "EDM2 fp16":
        original = {key: value.half() for key, value in original.items()}
    assert exported.keys() == original.keys()
    for key, value in original.items():
        assert exported[key].dtype == value.dtype
        assert torch.equal(exported[key], value), key


@pytest.mark.parametrize(
    "name", ["ECT pickle", "EDM pickle A_VEPrecond", "EDM2 G_net_uncond", "OpenAI E_unet_cond", "CTM on CIFAR-10"]
)
def test_info_and_sample_work_on_a_converted_bundle(name, run, tmp_path):
    convert(run, SOURCES[name], tmp_path)
    bundle = tmp_path / "bundle.safetensors"
    source = json.loads(run("info", bundle))["trained"]["source"]
    assert source["file"] == "source"
    assert source["sha256"] == hashlib.sha256((tmp_path / "source").read_bytes()).hexdigest()
    run("sample", bundle, "--num", 1, "--steps", 2, "--device", "cpu", "--out", tmp_path / "images.npz")
    assert (tmp_path / "images.npz").is_file()


def test_presets_are_listed_without_other_arguments(run):
    listed = run("convert", "--list-presets")
    assert "between steps 1.382" in listed
    assert all(name in listed for name in PRESETS)


def changed(name, change):
    """A writer of a case's state dict after a change of it."""

    def write(path):
        state = official_state(name)
        change(state)
        return files.write_state_dict(path, state)

    return write


def without(key):
    return lambda state: state.pop(key)


def added(state):
    state["model.enc.extra.weight"] = torch.zeros(1)


def openai_added(state):
    state["label_emb.bias"] = torch.zeros(1)


def edm2_added(state):
    state["unet.enc.8x8_down.extra.weight"] = torch.zeros(1)


def reshaped(key):
    return lambda state: state.update({key: state[key][:1]})


def damaged(key, value):
    return lambda state: state.update({key: torch.full_like(state[key], value)})


def wide(state):
    state |= {f"out.2.{leaf}": torch.cat([state[f"out.2.{leaf}"]] * 2) for leaf in ("weight", "bias")}


HEADS = ("--channels-per-head", "16")
EDM_KEY, OPENAI_KEY, EDM2_KEY = (
    "model.enc.32x32_block0.conv1.bias",
    "middle_block.0.in_layers.2.bias",
    "unet.enc.8x8_down.conv_res0.weight",
)
KIM_KEY, SONY_KEY = "model.map_layer0_s.weight", "time_embed_s.0.weight"
KIM_ADDEND, SONY_ADDEND = "model.dec.16x16_block0.affine_s.bias", "input_blocks.1.0.emb_layers_s.1.bias"
IDDPM = ("--preconditioner", "iddpm")


@pytest.mark.parametrize(
    ("case", "change", "options", "message"),
    [
        ("A_ddpmpp_uncond", without(EDM_KEY), (), f"lacks {EDM_KEY.removeprefix('model.')}"),
        ("E_unet_uncond", without(OPENAI_KEY), HEADS, f"lacks {OPENAI_KEY}"),
        ("G_net_uncond", without(EDM2_KEY), HEADS, f"lacks {EDM2_KEY}"),
        ("G_net_uncond", without("unet.out_gain"), HEADS, "lacks unet.out_gain"),
        ("A_ddpmpp_uncond", added, (), "has enc.extra.weight, which this network lacks"),
        ("E_unet_uncond", openai_added, HEADS, "has label_emb.bias, which this network lacks"),
        ("G_net_uncond", edm2_added, HEADS, "has unet.enc.8x8_down.extra.weight, which this network lacks"),
        ("F_kim_net", without(KIM_ADDEND), (), f"lacks {KIM_ADDEND.removeprefix('model.')}"),
        ("F_sony_net", without(SONY_ADDEND), HEADS, f"lacks {SONY_ADDEND}"),
        ("F_kim_net", added, (), "has enc.extra.weight, which this network lacks"),
        ("F_sony_net", openai_added, HEADS, "has label_emb.bias, which this network lacks"),
        ("F_kim_net", reshaped(KIM_KEY), (), f"{KIM_KEY.removeprefix('model.')} has shape (1, 16), but"),
        ("F_sony_net", reshaped(SONY_KEY), HEADS, f"{SONY_KEY} has shape (1, 32), but"),
        ("E_unet_uncond", reshaped(OPENAI_KEY), HEADS, f"{OPENAI_KEY} has shape (1,), but"),
        ("A_ddpmpp_uncond", reshaped(EDM_KEY), (), f"{EDM_KEY.removeprefix('model.')} has shape (1,), but"),
        ("G_net_uncond", reshaped(EDM2_KEY), HEADS, f"{EDM2_KEY} has shape (1, 16, 3, 3), but"),
        ("A_ddpmpp_uncond", damaged(EDM_KEY, math.nan), (), f"{EDM_KEY} has values that are NaN"),
        ("E_unet_uncond", damaged(OPENAI_KEY, math.inf), HEADS, f"{OPENAI_KEY} has values that are infinite"),
        ("A_iDDPMPrecond", damaged("u", 1.0), (), "u is not the table of noise levels of IDDPM"),
        ("E_unet_uncond", wide, HEADS, "do not tell its scalings: give --preconditioner, iddpm where"),
        ("A_iDDPMPrecond", dict, EDM_OPTIONS, "preconditioner was given as edm, but its iDDPMPrecond is iddpm"),
        ("A_VPPrecond", dict, IDDPM, "3 output channels for 3 of the image, but under the preconditioner iddpm"),
        ("E_unet_uncond", dict, (*HEADS, *IDDPM), "iddpm it would have 6; give another --preconditioner"),
        ("G_net_uncond", dict, (*HEADS, *IDDPM), "under the preconditioner iddpm it would have"),
        ("A_ddpmpp_uncond", dict, ("--label-dim", "10"), "label_dim was given as 10, but by its embedding"),
        ("A_ddpmpp_uncond", dict, ("--resolution", "64"), "resolution was given as 64, but by the names"),
        ("E_unet_uncond", dict, (*HEADS, "--resolution", "15"), "2 levels, but 15 pixels"),
        ("E_unet_uncond", dict, (), "32 channels wide, no multiple of channels_per_head 64; give --channels-per-head"),
        ("E_unet_uncond", dict, ("--heads", "3"), "do not divide into 3 attention heads"),
        ("A_ddpmpp_uncond", dict, ("--heads", "2"), "--heads was given, but EDM's networks have one head"),
        ("A_ddpmpp_uncond", dict, ("--sampler", "trajectory"), "no second time and cannot jump"),
        ("E_unet_uncond", dict, (*HEADS, "--resolution", "4096"), "--resolution 4096: the lowest of its 2 levels would have"),
        ("E_unet_uncond", dict, ("--sigma-data", "nan"), "--sigma-data: expected a finite number above 0, got nan"),
        ("E_unet_uncond", dict, ("--sigma-data", "inf"), "--sigma-data: expected a finite number above 0, got inf"),
        ("E_unet_uncond", dict, ("--sigma-min", "nan"), "--sigma-min: expected a finite number above 0, got nan"),
        ("E_unet_uncond", dict, ("--heads", "2", *HEADS), "--heads was given beside --channels-per-head"),
        ("E_unet_uncond", dict, ("--heads-up", "2"), "--heads-up was given without --heads"),
        ("E_unet_uncond", dict, (*HEADS, "--preconditioner", "edm", "--sigma-min", "0.01"), "--sigma-min was given, but"),
        ("E_unet_uncond", dict, (*HEADS, "--preconditioner", "edm", "--mid-sigma", "1"), "--mid-sigma was given, but"),
        ("E_unet_uncond", dict, (*HEADS, "--mid-sigma", "1", "--mid-sigma", "2"), "must descend"),
        ("A_ddpmpp_uncond", dict, ("--outer", "euler"), "--outer was given, but this network has no second time"),
        ("A_ddpmpp_uncond", dict, ("--qkv", "plain"), "--qkv was given, but EDM's networks"),
        ("G_net_uncond", dict, ("--heads", "1"), "--heads was given, but EDM2's networks"),
        ("E_unet_uncond", dict, ("--preset", "cd_imagenet64_l3"), "there is none called 'cd_imagenet64_l3'; choose one of"),
        ("E_unet_uncond", dict, ("--preset", "ct_imagenet64", *HEADS), "label_dim was given as 1000, but"),
        ("E_unet_uncond", dict, ("--preset", "ctm_imagenet64", *HEADS), "has no second time, but the preset is for"),
        ("F_sony_net", dict, ("--preset", "ct_imagenet64", *HEADS), "has a second time, but the preset is for"),
        ("A_ddpmpp_uncond", dict, ("--preset", "ct_imagenet64"), "layout 'openai', but this one has the layout 'edm'"),
        ("F_kim_net", dict, ("--preset", "ctm_cifar10_uncond"), "label_dim was given as 0, but"),
        ("A_ddpmpp_uncond", dict, ("--weights", "ema"), "no weights 'ema'; choose one with --weights: (one without a name)"),
    ],
)  # fmt: skip
def test_checkpoint_that_does_not_fit_is_an_error_that_names_file_and_key(case, change, options, message, fails, tmp_path):
    path, bundle = changed(case, change)(tmp_path / "wrong.pt"), tmp_path / "bundle.safetensors"
    bundle.write_bytes(b"an earlier one")
    code, said = fails("convert", path, bundle, *options)
    assert message in said
    assert str(path) in said or message.startswith(("--preset", "--sigma")) or "none called" in message
    usage = ("was given, but", "--heads", "none called", "--sigma", "--resolution")
    assert code == (2 if any(words in message for words in usage) else code)
    assert code in (2, 3)
    assert bundle.read_bytes() == b"an earlier one"
    assert sorted(os.listdir(tmp_path)) == ["bundle.safetensors", "wrong.pt"]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"class_name": "FlowPrecond"}, (), "its network is in a FlowPrecond, which is none of EDMPrecond"),
        ({}, ("--preconditioner", "vp"), "preconditioner was given as vp, but its EDMPrecond is edm"),
        ({}, ("--sigma-data", "1"), "sigma_data was given as 1.0, but by its EDMPrecond it is 0.5"),
        ({}, IDDPM, "preconditioner was given as iddpm, but its EDMPrecond is edm"),
        ({"class_name": "iDDPMPrecond"}, (), "but under the preconditioner iddpm it would have 6\n"),
        ({}, ("--weights", "net"), "no weights 'net'; choose one with --weights: ema"),
        ({"arguments": {"sigma_data": "half"}}, (), "sigma_data of its EDMPrecond is a str, expected a number"),
        ({"arguments": {"label_dim": 5}}, (), "its EDMPrecond says label_dim 5, but its tensors are of 0"),
        ({"arguments": {"img_resolution": 64}}, (), "says img_resolution 64, but its tensors are of 32"),
    ],
)
def test_object_that_contradicts_its_tensors_or_the_options_is_an_error(changes, options, message, fails, tmp_path):
    path = edm_pickle("A_ddpmpp_uncond", **changes)(tmp_path / "wrong.pkl")
    code, said = fails("convert", path, tmp_path / "bundle.safetensors", *options)
    assert code == 3
    assert f"{path}: " in said
    assert message in said


OPTIMIZER = {"state": {}, "param_groups": []}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: files.write_torch(path, OPTIMIZER), "the state of an optimizer; give the file of the model"),
        (lambda path: files.write_state_dict(path, {"disc.weight": torch.zeros(1)}), "(disc.weight, ..) are of no network"),
        (lambda path: files.write_torch(path, {"a": 1}), "no network and no state dict, but a dict with 'a'"),
        (lambda path: files.write_torch(path, [1]), "no network and no state dict, but a list"),
        (lambda path: save_file({"down_blocks.0": torch.zeros(1)}, path), "those of diffusers: give the folder"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
        (lambda path: path.write_bytes((99).to_bytes(8, "little") + b"{"), "damaged or cut short"),
        (lambda path: path.write_bytes((2**31).to_bytes(8, "little") + b"{" * 99), "damaged or cut short"),
        (lambda path: path.mkdir(), "no model_index.json"),
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(edm_pickle("A_VPPrecond")(path).read_bytes()[:-999]), "cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(state_dict("A_VPPrecond")(path).read_bytes()[:-999]), "cannot be read as a checkpoint"),
        (edm2_training_state("G_net_uncond"), "several sets of weights; choose one with --weights: net, 0.05, 0.1"),
    ],
)
def test_other_files_are_an_error_that_says_what_they_are(write, message, fails, tmp_path):
    path = tmp_path / "other.pt"
    write(path)
    code, said = fails("convert", path, tmp_path / "bundle.safetensors")
    assert code == 3
    assert str(path) in said
    assert message in said


def test_bundles_and_run_folders_need_no_conversion(run, fails, tmp_path):
    convert(run, SOURCES["EDM pickle A_VPPrecond"], tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "bundle.safetensors").rename(folder / "model.safetensors")
    for path in (folder, folder / "model.safetensors"):
        code, said = fails("convert", path, tmp_path / "again.safetensors")
        assert (code, "there is nothing to convert" in said) == (3, True)
    code, said = fails("convert", tmp_path / "source", tmp_path / "source")
    assert (code, "needs a file of its own" in said) == (2, True)


@pytest.mark.parametrize("config", ["{broken", "[1]", "{}"])
def test_a_config_of_something_else_beside_the_file_does_not_matter(run, tmp_path, config):
    source = edm_pickle("A_VPPrecond")(tmp_path / "source")
    beside = tmp_path / "folder"
    beside.mkdir()
    source.rename(beside / "model.safetensors")
    (beside / "config.json").write_text(config)
    run("convert", beside / "model.safetensors", tmp_path / "bundle.safetensors")


def test_conversion_that_is_terminated_leaves_no_unfinished_file(fails, tmp_path, monkeypatch):
    former = signal.signal(signal.SIGTERM, lambda *_: None)  # so that without the change the test fails and no more
    mine = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(conversion, "check_bundle", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    source = edm_pickle("A_VPPrecond")(tmp_path / "source")
    try:
        code, _ = fails("convert", source, tmp_path / "bundle.safetensors")
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, former)
    assert code == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == ["source"]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("place", ["top", "beside", "within"])
def test_hostile_file_has_no_effect(form, place, fails, tmp_path):
    hostile, state = Hostile(tmp_path / "canary"), files.named(official_state("A_VPPrecond"))
    module = files.persistent_module(official_state("A_VPPrecond"), "VPPrecond")
    module._modules["model"].attribute = hostile
    content = {"top": hostile, "beside": OrderedDict(ema=state, loss_fn=hostile), "within": {"ema": module}}[place]
    path = files.write_as(form, tmp_path / "hostile", content)
    code, said = fails("convert", path, tmp_path / "bundle.safetensors")
    assert code == 3
    assert "mkdir, which is none of the known classes; nothing was executed" in said
    assert os.listdir(tmp_path) == ["hostile"]


@pytest.mark.parametrize("verb", ["info", "sample", "evaluate", "likelihood", "export"])
@pytest.mark.parametrize("kind", ["hf", "diffusers", "diffusers/unet"])
def test_folder_of_others_is_refused_with_the_command_that_makes_a_bundle_of_it(kind, verb, run, fails, tmp_path):
    write_bundle(tmp_path / "bundle", header_of())
    run("export", tmp_path / "bundle", tmp_path / kind.split("/")[0], "--format", kind.split("/")[0])
    options = (tmp_path / "out", "--format", "hf") if verb == "export" else ()
    code, said = fails(verb, tmp_path / kind, *options)
    assert code == 3
    assert said.count("\n") == 1
    folder, command = said.removeprefix("fastcm: error: ").strip().split(": a folder of diffusers or Hugging Face")
    assert folder == str(tmp_path / kind)
    arguments = command.partition(" fastcm ")[2].split()
    assert run(*arguments[:2], tmp_path / arguments[2]).startswith("found: ")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("hf", "model.safetensors"), ("hf", "config.json"), ("diffusers", "unet/diffusion_pytorch_model.safetensors")],
)
def test_file_of_a_folder_of_others_is_refused_with_the_folder_to_give(kind, name, run, fails, tmp_path):
    write_bundle(tmp_path / "bundle", header_of())
    run("export", tmp_path / "bundle", tmp_path / kind, "--format", kind)
    file = tmp_path / kind / name
    code, said = fails("convert", file, tmp_path / "again.safetensors")
    assert code == 3
    assert f"{file}: only all files of its folder tell the model: give the folder itself, {file.parent}\n" in said
    assert run("convert", file.parent, tmp_path / "again.safetensors").startswith("found: ")


@pytest.mark.parametrize("name", ["state.pt", "state.pkl", "state.safetensors"])
def test_checkpoint_in_place_of_a_bundle_is_refused_with_a_word_on_convert(name, fails, tmp_path):
    write = {"pt": state_dict, "pkl": edm_pickle, "safetensors": tensors_file}[name.partition(".")[2]]
    code, said = fails("info", write("A_VPPrecond")(tmp_path / name))
    assert code == 3
    assert f"{tmp_path / name}: " in said
    assert "'fastcm convert' makes bundles of other projects'" in said


def test_bundle_beside_a_foreign_config_is_loaded(run, tmp_path):
    write_bundle(tmp_path / "model.safetensors", header_of())
    (tmp_path / "config.json").write_text("{}")
    assert json.loads(run("info", tmp_path))["file"] == str(tmp_path / "model.safetensors")
