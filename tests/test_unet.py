import copy
import math
from dataclasses import replace

import pytest
import torch

from fastcm.config import UNetConfig
from fastcm.errors import CheckpointError, ConfigError
from fastcm.io.edm_layout import from_edm, to_edm
from fastcm.nn import FAMILIES, UNet
from fastcm.nn.build import build_network
from fastcm.nn.layers import GroupNorm, store_convolutions
from fastcm.random import Stream

CHANNELS_LAST = torch.channels_last
ADM_IMAGENET = {
    "label_dim": 1000,
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "num_blocks": 3,
    "attn_resolutions": (32, 16, 8),
}
SKIP = replace(FAMILIES["ddpmpp"], encoder="skip", decoder="skip", resample_filter=(1.0, 3.0, 3.0, 1.0))
ALL_FAMILIES = pytest.mark.parametrize("family", ["ddpmpp", "ncsnpp", "adm", SKIP], ids=["ddpmpp", "ncsnpp", "adm", "skip"])


def tiny(family="ddpmpp", **options):
    width = 32 if family == "openai" else 16  # its norms have 32 groups
    sizes = {"model_channels": width, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
    return UNet(family, 8, 1, **(sizes | options)).init_weights(0)


def perturbed(unet, purpose="perturb"):
    """The network with every parameter moved, so that nothing is left at its (nearly) zero start."""
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            noise = Stream(1, f"{purpose}/{name}").normal(torch.zeros(1, dtype=torch.int64), tuple(weight.shape))[0]
            weight += 0.1 * noise
    return unet


def inputs(n=3, channels=1, size=8, first=0):
    index = torch.arange(first, first + n)
    return Stream(0, "x").image_normal(index, (channels, size, size)), Stream(0, "c_noise").normal(index)


def dropout_key(n=3, first=0, seed=0):
    return Stream(seed, "dropout").at(torch.arange(first, first + n))


def count(*args, **options):
    with torch.device("meta"):
        return sum(weight.numel() for weight in UNet(*args, **options).parameters())


def test_parameter_counts_are_the_published_ones():
    counts = {
        "DDPM++": (count("ddpmpp", 32, 3), 55_732_739, 55.73),
        "NCSN++": (count("ncsnpp", 32, 3), 56_395_523, 56.40),
        "NCSN++ of twice the depth": (count("ncsnpp", 32, 3, num_blocks=8), 97_610_499, 97.61),
        "ADM": (count("adm", 64, 3, **ADM_IMAGENET), 295_899_267, 295.90),
        "CTM on DDPM++": (count("ddpmpp", 32, 3, second_time=True), 60_395_267, 60.40),
    }
    for actual, exact, published in counts.values():
        assert actual == exact
        assert round(actual / 1e6, 2) == published


def test_constants_are_those_of_the_papers():
    ddpmpp, ncsnpp, adm = (FAMILIES[name] for name in ("ddpmpp", "ncsnpp", "adm"))
    assert (ddpmpp.eps, ncsnpp.eps, adm.eps) == (1e-6, 1e-6, 1e-5)
    assert [GroupNorm(channels, 1e-6).num_groups for channels in (2, 4, 16, 96, 128, 256, 1024)] == [1, 1, 4, 24, 32, 32, 32]
    assert [adm.heads(channels) for channels in (48, 64, 192, 768)] == [0, 1, 3, 12]
    assert [ddpmpp.heads(channels) for channels in (16, 256)] == [1, 1]
    stems = [tiny(family, channel_mult=(2, 2)).enc["8x8_conv"].weight.shape[0] for family in FAMILIES]
    assert stems == [16, 16, 32, 64]
    with torch.device("meta"):
        unet = UNet("adm", 64, 3, **ADM_IMAGENET)
        first, deep = unet.enc["32x32_block0"], unet.dec["8x8_block1"]
        attention = [name for name, block in UNet("ddpmpp", 32, 3).named_modules() if getattr(block, "num_heads", 0)]
    assert (first.num_heads, deep.num_heads) == (6, 12)
    assert attention == [*(f"enc.16x16_block{i}" for i in range(4)), "dec.8x8_in0", "dec.16x16_block4"]


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_family_eps_reaches_the_norms(eps):
    unet = tiny(replace(FAMILIES["ddpmpp"], eps=eps))
    assert {module.eps for module in unet.modules() if isinstance(module, GroupNorm)} == {eps}


@ALL_FAMILIES
def test_tiny_grey_images_work_with_all_conditions(family):
    unet = perturbed(tiny(family, label_dim=10, augment_dim=9))
    x, c_noise = inputs()
    out = unet(x, c_noise, labels=torch.eye(10)[:3], augment=torch.ones(3, 9))
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert tiny(family, out_channels=2)(x, c_noise).shape == (3, 2, 8, 8)


@ALL_FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_the_input_and_is_channels_last(family, dtype):
    unet = perturbed(UNet(family, 8, 3, model_channels=16, channel_mult=(1, 2), num_blocks=1).init_weights(0))
    x, c_noise = inputs(channels=3)
    out = unet(x.to(dtype), c_noise)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(unet(x.to(dtype).contiguous(), c_noise), out)
    torch.testing.assert_close(out.float(), unet(x, c_noise), rtol=0.1, atol=0.1)


def test_bfloat16_torso_leaves_parameters_and_gradients_in_fp32():
    unet = perturbed(tiny())
    x, c_noise = inputs()
    unet(x.bfloat16(), c_noise).float().square().sum().backward()
    assert {weight.dtype for weight in unet.parameters()} == {torch.float32}
    assert all(weight.grad.dtype == torch.float32 and weight.grad.isfinite().all() for weight in unet.parameters())


def test_noise_level_keeps_fp32_precision_under_bfloat16():
    unet = perturbed(tiny("ncsnpp"))
    x, _ = inputs(n=1)
    near, far = (unet.embed(torch.tensor([value]))[0] for value in (0.5, 0.5002))
    assert not torch.equal(near, far)
    assert not torch.equal(unet(x.bfloat16(), torch.tensor([0.5])), unet(x.bfloat16(), torch.tensor([0.52])))


def test_convolution_weights_are_channels_last_in_memory():
    for weight in tiny().parameters():
        assert weight.ndim != 4 or weight.is_contiguous(memory_format=CHANNELS_LAST)


def test_labels_and_augmentation_change_the_output():
    for family in FAMILIES:
        unet = perturbed(tiny(family, label_dim=10, augment_dim=9))
        x, c_noise = inputs()
        plain = unet(x, c_noise)
        assert not torch.allclose(unet(x, c_noise, labels=torch.eye(10)[:3]), plain)
        assert not torch.allclose(unet(x, c_noise, augment=torch.ones(3, 9)), plain)
        torch.testing.assert_close(unet(x, c_noise, labels=torch.zeros(3, 10)), plain)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_same_dropout_key_gives_the_same_output_and_another_index_another(family):
    unet = perturbed(tiny(family, dropout=0.3))
    x, c_noise = inputs()
    once = unet(x, c_noise, dropout=dropout_key())
    assert torch.equal(unet(x, c_noise, dropout=dropout_key()), once)
    assert torch.equal(copy.deepcopy(unet).eval()(x, c_noise, dropout=dropout_key()), once)
    for other in (dropout_key(first=1), dropout_key(seed=1), None):
        assert not torch.allclose(unet(x, c_noise, dropout=other), once)


def test_dropout_of_a_sample_does_not_depend_on_its_batch():
    unet = perturbed(tiny(dropout=0.3))
    together = unet(*inputs(4), dropout=dropout_key(4))
    for first in range(4):
        alone = unet(*inputs(1, first=first), dropout=dropout_key(1, first=first))
        torch.testing.assert_close(alone, together[first : first + 1])


def test_each_block_has_its_own_dropout_mask_at_the_stated_rate():
    unet, kept = perturbed(tiny(dropout=0.25)), {}

    def record(module, inputs, output):
        kept[id(module)] = (output != 0).flatten()

    for module in unet.modules():
        if hasattr(module, "site"):
            module.norm1.register_forward_hook(record)
    unet(*inputs(64), dropout=dropout_key(64))
    masks = list(kept.values())
    sites = [module.site for module in unet.modules() if hasattr(module, "site")]
    assert len(masks) == len(set(sites)) == len(sites) == 10
    assert abs(torch.cat(masks).float().mean().item() - 0.75) < 0.003
    pairs = [(a, b) for i, a in enumerate(masks) for b in masks[:i] if a.shape == b.shape]
    assert pairs
    assert all(abs((a == b).float().mean().item() - (0.75**2 + 0.25**2)) < 0.02 for a, b in pairs)


@ALL_FAMILIES
def test_second_time_has_no_effect_at_initialisation_but_gradient(family):
    plain, jump = perturbed(tiny(family)), perturbed(tiny(family))
    jump = tiny(family, second_time=True)
    jump.load_state_dict(jump.state_dict() | plain.state_dict())
    x, c_noise = inputs()
    out = jump(x, c_noise, c_noise - 1)
    torch.testing.assert_close(out, plain(x, c_noise), rtol=0, atol=0)
    out.square().sum().backward()
    assert all(block.affine_s.weight.grad.abs().sum() > 0 for block in jump.modules() if hasattr(block, "affine_s"))


@ALL_FAMILIES
def test_second_time_changes_the_output_once_trained(family):
    jump = perturbed(tiny(family, second_time=True, label_dim=10))
    x, c_noise = inputs()
    labels = torch.eye(10)[:3]
    assert not torch.allclose(jump(x, c_noise, c_noise, labels), jump(x, c_noise, c_noise - 1, labels))


def test_class_labels_enter_the_second_embedding_where_they_enter_before_the_mlp():
    c_noise, labels = torch.zeros(3), torch.eye(10)[:3]
    for family, enters in (("ddpmpp", True), ("adm", False)):
        jump = perturbed(tiny(family, second_time=True, label_dim=10))
        _, second = jump.embed(c_noise, c_noise, labels)
        assert torch.allclose(second[0], second[1]) != enters


@pytest.mark.parametrize("family", list(FAMILIES))
def test_initial_weights_do_not_touch_the_global_generator_and_repeat(family):
    before = torch.get_rng_state()
    first, second, other = tiny(family), tiny(family), UNet(family, 8, 1, model_channels=16).init_weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.map_layer0.weight, other.map_layer0.weight)
    longer = tiny(family, num_blocks=2, second_time=True).state_dict()
    assert torch.equal(first.enc["8x8_block0"].conv0.weight, longer["enc.8x8_block0.conv0.weight"])


def test_network_is_nan_until_initialised():
    unet = UNet("ncsnpp", 8, 1, model_channels=16)
    assert all(value.isnan().all() for value in unet.state_dict().values())
    assert all(value.isfinite().all() for value in unet.init_weights(0).state_dict().values())


def bound_of(weight):
    return weight.abs().max().item()


def test_xavier_bounds_and_near_zero_outputs_of_the_song_networks():
    unet = UNet("ncsnpp", 8, 3, label_dim=10, augment_dim=9, model_channels=32, attn_resolutions=(8,)).init_weights(0)
    block, dim = unet.enc["8x8_block1"], 64
    xavier = math.sqrt(6 / (2 * dim))
    bounds = {
        block.conv0.weight: xavier / 3,
        block.conv1.weight: 1e-5 * xavier / 3,
        block.qkv.weight: math.sqrt(0.2) * math.sqrt(6 / (4 * dim)),
        block.proj.weight: 1e-5 * xavier,
        block.affine.weight: math.sqrt(6 / (128 + 64)),
        unet.map_label.weight: math.sqrt(6 / (10 + 64)),
        unet.map_augment.weight: math.sqrt(6 / (9 + 64)),
        unet.dec["8x8_aux_conv"].weight: 1e-5 * math.sqrt(6 / (9 * (64 + 3))),
    }
    for weight, bound in bounds.items():
        assert bound * 0.97 < bound_of(weight) <= bound * 1.000001
    assert all(bound_of(weight) == 0 for name, weight in unet.named_parameters() if name.endswith("bias"))
    assert all((weight == 1).all() for name, weight in unet.named_parameters() if "norm" in name and name.endswith("weight"))
    normal = Stream(0, "init/map_noise.freqs").normal(torch.zeros(1, dtype=torch.int64), (32,))[0]
    torch.testing.assert_close(unet.map_noise.freqs, 16 * normal)
    ect = UNet("ncsnpp", 8, 3, model_channels=32, fourier_scale=0.02).init_weights(0)
    torch.testing.assert_close(ect.map_noise.freqs * 800, unet.map_noise.freqs)


def test_kaiming_bounds_and_zero_outputs_of_adm():
    unet = UNet("adm", 8, 3, label_dim=10, augment_dim=9, model_channels=64, attn_resolutions=(8,)).init_weights(0)
    block = unet.enc["8x8_block1"]
    for layer, fan_in in ((block.conv0, 9 * 128), (block.qkv, 128), (block.affine, 256), (unet.map_layer0, 64)):
        bound = math.sqrt(1 / 3) * math.sqrt(3 / fan_in)
        assert bound * 0.99 < bound_of(layer.weight) <= bound * 1.000001
        assert bound * 0.9 < bound_of(layer.bias) <= bound * 1.000001
    for layer in (block.conv1, block.proj, unet.out_conv):
        assert bound_of(layer.weight) == bound_of(layer.bias) == 0
    assert bound_of(unet.map_augment.weight) == 0
    assert unet.map_label.bias is None
    assert unet.map_label.weight.std().item() == pytest.approx(1, rel=0.05)


def test_weights_are_the_named_stream():
    unet = tiny()
    uniform = Stream(0, "init/map_layer0.weight").uniform(torch.zeros(1, dtype=torch.int64), (64, 16))[0]
    torch.testing.assert_close(unet.map_layer0.weight, (2 * uniform - 1) * math.sqrt(6 / 80))


@pytest.mark.parametrize(
    ("family", "backend", "dropout"),
    [("ddpmpp", "aot_eager", 0.0), ("adm", "aot_eager", 0.0), ("ncsnpp", "aot_eager", 0.2), (SKIP, "eager", 0.2)],
)
def test_forward_and_backward_compile_without_graph_breaks(family, backend, dropout):
    unet = perturbed(tiny(family, dropout=dropout, label_dim=10, augment_dim=9, second_time=True))
    x, c_noise = inputs()
    arguments = (x, c_noise, c_noise - 1, torch.eye(10)[:3], torch.ones(3, 9), dropout_key())
    expected = unet(*arguments)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), unet.map_layer0.weight)
    actual = torch.compile(unet, fullgraph=True, backend=backend)(*arguments)
    torch.testing.assert_close(actual, expected)
    (grad,) = torch.autograd.grad(actual.square().sum(), unet.map_layer0.weight)
    # Compiled and eager group norm are two fp32 algorithms; either is about 2e-6 of the largest gradient from fp64's.
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=4e-6 * expected_grad.abs().max().item())


def test_network_can_be_copied_for_an_average():
    unet = tiny()
    twin = copy.deepcopy(unet)
    x, c_noise = inputs()
    assert torch.equal(twin(x, c_noise), unet(x, c_noise))


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"x_NCHW": torch.zeros(3, 1, 16, 16)}, r"shape \(3, 1, 16, 16\).*\[N, 1, 8, 8\]"),
        ({}, {"x_NCHW": torch.zeros(3, 3, 8, 8)}, "takes"),
        ({}, {"x_NCHW": torch.zeros(3, 1, 8, 4)}, "takes"),
        ({}, {"labels": torch.zeros(3, 10)}, "built without them .label_dim=0"),
        ({}, {"augment": torch.zeros(3, 9)}, "built without them .augment_dim=0"),
        ({"label_dim": 10}, {"labels": torch.zeros(3, 9)}, r"labels have shape \(3, 9\).*rows of 10 for 3 images"),
        ({}, {"second_N": torch.zeros(3)}, "was given"),
        ({"second_time": True}, {}, "is missing"),
    ],
)
def test_arguments_the_network_was_not_built_for_are_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)(**({"x_NCHW": torch.zeros(3, 1, 8, 8), "c_noise_N": torch.zeros(3)} | arguments))


@pytest.mark.parametrize(
    ("family", "resolution", "options", "message"),
    [
        ("vgg", 32, {}, "no network family 'vgg'; choose one of ddpmpp, ncsnpp, adm"),
        ("ddpmpp", 30, {}, "resolution 30 cannot be halved for 3 levels"),
        ("ddpmpp", 32, {"model_channels": 25}, "even"),
        ("ddpmpp", 32, {"model_channels": 48, "channel_mult": (1, 2)}, "do not divide into 32 groups"),
    ],
)
def test_sizes_that_cannot_work_are_refused(family, resolution, options, message):
    with pytest.raises(ValueError, match=message):
        UNet(family, resolution, 3, **options)


def test_multi_head_qkv_rows_are_permuted_between_the_layouts():
    unet = UNet("adm", 8, 1, model_channels=128, channel_mult=(1,), num_blocks=1, attn_resolutions=(8,)).init_weights(0)
    official = to_edm(unet.state_dict(), unet)["enc.8x8_block0.qkv.weight"]
    ours = unet.enc["8x8_block0"].qkv.weight
    heads, head_dim = 2, 64
    for head, channel, kind in ((0, 0, 0), (0, 5, 2), (1, 0, 1), (1, 63, 2)):
        row = kind * heads * head_dim + head * head_dim + channel
        assert torch.equal(official[head * 3 * head_dim + 3 * channel + kind], ours[row])


def official_state(unet):
    return to_edm(unet.state_dict(), unet)


def test_checkpoints_of_other_networks_are_refused_by_key():
    unet = tiny("ncsnpp", augment_dim=9)
    state = official_state(unet)
    name = "enc.8x8_block0.conv0.weight"
    with pytest.raises(CheckpointError, match=rf"lacks {name}"):
        from_edm({key: value for key, value in state.items() if key != name}, unet)
    with pytest.raises(CheckpointError, match="has label_embedding, which"):
        from_edm(state | {"label_embedding": torch.zeros(1)}, unet)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(1, 2\).*needs \(16, 16, 3, 3\)"):
        from_edm(state | {name: torch.zeros(1, 2)}, unet)
    with pytest.raises(CheckpointError, match=r"enc.4x4_down.conv0.resample_filter is not the filter"):
        from_edm(state | {"enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 4, 4)}, unet)
    with pytest.raises(CheckpointError, match=r"lacks map_noise\.freqs and 145 more"):
        to_edm({}, unet)


def test_entries_can_be_left_out_on_purpose():
    state = official_state(tiny(augment_dim=9))
    with pytest.raises(CheckpointError, match=r"has map_augment\.weight"):
        from_edm(state, tiny())
    loaded = from_edm(state, tiny(), drop=("map_augment.",))
    assert loaded.keys() == tiny().state_dict().keys()


def test_import_neither_changes_nor_copies_more_than_it_must():
    unet = tiny()
    state = official_state(unet)
    loaded = from_edm(state, unet)
    assert loaded["map_layer0.weight"] is state["map_layer0.weight"]
    assert all(torch.equal(loaded[name], value) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("family", [*FAMILIES, SKIP], ids=[*FAMILIES, "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convolutions_stored_in_the_dtype_they_are_used_in_give_the_same_bits(family, dtype):
    unet = perturbed(tiny(family))
    x, c_noise = inputs()
    expected = unet(x.to(dtype), c_noise)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    store_convolutions(unet, dtype)
    assert torch.equal(unet(x.to(dtype), c_noise), expected)
    stored = {name: weight for name, weight in unet.named_parameters() if weight.dtype == dtype != torch.float32}
    whole = sum(weight.numel() for name, weight in before.items() if weight.ndim == 4)
    assert sum(weight.numel() for weight in stored.values()) >= 0.9 * whole * (dtype != torch.float32)
    assert all(weight.ndim == 4 and weight.is_contiguous(memory_format=CHANNELS_LAST) for weight in stored.values())
    assert all(weight.dtype == torch.float32 for name, weight in unet.named_parameters() if name not in stored)


def test_fewer_output_channels_than_the_image_has_are_refused():
    with pytest.raises(ConfigError, match="out_channels is 2, but the images have 3 channels"):
        build_network(UNetConfig(family="adm", model_channels=32, out_channels=2), (3, 32, 32), 0, 0)
