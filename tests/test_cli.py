"""The command line: what each verb writes, and how it fails."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import fastcm
from fastcm.cli import cli, main
from fastcm.io.bundle import BundleHeader, save_bundle
from fastcm.io.images import to_uint8
from fastcm.io.tensors import read_tensors, write_tensors
from fastcm.model import SamplingDefaults
from fastcm.nn.unet import UNet
from fastcm.sampling.generate import SAMPLERS, SamplerOptions

NETWORK = {"family": "ddpmpp", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


def write_bundle(path, *, label_dim=0, sampler="consistency", kind="edm_boundary", data="digits"):
    """A bundle of a random tiny network; the average differs from the raw weights."""
    net = UNet("ddpmpp", 8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), label_dim=label_dim)
    state = net.init_weights(3).state_dict()
    state = {name: value + 0.02 * torch.sin(torch.arange(value.numel())).reshape(value.shape) for name, value in state.items()}
    header = BundleHeader(
        network=NETWORK,
        image_shape=(1, 8, 8),
        label_dim=label_dim,
        augment_dim=0,
        preconditioner={"kind": kind},
        sampling=SamplingDefaults(sampler, (0.8,) if sampler == "consistency" else ()),
        emas=("main", "other"),
        trained={"phase": "tune", "images": 5, "data": data},
    )
    emas = {
        "main": {name: value * 0.9 for name, value in state.items()},
        "other": {name: value * 0.8 for name, value in state.items()},
    }
    save_bundle(path, header, state, emas)
    return path


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "model.safetensors")


def sampled(fastcm_cli, tmp_path, *arguments, name="out.npz"):
    run = fastcm_cli("sample", "model.safetensors", "--out", name, *arguments)
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / name) as file:
        return file["images"]


def test_sample_writes_a_grid(fastcm_cli, tmp_path, bundle):
    assert fastcm_cli("sample", bundle, "--num", "9", "--out", "grid.png").returncode == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (100, 100)  # three by three images of eight pixels, enlarged four times, and two lines


def test_sample_writes_a_folder_and_an_npz_of_the_same_images(fastcm_cli, tmp_path, bundle):
    images = sampled(fastcm_cli, tmp_path, "--num", "5")
    assert images.shape == (5, 8, 8, 1)
    assert images.dtype == np.uint8
    assert fastcm_cli("sample", bundle, "--num", "5", "--out", "folder").returncode == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [f"{i:06d}.png" for i in range(5)]
    for number, expected in enumerate(images):
        with Image.open(tmp_path / "folder" / f"{number:06d}.png") as image:
            assert np.array_equal(np.asarray(image), expected[..., 0])


def test_seed_names_the_same_images_at_any_batch_size(fastcm_cli, tmp_path, bundle):
    whole = sampled(fastcm_cli, tmp_path, "--num", "7", "--seed", "5", "--steps", "2")
    for batch_size in ("3", str(2**64)):
        parts = sampled(fastcm_cli, tmp_path, "--num", "7", "--seed", "5", "--steps", "2", "--batch-size", batch_size)
        assert np.abs(whole.astype(int) - parts).max() <= 1
    other = sampled(fastcm_cli, tmp_path, "--num", "7", "--seed", "6", "--steps", "2")
    assert np.abs(whole.astype(int) - other).max() > 10


def test_accelerate_on_a_cpu_is_an_error(fastcm_cli, bundle):
    run = fastcm_cli("sample", bundle, "--accelerate")
    assert run.returncode == 2
    assert "accelerate: nothing to do for a model on cpu; use a GPU" in run.stderr


@pytest.mark.gpu
def test_accelerate_gives_the_same_images(fastcm_cli, tmp_path, bundle):
    images = sampled(fastcm_cli, tmp_path, "--num", "4")
    run = fastcm_cli("sample", bundle, "--num", "4", "--accelerate", "--out", "fast.npz", CUDA_VISIBLE_DEVICES="0")
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / "fast.npz") as file:
        assert np.abs(images.astype(int) - file["images"]).max() <= 1


def test_steps_mid_sigma_and_average_change_the_images(fastcm_cli, tmp_path, bundle):
    variants = [
        ["--steps", "1"],
        ["--steps", "2"],
        ["--steps", "2", "--mid-sigma", "2.5"],
        ["--ema", "other"],
        ["--ema", "net"],
    ]
    images = [sampled(fastcm_cli, tmp_path, "--num", "3", *variant).tobytes() for variant in variants]
    assert len(set(images)) == len(variants)


def test_sampler_and_its_constants_change_the_images(tmp_path):
    write_bundle(tmp_path / "model.safetensors", sampler="heun", kind="edm")
    variants = [
        [],
        ["--s-churn", "2", "--s-tmin", "0.05", "--s-tmax", "50", "--s-noise", "1.1"],
        ["--sampler", "dpm"],
        ["--sampler", "dpm", "--s-churn", "2", "--midpoint-rho", "3"],
        ["--sampler", "ancestral"],
        ["--sampler", "ancestral", "--eta", "0.5"],
    ]
    images = []
    for variant in variants:
        out = tmp_path / "out.npz"
        main(["sample", str(tmp_path / "model.safetensors"), "--num", "3", "--steps", "4", "--out", str(out), *variant])
        with np.load(out) as file:
            images.append(file["images"])
    assert len({batch.tobytes() for batch in images}) == len(variants)
    model, options = fastcm.load(tmp_path / "model.safetensors"), {"s_churn": 2.0, "midpoint_rho": 3.0}
    same = to_uint8(fastcm.sample(model, 3, 4, sampler="dpm", **options))
    assert np.abs(images[3].astype(int) - same).max() <= 1


def test_the_command_line_offers_every_sampler_and_constant():
    offered = {option.name: option for option in cli.commands["sample"].params}
    assert list(offered["sampler"].type.choices) == list(SAMPLERS)
    assert {name for sampler in SAMPLERS.values() for name in sampler.options} == set(SamplerOptions.__annotations__)
    assert SamplerOptions.__annotations__.keys() <= offered.keys()


def test_label_selects_the_class(fastcm_cli, tmp_path):
    write_bundle(tmp_path / "model.safetensors", label_dim=10)
    one, two = (sampled(fastcm_cli, tmp_path, "--num", "4", "--label", str(label)) for label in (1, 2))
    assert not np.array_equal(one, two)
    with np.load(tmp_path / "out.npz") as file:
        assert file["labels"].tolist() == [2, 2, 2, 2]


def test_random_classes_are_written_beside_the_images(fastcm_cli, tmp_path):
    write_bundle(tmp_path / "model.safetensors", label_dim=10)
    sampled(fastcm_cli, tmp_path, "--num", "20")
    with np.load(tmp_path / "out.npz") as file:
        assert len(set(file["labels"].tolist())) > 3


def test_file_in_the_way_is_a_clear_error(fastcm_cli, tmp_path, bundle):
    (tmp_path / "afile").write_text("")
    failed = fastcm_cli("sample", bundle, "--out", "afile/x.png")
    assert failed.returncode == 3
    assert "cannot write afile/x.png" in failed.stderr


OUTPUTS = [
    ["sample", "nowhere", "--out", "{}/taken.png"],
    ["sample", "nowhere", "--out", "{}/file"],
    ["sample", "nowhere", "--out", "{}/file/grid.png"],
    ["likelihood", "nowhere", "--json", "{}/taken.png"],
    ["bench", "kernels", "--json", "{}/file/rows.json"],
    ["convert", "nowhere", "{}/taken.png"],
    ["ema", "nowhere", "--std", "0.1", "--out", "{}/taken.png"],
]


@pytest.mark.parametrize("arguments", OUTPUTS, ids=lambda arguments: " ".join(arguments))
def test_output_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, arguments):
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as ended:
        main([argument.format(tmp_path) for argument in arguments])
    assert ended.value.code == 3
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--label", "1"], 2, "no classes"),
        (["--steps", "3", "--mid-sigma", "1.0"], 2, "mid_sigmas"),
        (["--eta", "0.5"], 2, "eta: the consistency sampler has no such option, it belongs to ancestral"),
        (["--sampler", "dpm", "--s-churn", "nan"], 2, "s_churn: expected a finite number"),
        (["--sampler", "ddim"], 2, "--sampler"),
        (["--steps", "2", "--mid-sigma", "nan"], 2, "must descend"),
        (["--num", "1000000000000"], 2, "--num"),
        (["--label", "99999999999999999999999"], 2, "--label"),
        (["--steps", "0"], 2, "steps"),
        (["--steps", "100000000"], 2, "steps: expected a whole number of at most 100000 and at least 1, got"),
        (["--ema", "nothing"], 3, "no weight average 'nothing'; it has main, other and net"),
        (["--out", "picture.jpg"], 2, "give a .png"),
        (["--num", "0"], 2, "--num"),
        (["--device", "cuda"], 2, "CUDA"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_wrong_sample_arguments_are_named(fastcm_cli, bundle, arguments, code, message):
    failed = fastcm_cli("sample", "model.safetensors", *arguments)
    assert failed.returncode == code
    assert message in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


HUGE = (2**31).to_bytes(8, "little") + b"{" * 99  # a header of 2 GB, by its own account


@pytest.mark.parametrize("damage", [lambda content: content[:-50], lambda _: b"", lambda _: HUGE])
def test_bundle_that_is_damaged_is_exit_3_naming_the_file(fastcm_cli, bundle, damage):
    bundle.write_bytes(damage(bundle.read_bytes()))
    failed = fastcm_cli("sample", "model.safetensors")
    assert failed.returncode == 3
    assert failed.stderr.startswith("fastcm: error: model.safetensors: damaged or cut short")
    assert len(failed.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"emas": []}, "emas"),
        ({"image_shape": [1, 0, 0]}, "image_shape.1"),
        ({"label_dim": -1}, "label_dim"),
        ({"network": {"family": "bundle"}}, "network.family is 'bundle'"),
        ({"preconditioner": {"kind": "edm", "sigma_data": "half"}}, "sigma_data"),
        ({"preconditioner": {"kind": "edm", "sigma_data": 0.0}}, "sigma_data of the preconditioner is 0.0, expected"),
        ({"preconditioner": {"kind": "edm", "sigma_data": math.nan}}, "sigma_data of the preconditioner is nan, expected"),
        ({"preconditioner": {"kind": "ve", "sigma_max": math.inf}}, "sigma_max of the preconditioner is inf, expected"),
        ({"trajectory": {"outer": "none"}}, "outer: Input should be 'euler'"),
        ({"trajectory": {"sigma_data": -0.5}}, "sigma_data: Input should be greater than 0"),
        ({"sampling": {"sampler": "ddim"}}, "sampling.sampler: Input should be 'heun'"),
        ({"sampling": {"sampler": "heun", "sigma_max": math.nan}}, "sampling.sigma_max: Input should be a finite number"),
    ],
)
def test_header_that_cannot_be_is_exit_3_naming_file_and_key(capsys, bundle, change, key):
    tensors, header = read_tensors(bundle)
    write_tensors(bundle, tensors, {**header, **change})
    for arguments in (["info", str(bundle)], ["export", str(bundle), "out", "--format", "hf"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 3
        assert f"{bundle}: damaged header: {key}" in capsys.readouterr().err


def test_weights_that_are_integers_are_exit_3_naming_file_and_key(capsys, bundle):
    tensors, header = read_tensors(bundle)
    key = "ema/main/map_layer0.weight"
    write_tensors(bundle, {**tensors, key: tensors[key].to(torch.int8)}, header)
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(bundle), "--device", "cpu"])
    assert ended.value.code == 3
    assert f"{bundle}: '{key}' is of int8, this network needs float32" in capsys.readouterr().err


def test_a_model_without_averages_says_so(capsys, tmp_path):
    main(["export", str(write_bundle(tmp_path / "m")), str(tmp_path / "net"), "--format", "safetensors"])
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / "net"), "--ema", "best"])
    assert f"{tmp_path / 'net'}: no weight average 'best'; it has net only" in capsys.readouterr().err


def test_header_that_is_no_object_is_exit_3(capsys, bundle):
    write_tensors(bundle, read_tensors(bundle)[0], [1])
    with pytest.raises(SystemExit) as ended:
        main(["info", str(bundle)])
    assert ended.value.code == 3
    assert f"{bundle}: a safetensors file, but not one that fastcm wrote" in capsys.readouterr().err


def test_model_of_images_that_are_not_square_is_a_clear_error(capsys, bundle):
    tensors, header = read_tensors(bundle)
    write_tensors(bundle, tensors, {**header, "image_shape": [1, 8, 4]})
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(bundle), "--device", "cpu"])
    assert ended.value.code == 2
    assert "images of 8x4 pixels: all networks take square ones" in capsys.readouterr().err


def test_debug_shows_the_traceback(fastcm_cli, bundle):
    bundle.write_bytes(b"")
    assert "Traceback" in fastcm_cli("--debug", "sample", "model.safetensors").stderr


@pytest.mark.parametrize("target", ["nowhere", "."])
def test_path_without_a_model_is_exit_3(fastcm_cli, target):
    failed = fastcm_cli("sample", target)
    assert failed.returncode == 3
    assert "no " in failed.stderr


def test_full_disk_while_sampling_is_a_clear_error(fastcm_cli, bundle):
    failed = fastcm_cli("sample", bundle, "--out", "/proc/picture.png")
    assert failed.returncode == 3
    assert "cannot write /proc/picture.png" in failed.stderr


def test_info_describes_a_model(fastcm_cli, bundle):
    facts = json.loads(fastcm_cli("info", bundle).stdout)
    net = UNet("ddpmpp", 8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    assert facts["num_parameters"] == sum(p.numel() for p in net.parameters())
    assert facts["preconditioner"] == {"kind": "edm_boundary"}
    assert facts["emas"] == ["main", "other"]


def test_info_describes_the_installation(fastcm_cli):
    facts = json.loads(fastcm_cli("info").stdout)
    assert facts["torch"] == torch.__version__
    assert "digits" in facts["configurations"]
    assert facts["kernels"]["group_norm"].startswith("torch")
    assert facts["attention"]["sm90"] == ["tokens 0 to 256, head_dim 1 to 256: triton", "else: torch"]
    assert facts["attention"].keys() == {"sm80", "sm90", "sm100"}


def test_evaluate_refuses_a_model_of_other_images(fastcm_cli, tmp_path):
    write_bundle(tmp_path / "other.safetensors", data="cifar10")
    failed = fastcm_cli("evaluate", "other.safetensors")
    assert failed.returncode == 2
    assert "trained on 'cifar10'" in failed.stderr


def test_evaluate_prints_every_distance(fastcm_cli, bundle):
    printed = fastcm_cli("evaluate", "model.safetensors").stdout
    for name in ("real against real", "untrained noise", "1 step", "2 steps"):
        assert name in printed


def test_public_functions_load_and_sample(bundle):
    model = fastcm.load(bundle)
    images = fastcm.sample(model, num=3, steps=1, seed=0)
    assert images.shape == (3, 1, 8, 8)
    denoised = model(images, sigma=0.5)
    assert denoised.shape == images.shape
    assert torch.equal(model(images, sigma=0.003), model(images, torch.full((3,), 0.003)))
    torch.testing.assert_close(model(images, sigma=0.003), images, rtol=0, atol=1e-5)  # the boundary condition
    assert all(not p.requires_grad for p in model.parameters())


def test_load_takes_the_average_that_is_asked_for(bundle):
    raw, main, other = (
        dict(fastcm.load(bundle, ema=ema).net.named_parameters())["map_layer0.weight"] for ema in ("net", "", "other")
    )
    torch.testing.assert_close(main, raw * 0.9)
    torch.testing.assert_close(other, raw * 0.8)


def test_dry_run_prints_the_resolved_configuration_and_touches_nothing(fastcm_cli, tmp_path):
    run = fastcm_cli("train", "ect_cifar10_1hour", "seed=7", "--dry-run")
    assert run.returncode == 0
    assert "seed: 7" in run.stdout
    assert "configuration hash" in run.stdout
    assert list(tmp_path.iterdir()) == []


CHECKED = [
    ("ect_cifar10", "network.out_channels=2", 2, "out_channels is 2, but the images have 3 channels"),
    ("ect_cifar10", "data.conditional=true network={family: edm2} phases.tune.augment=0.1", 2, "edm2 takes no augmentation"),
    ("digits", "network.attn_resolutions=[4] network.channel_mult=[1,1,1,1,1]", 2, "network: "),
    ("digits", "network={family: bundle}", 2, "network.family is 'bundle', but phases.pretrain.init names no bundle"),
    ("digits", "phases.tune.init=tests", 3, "no model.safetensors in this folder"),
    ("cd_cifar10", "features.lpips=nowhere.pth", 3, "features.lpips: there is no file 'nowhere.pth'"),
    ("cd_imagenet64", "features.lpips=''", 2, "the distance lpips needs weights; set features.lpips"),
    ("edm_imagenet64", "data.path=README.md", 3, "README.md"),
    ("edm_imagenet64", "data.path=''", 2, "data.path is empty"),
    ("digits", "data.resolution=16", 3, "images are 8x8 grey, expected 16x16"),
    ("digits", "data.resolution=-1", 2, "data.resolution: Input should be greater than or equal to 0"),
    ("digits", "network.overrides.resample_filter=[]", 2, "the taps of a filter must not sum to 0"),
    ("digits", "network.overrides.resample_filter=[1,-1]", 2, "the taps of a filter must not sum to 0"),
    ("smoke_cifar10", "data.resolution=64", 3, "CIFAR-10: images are 32x32, but data.resolution is 64"),
    ("digits", "compute.device=cpu compute.cuda_graph=on", 2, "compute.cuda_graph is 'on', but a CPU has no graphs"),
]


@pytest.mark.parametrize(("config", "overrides", "code", "message"), CHECKED)
def test_dry_run_refuses_what_training_would_refuse_at_once(capsys, config, overrides, code, message):
    with pytest.raises(SystemExit) as ended:
        main(["train", config, *re.split(r" (?=\w+[.=])", overrides), "--dry-run"])
    assert ended.value.code == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("config", ["edm_imagenet64", "ect_imagenet64", "ctm_cifar10_gan"])
def test_dry_run_needs_no_images_and_bundles_that_may_come_later(capsys, config):
    main(["train", config, "compute.cuda_graph=on", "--dry-run"])
    assert "cuda_graph: 'on'" in capsys.readouterr().out


def test_immediate_stop_does_not_claim_to_have_saved(monkeypatch, capsys):
    from fastcm import cli

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.cli, "main", stop)
    with pytest.raises(SystemExit) as ended:
        cli.main(["info"])
    assert ended.value.code == 1
    assert "without saving" in capsys.readouterr().err


def test_a_kernel_backend_that_cannot_run_is_said_and_under_strict_refused(fastcm_cli):
    command = ("train", "digits", "phases.pretrain.duration_images=64", "phases.tune.duration_images=128")
    options = ("telemetry.evaluate=false", "compute.backend=triton", "--out", "run")
    refused = fastcm_cli(*command, *options, "compute.strict=true")
    assert refused.returncode == 2
    assert "triton cannot run: Triton kernels need a CUDA device, not cpu" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    done = fastcm_cli(*command, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("add_noise runs on its PyTorch reference, because triton cannot run") == 1
