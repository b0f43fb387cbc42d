"""``fastcm likelihood`` as a user runs it."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fastcm.cli import cli
from fastcm.data.sources import open_source
from fastcm.errors import ConfigError, DataError
from fastcm.evaluate.likelihood import measure_likelihood
from fastcm.io.bundle import BundleHeader, load, save_bundle
from fastcm.model import SamplingDefaults
from fastcm.nn.unet import UNet
from fastcm.sampling.likelihood import bits_per_dim

NETWORK = {"family": "ddpmpp", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
COARSE = {"rtol": 0.03, "atol": 0.03}


def write_bundle(path, label_dim=0, sampler="heun"):
    net = UNet("ddpmpp", 8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), label_dim=label_dim)
    state = net.init_weights(3).state_dict()
    state = {name: value + 0.02 * torch.sin(torch.arange(value.numel())).reshape(value.shape) for name, value in state.items()}
    header = BundleHeader(
        network=NETWORK,
        image_shape=(1, 8, 8),
        label_dim=label_dim,
        augment_dim=0,
        preconditioner={"kind": "edm"},
        sampling=SamplingDefaults(sampler),
        emas=("main",),
        trained={"phase": "pretrain", "images": 5, "data": "digits"},
    )
    save_bundle(path, header, state, {"main": {name: value * 0.9 for name, value in state.items()}})
    return path


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "model.safetensors")


def test_prints_the_figure_with_all_that_it_depends_on(fastcm_cli, tmp_path, bundle):
    arguments = ["--num", "2", "--probes", "2", "--rtol", "0.03", "--atol", "0.03", "--json", "bpd.json"]
    done = fastcm_cli("likelihood", bundle, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads((tmp_path / "bpd.json").read_text())
    expected = measure_likelihood(bundle, num=2, probes=2, **COARSE)
    assert written["image_bits_per_dim"] == pytest.approx(expected.likelihood.bpd.tolist(), abs=1e-3)
    assert written["images"] == expected.index_N.tolist()
    assert written["settings"] == vars(expected.likelihood.settings)
    words = " ".join(done.stdout.split())
    assert f"bits/dim {written['bits_per_dim']:.4f}" in words
    assert f"over probes: {written['probe_interval_95'][0]:.4f} to" in words
    assert "2 of 1797 of digits" in words
    assert "uniform noise, 17 levels: +3.000 bits/dim; residual none" in words
    assert "sigma 0.002 to 80, rtol 0.03, atol 0.03" in words
    assert f"{written['mean_evaluations']:g} evaluations (NFE), each with 2 rademacher probe(s)" in words


def test_images_are_those_of_the_set_with_their_numbers(bundle):
    found = measure_likelihood(bundle, num=3, **COARSE)
    source = open_source("digits")
    images = np.stack([source.read(i) for i in found.index_N.tolist()]).transpose(0, 3, 1, 2)
    images = torch.from_numpy(images).float() / 127.5 - 1
    expected = bits_per_dim(load(bundle), images, index=found.index_N, levels=17, **COARSE)
    assert torch.equal(found.likelihood.bpd_KN, expected.bpd_KN)
    assert not torch.equal(measure_likelihood(bundle, num=3, seed=1, **COARSE).index_N, found.index_N)


def test_other_formats_have_256_levels(bundle, tmp_path):
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1)
    np.savez(tmp_path / "own.npz", images=images)
    found = measure_likelihood(bundle, "npz", tmp_path / "own.npz", **COARSE)
    assert sorted(found.index_N.tolist()) == [0, 1, 2, 3]
    assert found.likelihood.settings.levels == 256
    assert "4 of 4" in "\n".join(found.lines())
    with pytest.raises(DataError, match="not on 17 levels"):
        measure_likelihood(bundle, "npz", tmp_path / "own.npz", levels=17, **COARSE)


def test_classes_go_to_a_conditional_model(tmp_path):
    conditional = write_bundle(tmp_path / "conditional.safetensors", label_dim=10)
    found = measure_likelihood(conditional, num=2, **COARSE)
    source = open_source("digits")
    images = np.stack([source.read(i) for i in found.index_N.tolist()]).transpose(0, 3, 1, 2)
    images = torch.from_numpy(images).float() / 127.5 - 1
    options = {"index": found.index_N, "levels": 17, **COARSE}
    right = bits_per_dim(load(conditional), images, labels=torch.from_numpy(source.labels)[found.index_N], **options)
    assert torch.equal(found.likelihood.bpd_KN, right.bpd_KN)
    wrong = bits_per_dim(load(conditional), images, labels=(int(source.labels[found.index_N[0]]) + 1) % 10, **options)
    assert not torch.equal(wrong.bpd_KN, right.bpd_KN)
    np.savez(tmp_path / "own.npz", images=np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(DataError, match="labels are needed"):
        measure_likelihood(conditional, "npz", tmp_path / "own.npz")


def test_one_image_and_one_probe_have_no_interval(bundle):
    text = "\n".join(measure_likelihood(bundle, num=1, **COARSE).lines())
    assert text.count("unknown (needs two)") == 2


def test_misuse_is_named(bundle, tmp_path):
    with pytest.raises(ConfigError, match="--kind"):
        measure_likelihood(bundle, "digits", tmp_path / "own.npz")
    np.savez(tmp_path / "large.npz", images=np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(DataError, match=r"large\.npz: images are \(3, 16, 16\)"):
        measure_likelihood(bundle, "npz", tmp_path / "large.npz")
    with pytest.raises(ConfigError, match="consistency model"):
        measure_likelihood(write_bundle(tmp_path / "consistency.safetensors", sampler="consistency"))


@pytest.mark.parametrize(
    "option", [["--probe", "sign"], ["--levels", "1"], ["--levels", "99999999999"], ["--probes", "0"], ["--kind", "pictures"]]
)
def test_options_out_of_range_are_refused_at_once(option):
    done = CliRunner().invoke(cli, ["likelihood", "model.safetensors", *option])
    assert done.exit_code == 2
    assert option[0] in done.output
