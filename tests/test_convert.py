"""What conversion recognises, guesses and checks; and training that goes on from an imported network."""

import math
from dataclasses import replace

import checkpoint_files as files
import pytest
import torch
from convert_cases import edm2_arguments, edm2_pickle, edm_arguments, edm_pickle, official_state
from golden_cases import case_names, load_case
from golden_models import batch_of
from integration_cases import header_of, write_bundle
from safetensors.torch import load_file, save_file

from fastcm.cli import main
from fastcm.config import EDM2Config, UNetConfig
from fastcm.convert import Options, convert
from fastcm.convert.options import PRESETS
from fastcm.convert.recognize import recognize
from fastcm.convert.source import Weights
from fastcm.diffusion.consistency import stage_decay
from fastcm.diffusion.noise_distributions import lognormal_sigma
from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.errors import CheckpointError, ConfigError
from fastcm.integrations import export_diffusers, export_hub
from fastcm.integrations.official import Layout, export_official
from fastcm.io.bundle import load, model_from_header, read_bundle
from fastcm.io.edm_layout import to_edm
from fastcm.io.openai_layout import to_openai
from fastcm.io.tensors import read_tensors, write_tensors
from fastcm.model import Model, SamplingDefaults
from fastcm.nn.build import build_network
from fastcm.objectives import ECT
from fastcm.train.networks import bundle_weights, copy_weights

CIFAR = UNetConfig()
IMAGENET = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (32, 16, 8)}
LSUN = {"model_channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_blocks": 2, "attn_resolutions": (32, 16, 8)}
LSUN |= {"overrides": {"adaptive_scale": False}}
EDM2_SIZES = {"XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384}

# Network, (resolution, classes, augmentation labels), layout, preset, millions of parameters.
PUBLISHED = {
    "EDM and ECT on CIFAR-10, DDPM++": (CIFAR, (32, 0, 9), "edm", "", 55.7),
    "EDM on CIFAR-10, NCSN++": (UNetConfig(family="ncsnpp"), (32, 0, 9), "edm", "", 56.4),
    "EDM on ImageNet": (UNetConfig(family="adm", **IMAGENET), (64, 1000, 0), "edm", "", 295.9),
    "CTM on CIFAR-10": (CIFAR.model_copy(update={"second_time": True}), (32, 10, 0), "edm", "ctm_cifar10_cond", 60.4),
    "CD on ImageNet": (UNetConfig(family="openai", **IMAGENET), (64, 1000, 0), "openai", "cd_imagenet64_lpips", 295.9),
    "CT on LSUN": (UNetConfig(family="openai", **LSUN), (256, 0, 0), "openai", "ct_bedroom256", 526.3),
    "CTM on ImageNet": (
        UNetConfig(family="openai", second_time=True, **IMAGENET), (64, 1000, 0), "openai", "ctm_imagenet64", 324.1
    ),
    **{
        f"EDM2-{size}": (EDM2Config(family="edm2", model_channels=width), (64, 1000, 0), "edm2", "", millions)
        for (size, width), millions in zip(EDM2_SIZES.items(), (124.7, 280.2, 497.8, 777.5, 1119.3), strict=True)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_recognised_with_their_number_of_parameters(name):
    config, (resolution, label_dim, augment_dim), layout, preset, millions = PUBLISHED[name]
    with torch.device("meta"):
        net = build_network(config, (3, resolution, resolution), label_dim, augment_dim)
    assert round(sum(weight.numel() for weight in net.parameters()) / 1e6, 1) == millions
    official = Layout(layout, prefix="model." if layout == "edm" else "").official(net.state_dict(), net, None)
    # Tensors of the right shape that occupy no memory; filters have their values.
    state = {key: torch.ones(()).expand(value.shape) if value.is_meta else value for key, value in official.items()}
    plan = recognize(Weights(state), Options(), PRESETS.get(preset))
    assert plan.network == config.model_copy(update={"fourier_scale": plan.network.fourier_scale} if layout == "edm" else {})
    assert (plan.image_shape, plan.label_dim, plan.augment_dim) == ((3, resolution, resolution), label_dim, augment_dim)
    assert plan.kind.startswith(name.partition(" ")[0]) or layout != "edm2"
    assert (plan.trajectory is not None) == getattr(config, "second_time", False)
    if preset:
        assert plan.guesses == ()


@pytest.mark.parametrize(
    ("name", "middle"),
    [
        ("cd_imagenet64_lpips", 1.38),
        ("cd_imagenet64_l2", 1.38),
        ("ct_imagenet64", 1.91),
        ("cd_bedroom256_lpips", karras_sigmas(40)[17].item()),
        ("cd_bedroom256_l2", karras_sigmas(40)[18].item()),
        ("ct_bedroom256", karras_sigmas(151)[67].item()),
        ("ct_cat256", karras_sigmas(151)[62].item()),
        ("ect_imagenet64", 1.526),
    ],
)
def test_presets_have_the_published_level_between_two_steps(name, middle):
    assert PRESETS[name].options.mid_sigmas == (pytest.approx(middle, rel=3e-3),)
    assert PRESETS[name].options.sampler == "consistency"


def test_every_preset_leaves_nothing_to_guess_but_what_it_names():
    for name, preset in PRESETS.items():
        said = preset.options
        assert None not in (said.resolution, said.label_dim, said.preconditioner, said.sigma_data, said.sampler), name
        assert (said.sigma_min == 0.002) == (said.preconditioner == "edm_boundary"), name
        assert (said.outer is not None) == preset.second_time, name


def test_options_count_before_those_of_a_preset(tmp_path):
    source = files.write_state_dict(tmp_path / "ctm.pt", official_state("F_kim_net"))
    convert(source, tmp_path / "bundle", Options(outer="variance", sigma_data=0.6), preset="ctm_cifar10_cond")
    model = load(tmp_path / "bundle")
    assert (model.trajectory.outer, model.trajectory.sigma_data, model.precond.sigma_data) == ("variance", 0.6, 0.6)


def test_only_options_that_are_needed_are_guessed(tmp_path):
    source = files.write_state_dict(tmp_path / "cd.pt", official_state("E_unet_uncond"))
    guesses = convert(source, tmp_path / "bundle", Options(channels_per_head=16)).guesses
    assert [guess.split()[0] for guess in guesses] == ["resolution", "head_major", "preconditioner", "sigma_data", "sigma_min"]
    said = Options(None, 16, 0, 16, head_major=False, preconditioner="edm", sigma_data=0.5)
    assert convert(source, tmp_path / "bundle", said).guesses == ()


def test_rows_of_attention_may_be_head_major_in_vectors_of_one_pixel(tmp_path):
    case = load_case("E_unet_uncond")
    plain = files.write_state_dict(tmp_path / "plain.pt", official_state("E_unet_uncond"))
    convert(plain, tmp_path / "bundle", Options(channels_per_head=16))
    net = load(tmp_path / "bundle").net
    state = to_openai(net.state_dict(), net, head_major=True, conv1d=True)
    source = files.write_state_dict(tmp_path / "legacy.pt", state)

    convert(source, tmp_path / "legacy", Options(channels_per_head=16, head_major=True))
    inputs = case.tensors["in/x"], case.tensors["in/t"]
    case.close(load(tmp_path / "legacy")(*inputs), "out/denoised_boundary")
    export_official(tmp_path / "legacy", tmp_path / "out", "openai")
    exported = load_file(tmp_path / "out")
    assert all(torch.equal(exported[key], value) for key, value in state.items())

    convert(source, tmp_path / "wrong", Options(channels_per_head=16))
    with pytest.raises(AssertionError):
        case.close(load(tmp_path / "wrong")(*inputs), "out/denoised_boundary")


def tensors_file(path, state):
    save_file(state, path)
    return path


def vp_pickle(path, state):
    return files.write_edm_pickle(path, state, *edm_arguments("A_VPPrecond"))


def ect_state(path, state):
    return files.write_training_state(path, state, *edm_arguments("C_ecm_net"))


# Case, writer, options of every kind of file that brings floats.
FORMATS = {
    "EDM state dict": ("A_VPPrecond", files.write_state_dict, {"preconditioner": "vp"}),
    "EDM safetensors": ("A_VPPrecond", tensors_file, {"preconditioner": "vp"}),
    "EDM pickle": ("A_VPPrecond", vp_pickle, {}),
    "ECT training state": ("C_ecm_net", ect_state, {}),
    "EDM2 state dict": ("G_net_uncond", files.write_state_dict, {"channels_per_head": 16}),
    "OpenAI": ("E_unet_cond", files.write_state_dict, {"num_heads": 2, "num_heads_up": 1}),
    "CTM on CIFAR-10": ("F_kim_net", files.write_state_dict, {}),
    "CTM on ImageNet": ("F_sony_net", files.write_state_dict, {"channels_per_head": 16}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMATS)
def test_values_of_any_dtype_come_back_in_it(form, dtype, tmp_path):
    case, write, options = FORMATS[form]
    state = {key: value.to(dtype) for key, value in official_state(case).items()}
    done = convert(write(tmp_path / "half", state), tmp_path / "bundle", Options(**options))
    assert done.dtypes == {str(dtype).removeprefix("torch."): len(state)}
    assert {value.dtype for value in read_tensors(tmp_path / "bundle")[0].values()} == {torch.float32}
    layout = read_bundle(tmp_path / "bundle")[1].trained["source"]["layout"]["name"]
    export_official(tmp_path / "bundle", tmp_path / "out", layout)
    exported = load_file(tmp_path / "out")
    assert exported.keys() == state.keys()
    assert all(exported[key].dtype == dtype and torch.equal(exported[key], value) for key, value in state.items())


def test_doubles_are_rounded_and_that_is_said(tmp_path):
    state = {key: value.double() / 3 for key, value in official_state("A_VPPrecond").items()}
    source = files.write_state_dict(tmp_path / "double.pt", state)
    done = convert(source, tmp_path / "bundle", Options(preconditioner="vp"))
    assert "note: float64 was rounded to float32" in done.lines()


@pytest.mark.parametrize("layout", ["edm", "openai", "edm2"])
def test_export_to_names_of_another_family_is_refused(layout, tmp_path):
    writer = edm2_pickle("G_net_uncond") if layout != "edm2" else edm_pickle("A_VPPrecond")
    convert(writer(tmp_path / "source"), tmp_path / "bundle")
    with pytest.raises(ConfigError, match=f"has no names in the layout '{layout}'"):
        export_official(tmp_path / "bundle", tmp_path / "out", layout)


def test_bundle_that_was_not_converted_is_exported_plainly(tmp_path):
    averaged, _ = write_bundle(tmp_path / "bundle", header_of())
    export_official(tmp_path / "bundle", tmp_path / "out", "openai", ema="main")
    expected = to_openai(averaged.net.state_dict(), averaged.net)
    exported = load_file(tmp_path / "out")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[key], value) for key, value in expected.items())


@pytest.mark.parametrize("source", ["a", {"layout": "openai"}, {"layout": {"name": "openai", "a": 1}}])
def test_damaged_record_of_the_source_is_named_by_the_export(source, tmp_path):
    write_bundle(tmp_path / "bundle", header_of(trained={"phase": "imported", "source": source}))
    with pytest.raises(CheckpointError, match=r"bundle: damaged header: trained\.source"):
        export_official(tmp_path / "bundle", tmp_path / "out", "openai")


@pytest.mark.parametrize("kind", ["iddpm", "edm", "vp"])
@pytest.mark.parametrize(("layout", "overrides"), [("openai", {"channels_per_head": 16}), ("openai", {}), ("edm", {})])
def test_network_with_more_output_channels_than_the_image_comes_back_from_its_export(layout, overrides, kind, tmp_path):
    """The second network is narrower than a head of 64 channels, and so without attention."""
    family = "openai" if layout == "openai" else "ddpmpp"
    network = {"family": family, "out_channels": 6, "overrides": overrides, **SMALL}
    _, raw = write_bundle(tmp_path / "bundle", header_of(network, preconditioner={"kind": kind}))
    export_official(tmp_path / "bundle", tmp_path / "out", layout, ema="net")
    convert(tmp_path / "out", tmp_path / "back", Options(preconditioner=kind, **overrides))
    model = load(tmp_path / "back")
    assert model.precond == raw.precond
    assert all(torch.equal(model.net.state_dict()[key], value) for key, value in raw.net.state_dict().items())
    x_NCHW = torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)
    assert torch.equal(model(x_NCHW, 1.0), raw(x_NCHW, 1.0))


@pytest.mark.parametrize("kind", ["diffusers", "hf"])
def test_folders_of_diffusers_and_of_the_hub_become_bundles(kind, tmp_path):
    _, raw = write_bundle(tmp_path / "first", header_of())
    export = export_diffusers if kind == "diffusers" else export_hub
    export(tmp_path / "first", tmp_path / "folder", ema="net")
    done = convert(tmp_path / "folder", tmp_path / "bundle", Options(mid_sigmas=(1.5, 0.5)))
    model = load(tmp_path / "bundle")
    assert all(torch.equal(model.net.state_dict()[key], value) for key, value in raw.net.state_dict().items())
    assert model.precond == raw.precond
    assert model.sampling.mid_sigmas == (1.5, 0.5)
    assert done.kind == f"{kind} folder"
    for options, preset in ((Options(resolution=16), ""), (Options(), "ct_imagenet64")):
        with pytest.raises(ConfigError, match=r"--\w+ was given, but a folder says all of its model itself"):
            convert(tmp_path / "folder", tmp_path / "bundle", options, preset=preset)


def test_self_check_notices_a_bundle_that_differs_from_its_source(tmp_path, monkeypatch):
    source = edm_pickle("A_VPPrecond")(tmp_path / "source")
    honest = Layout.ours

    def one_bit_off(layout, *arguments):
        state = honest(layout, *arguments)
        name = "dec.16x16_aux_conv.bias"
        return state | {name: state[name].nextafter(torch.tensor(9.0))}

    monkeypatch.setattr(Layout, "ours", one_bit_off)
    with pytest.raises(CheckpointError, match=r"source: self-check: model\.dec\.16x16_aux_conv\.bias does not come back"):
        convert(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_self_check_notices_images_that_are_not_finite(tmp_path):
    state = {key: value.float() for key, value in official_state("A_VPPrecond").items()}
    state["model.dec.16x16_aux_conv.weight"] = torch.full_like(state["model.dec.16x16_aux_conv.weight"], 3e38)
    source = files.write_state_dict(tmp_path / "source", state)
    with pytest.raises(CheckpointError, match=r"images are not finite at sigma 0\.01"):
        convert(source, tmp_path / "bundle", Options(preconditioner="vp"))
    assert not (tmp_path / "bundle").exists()


def test_self_check_says_whether_small_noise_moves_the_image_little(tmp_path):
    state = official_state("A_VPPrecond")
    source = files.write_state_dict(tmp_path / "source", state)
    assert "(rms) away from x, within 3 sigma" in convert(source, tmp_path / "bundle", Options(preconditioner="vp")).lines()[-1]
    state["model.dec.16x16_aux_conv.weight"] = 100 * state["model.dec.16x16_aux_conv.weight"]
    source = files.write_state_dict(tmp_path / "source", state)
    assert "(rms) away from x, beyond 3 sigma" in convert(source, tmp_path / "bundle", Options(preconditioner="vp")).lines()[-1]


@pytest.mark.parametrize(
    ("case", "constants"),
    [
        ("A_ddpmpp_uncond", {"sigma_data": 0.7}),
        ("C_ecm_net", {"sigma_data": 0.7, "sigma_min": 0.004}),
        ("A_VPPrecond", {"beta_d": 19.0, "beta_min": 0.2, "M": 500, "epsilon_t": 1e-4}),
        ("A_VEPrecond", {"sigma_min": 0.03, "sigma_max": 90.0}),
        ("G_net_uncond", {"sigma_data": 0.7}),
    ],
)
def test_constants_of_the_preconditioner_are_those_of_the_file(case, constants, tmp_path):
    if case[0] == "G":
        arguments = edm2_arguments(case) | constants
        files.write_edm2_pickle(tmp_path / "source", official_state(case), arguments)
    else:
        edm_pickle(case, arguments=constants)(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "bundle")
    precond = load(tmp_path / "bundle").precond
    assert {name: getattr(precond, name) for name in constants} == constants


def test_noise_is_added_up_from_where_the_authors_begin(tmp_path):
    openai = files.write_state_dict(tmp_path / "cd.pt", official_state("E_unet_uncond"))
    convert(openai, tmp_path / "cd", Options(channels_per_head=16, mid_sigmas=(1.4,)))
    assert load(tmp_path / "cd").sampling == SamplingDefaults("consistency", (1.4,), 0.002)
    convert(edm_pickle("C_ecm_net")(tmp_path / "ect.pkl"), tmp_path / "ect")
    assert load(tmp_path / "ect").sampling == SamplingDefaults("consistency", (0.821,), 0.0)


def test_training_state_of_ect_on_edm2_has_its_average_beside_the_module(tmp_path):
    state = {key: value for key, value in official_state("G_net_uncond").items() if not key.startswith("logvar")}
    net = files.persistent_module({key: 2 * value for key, value in state.items()}, "Precond", edm2_arguments("G_net_uncond"))
    averages = {"stds": [0.1], "emas": [files.named(state)]}
    source = files.write_torch(tmp_path / "state.pt", {"net": net, "ema_state": averages})
    done = convert(source, tmp_path / "bundle")
    assert done.kind == "ECT on EDM2-?, class Precond, weights 'ema_state'"
    with torch.no_grad():
        model, case = load(tmp_path / "bundle"), load_case("G_net_uncond")
        case.close(model(case.tensors["in/x"], case.tensors["in/sigma"]), "out/D_x")
    with pytest.raises(CheckpointError, match=r"no weights '0\.05'; choose one with --weights: net, 0\.1"):
        convert(source, tmp_path / "bundle", Options(weights="0.05"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resample_filter": [1, 3, 3, 1]}, r"resamples with the filter \[1, 3, 3, 1\]"),
        ({"clip_act": "a lot"}, "clip_act that is a str, expected a number"),
        ({"channels_per_head": 0}, "a network that cannot be.*channels_per_head"),
        ({"sigma_data": math.inf}, "sigma_data of its Precond is inf, which cannot be"),
    ],
)
def test_arguments_of_an_edm2_network_that_cannot_be_are_refused(arguments, message, tmp_path):
    changed = edm2_arguments("G_net_uncond") | arguments
    source = files.write_edm2_pickle(tmp_path / "source", official_state("G_net_uncond"), changed)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "bundle")


def test_a_claim_of_a_huge_table_or_image_is_refused(tmp_path):
    source = edm_pickle("A_iDDPMPrecond", arguments={"M": 10**12})(tmp_path / "source")
    with pytest.raises(CheckpointError, match="M of its iDDPMPrecond is 1000000000000, which cannot be; usually it is 1000"):
        convert(source, tmp_path / "bundle")
    state = {key.replace("16x16", "65536x65536"): value for key, value in official_state("A_VPPrecond").items()}
    source = files.write_state_dict(tmp_path / "source", state)
    with pytest.raises(CheckpointError, match=r"\(3, 65536, 65536\), which cannot be"):
        convert(source, tmp_path / "bundle")


def test_weights_that_are_no_floats_are_refused(tmp_path):
    state = official_state("A_VPPrecond") | {"model.map_layer0.bias": torch.zeros(64, dtype=torch.int64)}
    source = files.write_state_dict(tmp_path / "source", state)
    with pytest.raises(CheckpointError, match=r"map_layer0\.bias is of int64, but all weights are floats"):
        convert(source, tmp_path / "bundle")


def test_latents_are_told_from_images(tmp_path):
    done = convert(edm2_pickle("G_net_cond")(tmp_path / "source"), tmp_path / "bundle")
    assert any("latents of 4 channels" in line for line in done.lines())


def test_bundle_keeps_how_a_model_jumps(tmp_path):
    source = files.write_state_dict(tmp_path / "ctm.pt", official_state("F_kim_net"))
    convert(source, tmp_path / "bundle")
    _, header = read_bundle(tmp_path / "bundle")
    assert header.trajectory == {"outer": "euler", "sigma_data": 0.5, "sigma_min": 0.002}
    with pytest.raises(CheckpointError, match="damaged header"):
        model_from_header(replace(header, trajectory={"outer": "straight"}), origin=tmp_path)


def test_bundle_of_before_trajectories_still_loads(tmp_path):
    write_bundle(tmp_path / "bundle", header_of())
    tensors, header = read_tensors(tmp_path / "bundle")
    del header["trajectory"]
    write_tensors(tmp_path / "bundle", tensors, header)
    assert load(tmp_path / "bundle").trajectory.outer == "euler"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The bundle of an EDM pickle with the weights of golden C's network."""
    folder = tmp_path_factory.mktemp("pretrained")
    convert(edm_pickle("C_ecm_net", class_name="EDMPrecond", ect=False)(folder / "edm.pkl"), folder / "edm.safetensors")
    return folder / "edm.safetensors"


@pytest.mark.parametrize("name", [name for name in case_names("C_ecm_loss") if name.endswith("train")])
def test_first_losses_of_ect_from_an_imported_edm_pickle_are_the_official_ones(name, pretrained):
    case, (_, header) = load_case(name), read_bundle(pretrained)
    config = case.config
    constants = {key.lower(): config[key] for key in ("P_mean", "P_std", "sigma_data", "q", "k", "b", "c")}
    objective = ECT(**constants, mapping=config["adj"], distance="pseudo_huber" if config["c"] else "l2")

    net = build_network(UNetConfig(**_plain(header.network)), header.image_shape, header.label_dim)
    copy_weights(net, bundle_weights(pretrained), pretrained)
    student = Model(net, objective.precond, header.image_shape)
    t = lognormal_sigma(case.tensors["in/rnd_normal"].flatten(), objective.p_mean, objective.p_std)
    decay = torch.tensor(stage_decay(config["stage"], objective.q))
    loss = objective.loss_at(student, batch_of(case.tensors["in/images"]), t, case.tensors["in/eps"], decay).loss_N
    case.close(loss, "out/loss")


def _plain(network):
    return {key: tuple(value) if isinstance(value, list) else value for key, value in network.items()}


TUNING = """
data: {kind: digits}
network: {family: ddpmpp, model_channels: 8, channel_mult: [1, 1], num_blocks: 1, attn_resolutions: [4]}
phases:
  tune:
    objective: {kind: ect, double_images: 64}
    init: edm.safetensors
    duration_images: 64
    batch_size: 16
    optimizer: {kind: radam, lr: 1e-3}
telemetry: {log_images: 32, snapshot_images: 64, grid_size: 2}
"""


@pytest.mark.parametrize("class_name", ["EDMPrecond", "ECMPrecond"])
def test_training_goes_on_from_a_converted_pickle(class_name, tmp_path, monkeypatch):
    config = {"family": "ddpmpp", "model_channels": 8, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (4,)}
    net = build_network(UNetConfig(**config), (1, 8, 8)).init_weights(7)
    state = {f"model.{name}": value for name, value in to_edm(net.state_dict(), net).items()}
    files.write_edm_pickle(tmp_path / "edm.pkl", state, class_name, {"sigma_data": 0.5, "sigma_min": 0.003})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tune.yaml").write_text(TUNING)
    main(["convert", "edm.pkl", "edm.safetensors"])
    main(["train", "tune.yaml", "--out", "run"])
    tuned = load("run", ema="net")
    assert tuned.sampling.sampler == "consistency"
    steps = [(value - net.state_dict()[key]).abs().max() for key, value in tuned.net.state_dict().items()]
    assert 0 < max(steps) < 0.05  # four steps away from the imported weights, not fresh ones


SMALL = {"model_channels": 16, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (4,)}
CONSISTENCY = ["--channels-per-head", "16", "--resolution", "8"]


@pytest.mark.parametrize(
    ("layout", "network", "options"),
    [
        ("openai", UNetConfig(family="openai", **SMALL, overrides={"channels_per_head": 16}), CONSISTENCY),
        ("edm2", EDM2Config(family="edm2", **SMALL, channels_per_head=16), ["--channels-per-head", "16"]),
    ],
)  # fmt: skip
def test_one_command_tunes_a_converted_consistency_model_and_edm2(layout, network, options, tmp_path, monkeypatch):
    """The pickles of EDM are above; CD's networks bring other names and heads, EDM2's a log variance that ECT has none of."""
    net = build_network(network, (1, 8, 8)).init_weights(7)
    files.write_state_dict(tmp_path / "source.pt", Layout(layout).official(net.state_dict(), net, None))
    monkeypatch.chdir(tmp_path)
    main(["convert", "source.pt", "edm.safetensors", *options])
    (tmp_path / "tune.yaml").write_text(TUNING)
    main(["train", "tune.yaml", "network={family: bundle}", "phases.tune.optimizer.kind=adam", "--out", "run"])
    tuned, start = load("run", ema="net"), load("edm.safetensors")
    start.net.constrain_weights(torch.tensor(1.0))  # as EDM2's are before the first step
    assert tuned.sampling.sampler == "consistency"
    steps = [(value - start.net.state_dict()[key]).abs().max() for key, value in tuned.net.state_dict().items()]
    assert 0 < max(steps) < 0.05


@pytest.mark.parametrize("half", [True, False])
def test_a_network_that_ran_in_half_precision_is_said_to_have_done_so(half, tmp_path):
    edm_pickle("A_ddpmpp_uncond", arguments={"use_fp16": half})(tmp_path / "edm.pkl")
    lines = convert(tmp_path / "edm.pkl", tmp_path / "edm.safetensors").lines()
    assert any("use_fp16" in line for line in lines) == half
