"""Consistency models in diffusers' format: what diffusers itself computes from an export, and what comes back."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from integration_cases import SMALL, header_of, images, model_of, write_bundle
from safetensors.torch import load_file, save_file

from fastcm.errors import CheckpointError, ConfigError
from fastcm.integrations import export_diffusers, import_diffusers, pipeline_timesteps
from fastcm.integrations.diffusers_config import SchedulerConfig, UNet2DConfig
from fastcm.io.bundle import load, save_bundle
from fastcm.model import SamplingDefaults
from fastcm.sampling.consistency import sample_consistency

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# Every way in which two of these networks may differ.
NETWORKS = {
    "classes": (SMALL, 5),
    "unconditional": (SMALL, 0),
    "attention at full resolution": (SMALL | {"model_channels": 64, "attn_resolutions": (16,), "num_blocks": 2}, 0),
    "attention everywhere, two heads": (
        SMALL | {"channel_mult": (1, 2, 2), "attn_resolutions": (16, 8, 4), "overrides": {"channels_per_head": 32}},
        3,
    ),
    "one head of any width": (
        SMALL | {"channel_mult": (1, 2), "attn_resolutions": (16, 8), "overrides": {"channels_per_head": 0}},
        0,
    ),
    "no attention": (SMALL | {"channel_mult": (1, 1), "attn_resolutions": ()}, 0),
    "addend instead of scale and shift": (SMALL | {"overrides": {"adaptive_scale": False}}, 0),
    "wide embedding": (SMALL | {"channel_mult_emb": 2}, 5),
}
# What OpenAI's published models say of themselves, smaller.
OPENAI = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "num_class_embeds": 4,
    "attention_head_dim": 64,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "upsample_type": "resnet",
    "downsample_type": "resnet",
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=NETWORKS)
def model(request):
    network, label_dim = NETWORKS[request.param]
    boundary = {"kind": "edm_boundary", "sigma_data": 0.4, "sigma_min": 0.01}
    return model_of(header_of(network, label_dim=label_dim, preconditioner=boundary))


@pytest.fixture
def exported(tmp_path):
    """The folder of an unconditional model."""
    export_diffusers(model_of(header_of()), tmp_path)
    return tmp_path


def labels_of(model, num):
    return torch.arange(num) % model.label_dim if model.label_dim else None


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_same_weights(actual, expected):
    actual, expected = actual.net.state_dict(), expected.net.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_diffusers_network_computes_what_ours_does(model, tmp_path):
    from diffusers import UNet2DModel

    export_diffusers(model, tmp_path)
    unet, report = UNet2DModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not any(report.values())
    x, sigma, labels = images(3), torch.tensor([0.01, 0.7, 80.0]), labels_of(model, 3)
    with torch.no_grad():
        expected = unet(x, 250 * sigma.double().log(), class_labels=labels).sample
    actual = model.from_input(x, sigma.log() / 4, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_round_trip_is_bit_exact(model, tmp_path):
    export_diffusers(model, tmp_path)
    back, header = import_diffusers(tmp_path)
    assert_same_weights(back, model)
    assert back.precond == model.precond
    assert back.label_dim == model.label_dim == header.label_dim
    assert back.net.family == model.net.family
    assert torch.equal(back(images(2), 0.7), model(images(2), 0.7))


@pytest.mark.parametrize("timesteps", [[0], [22, 0], [37, 20, 0]])
def test_pipeline_and_our_sampler_give_the_same_images(timesteps, tmp_path):
    from diffusers import ConsistencyModelPipeline

    model = model_of(header_of(label_dim=5))
    export_diffusers(model, tmp_path)
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    latents, labels, noise = images(4), torch.tensor([0, 1, 4, 2]), torch.Generator().manual_seed(3)
    arguments = {"batch_size": 4, "class_labels": labels, "timesteps": timesteps, "latents": latents, "output_type": "pt"}
    expected = pipeline(**arguments, generator=noise).images

    levels = SchedulerConfig().sigmas()
    sigmas = torch.tensor([levels[step] for step in reversed(timesteps)] + [0.0])
    noise = torch.Generator().manual_seed(3)
    draws = {step + 1: torch.randn(latents.shape, generator=noise) for step in range(len(timesteps))}
    actual = sample_consistency(model, latents * 80, sigmas, labels=labels, noise=draws.get, sigma_min=0.002)
    shown = (actual.float() / 2 + 0.5).clamp(0, 1)
    assert ((shown > 0) & (shown < 1)).float().mean() > 0.2
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-4)


def test_pipeline_clips_between_steps_only_where_asked(tmp_path):
    from diffusers import CMStochasticIterativeScheduler

    for clip in (False, True):
        export_diffusers(model_of(header_of()), tmp_path, clip_denoised=clip)
        scheduler = CMStochasticIterativeScheduler.from_pretrained(tmp_path / "scheduler")
        assert scheduler.config.clip_denoised is clip


@pytest.mark.parametrize(("sigma_min", "sigma_data"), [(0.002, 0.5), (0.02, 0.4)])
def test_model_that_diffusers_saved_loads_and_denoises_alike(sigma_min, sigma_data, tmp_path):
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(**OPENAI).eval()
    scheduler = CMStochasticIterativeScheduler(sigma_min=sigma_min, sigma_data=sigma_data)
    ConsistencyModelPipeline(unet, scheduler).save_pretrained(tmp_path)
    model, header = import_diffusers(tmp_path)
    assert header.sampling == SamplingDefaults("consistency", (), sigma_min)

    x, labels = 3 * images(2), torch.tensor([3, 1])
    scheduler.set_timesteps(timesteps=[30])
    (step,), sigma = scheduler.timesteps, scheduler.sigmas[0].item()
    with torch.no_grad():
        output = unet(scheduler.scale_model_input(x, step), step, class_labels=labels).sample
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(scheduler.sigmas[0])
    expected = c_out * output + c_skip * x
    torch.testing.assert_close(model(x, sigma, labels), expected, rtol=0, atol=1e-5)


def test_network_alone_gets_the_published_scalings_and_makes_a_bundle(exported, tmp_path):
    model, header = import_diffusers(exported / "unet")
    assert (model.precond.sigma_data, model.precond.sigma_min) == (0.5, 0.002)
    save_bundle(tmp_path / "model.safetensors", header, model.net.state_dict(), {})
    assert_same_weights(load(tmp_path / "model.safetensors"), model)


@pytest.mark.parametrize(
    ("widths", "attends", "changes", "resolutions", "overrides"),
    [
        ((192, 384, 576, 768), (0, 1, 1, 1), {"sample_size": 64, "layers_per_block": 3}, (32, 16, 8), {}),
        (
            (256, 256, 512, 512, 1024, 1024),
            (0, 0, 0, 1, 1, 1),
            {"sample_size": 256, "layers_per_block": 2, "num_class_embeds": None, "resnet_time_scale_shift": "default"},
            (32, 16, 8),
            {"adaptive_scale": False},
        ),
    ],
    ids=["ImageNet-64", "LSUN-256"],
)
def test_published_configurations_are_understood(widths, attends, changes, resolutions, overrides):
    down = [("ResnetDownsampleBlock2D", "AttnDownBlock2D")[attention] for attention in attends]
    up = [("ResnetUpsampleBlock2D", "AttnUpBlock2D")[attention] for attention in reversed(attends)]
    config = OPENAI | changes | {"block_out_channels": widths, "down_block_types": down, "up_block_types": up}
    network = UNet2DConfig(**config).network()
    assert (network.model_channels, network.attn_resolutions) == (widths[0], resolutions)
    assert network.channel_mult == tuple(width // widths[0] for width in widths)
    assert network.num_blocks == config["layers_per_block"]
    assert network.overrides.given() == overrides


def test_norm_before_the_middle_attention_may_go_without_saying_where_diffusers_adds_it(tmp_path):
    model = model_of(header_of(SMALL | {"overrides": {"adaptive_scale": False}}))
    export_diffusers(model, tmp_path)
    edit(tmp_path / "unet/config.json", attn_norm_num_groups=None)
    assert_same_weights(import_diffusers(tmp_path)[0], model)


def test_half_precision_weights_load_as_they_are(exported):
    edit_weights(exported, lambda tensors: tensors.update({name: value.half() for name, value in tensors.items()}))
    stored, (model, _) = load_file(exported / WEIGHTS), import_diffusers(exported)
    weight = model.net.enc["16x16_conv"].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, stored["conv_in.weight"].float())


def test_bundle_is_exported_with_the_weights_asked_for(tmp_path):
    averaged, raw = write_bundle(tmp_path / "model.safetensors", header_of())
    for ema, expected in (("", averaged), ("main", averaged), ("net", raw)):
        export_diffusers(tmp_path, tmp_path / "out", ema=ema)
        assert_same_weights(import_diffusers(tmp_path / "out")[0], expected)
    with pytest.raises(ConfigError, match="ema: 'main'"):
        export_diffusers(raw, tmp_path / "out", ema="main")


def test_export_needs_no_diffusers(monkeypatch, tmp_path):
    for name in ("diffusers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    export_diffusers(model_of(header_of()), tmp_path)
    import_diffusers(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"model_index.json", "unet/config.json", WEIGHTS, "scheduler/scheduler_config.json"}


def test_timesteps_are_the_nearest_levels_of_the_pipeline(tmp_path):
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler()
    scheduler.set_timesteps(timesteps=[37, 22, 0])
    middle = scheduler.sigmas[1:3].tolist()
    assert pipeline_timesteps(tuple(middle)) == [37, 22, 0]
    assert pipeline_timesteps((middle[0] * 1.05, middle[1] * 0.95)) == [37, 22, 0]
    assert pipeline_timesteps(()) == [0]
    model = model_of(header_of(sampling=SamplingDefaults("consistency", (middle[0],))))
    assert export_diffusers(model, tmp_path) == [22, 0]
    (step, _) = export_diffusers(model, tmp_path, num_train_timesteps=1000)
    assert SchedulerConfig(num_train_timesteps=1000).sigmas()[step] == pytest.approx(middle[0], rel=6e-3)


@pytest.mark.parametrize("mid_sigmas", [(79.0,), (0.8, 0.81), (0.8, 2.0)])
def test_levels_that_the_grid_cannot_tell_apart_are_refused(mid_sigmas):
    with pytest.raises(ConfigError, match="num_train_timesteps"):
        pipeline_timesteps(mid_sigmas)


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        ({"family": "ddpmpp"}, {}, "skip_scale 0.7071.* instead of 1.0"),
        ({"family": "ncsnpp"}, {}, r"embedding 'fourier'.*encoder 'residual'.*resample_filter \(1.0, 3.0, 3.0, 1.0\)"),
        ({"family": "adm"}, {}, "noise_scale 1.0 instead of 1000.0, min_group_channels 4 instead of 1"),
        ({"overrides": {"resample_layers": "conv"}}, {}, "resample_layers 'conv'"),
        ({"second_time": True}, {}, "second_time"),
        ({"out_channels": 6}, {}, "6 output channels for 3"),
        ({"channel_mult": (2, 2)}, {}, r"channel_mult\[0\] is 2 instead of 1"),
        ({"attn_resolutions": (16,), "overrides": {"num_heads": 2, "channels_per_head": 0}}, {}, "heads are 16 and 32"),
        ({}, {"augment_dim": 9}, r"augment_dim"),
        ({}, {"preconditioner": {"kind": "edm", "sigma_data": 0.5}}, r"EDM\(sigma_data=0.5\).*edm_boundary"),
        ({}, {"preconditioner": {"kind": "edm_boundary", "sigma_data": 0.5, "sigma_min": 0.0}}, "sigma_min is 0.0"),
    ],
)  # fmt: skip
def test_what_diffusers_does_not_have_is_refused_by_name(network, changes, message, tmp_path):
    model = model_of(header_of(SMALL | network, **changes))
    with pytest.raises(ConfigError, match=f"cannot be written for diffusers.*{message}"):
        export_diffusers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_edm2_network_is_refused_with_what_to_do_instead(tmp_path):
    network = {"family": "edm2", "model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": ()}
    model = model_of(header_of(network))
    with pytest.raises(ConfigError, match=r"the network is a EDM2UNet.*--format hf"):
        export_diffusers(model, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"center_input_sample": True},
        {"time_embedding_type": "fourier"},
        {"freq_shift": 1},
        {"flip_sin_to_cos": False},
        {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]},
        {"down_block_types": ["ResnetDownsampleBlock2D"]},
        {"up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"]},
        {"mid_block_type": None},
        {"mid_block_scale_factor": 1.4142},
        {"block_out_channels": [32, 80]},
        {"block_out_channels": []},
        {"block_out_channels": "wide"},
        {"time_embedding_dim": 100},
        {"out_channels": 6},
        {"downsample_type": "conv"},
        {"upsample_type": "conv"},
        {"act_fn": "mish"},
        {"attention_head_dim": 48},
        {"norm_num_groups": 16},
        {"attn_norm_num_groups": None},
        {"norm_eps": 1e-6},
        {"resnet_time_scale_shift": "spatial"},
        {"add_attention": False},
        {"class_embed_type": "timestep"},
        {"sample_size": None},
        {"sample_size": [16, 32]},
        {"layers_per_block": 0},
        {"mixed_precision": "int4"},
    ],
    ids=str,
)
def test_a_network_that_ours_cannot_be_is_refused_by_key_and_value(exported, changes):
    edit(exported / "unet/config.json", **changes)
    ((key, value),) = changes.items()
    with pytest.raises(CheckpointError, match=r"unet/config\.json: ") as refused:
        import_diffusers(exported)
    assert f"{key}" in str(refused.value)
    wrong = value if not isinstance(value, list) or len(value) == 0 else value[0]
    assert repr(wrong) in str(refused.value) or str(value[-1]) in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_max": 14.6}, "sigma_max is 14.6.*80.0"),
        ({"s_noise": 1.007}, "s_noise is 1.007"),
        ({"sigma_min": 0}, "sigma_min is 0"),
        ({"sigma_data": "half"}, "sigma_data is 'half'"),
        ({"prediction_type": "v"}, "prediction_type is 'v'"),
        ({"_class_name": "DDPMScheduler"}, "'DDPMScheduler', expected 'CMStochasticIterativeScheduler'"),
    ],
)
def test_another_scheduler_is_refused_by_key_and_value(exported, changes, message):
    edit(exported / "scheduler/scheduler_config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"scheduler_config\.json: .*{message}"):
        import_diffusers(exported)


@pytest.mark.parametrize("name", ["unet/config.json", WEIGHTS, "scheduler/scheduler_config.json"])
def test_a_missing_or_damaged_file_is_named(exported, name):
    content = (exported / name).read_bytes()
    huge = (2**31).to_bytes(8, "little") + b"{" * 99  # a header of 2 GB, by its own account
    for damaged in (b"", b"[]", content[: len(content) // 2], b"\x00" * 100, b"\xff" * 8 + content, huge):
        (exported / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            import_diffusers(exported)
    (exported / name).unlink()
    with pytest.raises(CheckpointError, match=name.split("/")[-1]):
        import_diffusers(exported)


def test_a_folder_with_pickles_only_says_which_file_is_missing(exported):
    (exported / WEIGHTS).rename(exported / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: no such file; diffusion_pytorch_model.bin is a pickle.*never"):
        import_diffusers(exported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("conv_in.bias"), "'conv_in.bias' is missing"),
        (lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}), "'extra.weight' is not part"),
        (
            lambda tensors: tensors.update({"mid_block.attentions.0.to_k.weight": torch.zeros(64, 32)}),
            r"to_k.weight' has shape",
        ),
    ],
)
def test_weights_of_another_network_are_refused_by_name(exported, change, message):
    edit_weights(exported, change)
    with pytest.raises(CheckpointError, match=message):
        import_diffusers(exported)


def test_a_grid_of_one_point_is_refused(tmp_path):
    model = model_of(replace(header_of(), sampling=SamplingDefaults("consistency")))
    with pytest.raises(ConfigError, match="num_train_timesteps is 1"):
        export_diffusers(model, tmp_path, num_train_timesteps=1)
