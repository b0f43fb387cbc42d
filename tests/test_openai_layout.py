"""OpenAI's names and row orders to ours and back, what they tell of a network, and what a wrong checkpoint is told."""

import pytest
import torch
from golden_cases import load_case
from golden_models import openai_model_of

from fastcm.config import FamilyOverrides, UNetConfig
from fastcm.diffusion.preconditioners import EDM
from fastcm.errors import CheckpointError
from fastcm.io.openai_layout import describe_openai, from_openai, to_openai
from fastcm.nn import UNet
from fastcm.nn.build import build_network

CASES = ["E_unet_uncond", "E_unet_cond", "F_sony_net"]
IMAGENET = UNetConfig(
    family="openai", model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8)
)
LSUN = UNetConfig(
    family="openai", model_channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_blocks=2, attn_resolutions=(32, 16, 8)
)
PUBLISHED = {
    "CD, CT and EDM on ImageNet": (IMAGENET, 64, 1000, 295.9),
    "CTM on ImageNet": (IMAGENET.model_copy(update={"second_time": True}), 64, 1000, 324.1),
    "CD and CT on LSUN": (LSUN, 256, 0, 552.8),
    "guided diffusion with variances": (IMAGENET.model_copy(update={"out_channels": 6}), 64, 1000, 295.9),
}


def network(config, resolution, label_dim=0):
    with torch.device("meta"):
        return build_network(config, (3, resolution, resolution), label_dim)


@pytest.fixture(params=CASES)
def case(request):
    return load_case(request.param), openai_model_of(request.param, EDM()).net


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_round_trip_is_bit_for_bit(case, head_major, conv1d):
    golden, unet = case
    official = to_openai(unet.state_dict(), unet, head_major=head_major, conv1d=conv1d)
    assert official.keys() == golden.weights.keys()
    for key, expected in golden.weights.items():
        attention = key.endswith(("qkv.weight", "proj_out.weight"))
        assert official[key].shape == (expected.shape[:-1] if attention and conv1d else expected.shape)
        if not (head_major and ".qkv." in key):
            assert torch.equal(official[key].reshape(expected.shape), expected)
    ours = from_openai(official, unet, head_major=head_major)
    assert all(torch.equal(ours[name], value) for name, value in unet.state_dict().items())


def test_head_major_rows_are_those_of_each_head_in_turn():
    golden, unet = load_case("E_unet_uncond"), openai_model_of("E_unet_uncond", EDM()).net
    key, heads, width = "middle_block.1.qkv.bias", 2, 16
    plain = golden.weights[key]
    official = to_openai(unet.state_dict(), unet, head_major=True)[key]
    for head in range(heads):
        for which in range(3):
            rows = official[(head * 3 + which) * width :][:width]
            assert torch.equal(rows, plain[(which * heads + head) * width :][:width])


def test_values_keep_their_dtype_and_the_input_is_left_alone(case):
    golden, unet = case
    half = {name: value.half() for name, value in golden.weights.items()}
    before = {name: value.clone() for name, value in half.items()}
    ours = from_openai(half, unet, head_major=True)
    assert {value.dtype for value in ours.values()} == {torch.float16}
    assert all(torch.equal(half[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_recognised_and_have_the_published_size(name):
    config, resolution, label_dim, millions = PUBLISHED[name]
    unet = network(config, resolution, label_dim)
    assert round(sum(weight.numel() for weight in unet.parameters()) / 1e6, 1) == millions
    official = to_openai(unet.state_dict(), unet)
    assert "output_blocks.15.0.out_layers.3.weight" in official
    facts = describe_openai(official, resolution)
    assert (facts.network, facts.image_shape, facts.label_dim) == (config, (3, resolution, resolution), label_dim)


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"channel_mult": (1,), "attn_resolutions": ()}, {}),
        ({"channel_mult": (2, 1, 3), "num_blocks": 2, "attn_resolutions": (16, 4)}, {"channels_per_head": 32}),
        ({"channel_mult_emb": 2, "second_time": True}, {"channels_per_head": 0, "num_heads": 4, "num_heads_up": 2}),
        ({"overrides": {"adaptive_scale": False, "resample_layers": "conv"}}, {"channels_per_head": 64}),
    ],
)
def test_what_names_and_shapes_tell_is_the_network_they_came_from(options, heads):
    sizes = {"family": "openai", "model_channels": 64, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
    overrides = FamilyOverrides(**options.pop("overrides", {}), **heads)
    config = UNetConfig(**(sizes | options), overrides=overrides)
    unet = network(config, 16, label_dim=7)
    facts = describe_openai(to_openai(unet.state_dict(), unet), 16, FamilyOverrides(**heads))
    found = {name: value.shape for name, value in network(facts.network, 16, facts.label_dim).state_dict().items()}
    assert found == {name: value.shape for name, value in unet.state_dict().items()}
    assert facts.network.model_copy(update={"overrides": overrides}) == config
    assert facts.label_dim == 7
    per_head = heads.get("channels_per_head", 64)
    bottom = facts.build().dec[f"{16 >> len(config.channel_mult) - 1}x{16 >> len(config.channel_mult) - 1}_in0"]
    assert bottom.num_heads == (bottom.out_channels // per_head if per_head else heads["num_heads"])


GIVEN = FamilyOverrides(channels_per_head=16)


def dropped(name):
    return lambda state: state.pop(name)


def added(state):
    state["label_emb.bias"] = torch.zeros(128)


def reshaped(state):
    state["input_blocks.1.0.in_layers.2.weight"] = torch.zeros(32, 16, 3, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dropped("output_blocks.3.0.out_layers.3.bias"), r"lacks output_blocks\.3\.0\.out_layers\.3\.bias"),
        (added, r"has label_emb\.bias, which this network lacks"),
        (reshaped, r"input_blocks\.1\.0\.in_layers\.2\.weight has shape \(32, 16, 3, 3\).*\(32, 32, 3, 3\)"),
    ],
)
def test_checkpoint_that_does_not_fit_names_the_key(damage, message):
    state = dict(load_case("E_unet_uncond").weights)
    unet = describe_openai(state, 16, GIVEN).build()
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        from_openai(state, unet)


@pytest.mark.parametrize(
    ("change", "resolution", "given", "message"),
    [
        (dict, 16, {"channels_per_head": 64}, "32 channels wide.*channels_per_head 64"),
        (dict, 15, {"channels_per_head": 16}, "2 levels, but 15 pixels"),
        (dict, 16, {"channels_per_head": 16, "adaptive_scale": False}, "adaptive_scale was given as False.*has True"),
        (lambda state: {"time_embed.0.weight": state["time_embed.0.weight"]}, 16, {}, r"no output_blocks\.\*"),
        (lambda state: state | {"time_embed.0.weight": torch.zeros(3)}, 16, {}, r"time_embed\.0\.weight has shape \(3,\)"),
        (lambda state: state | {"time_embed.0.weight": torch.zeros(128, 24)}, 16, {"channels_per_head": 16}, "no multiple"),
        (lambda state: state | {"output_blocks.9.0.x": torch.zeros(1)}, 16, {}, "5 output_blocks.*2 levels"),
        (lambda state: {k: v for k, v in state.items() if "input_blocks.3" not in k}, 16, {}, r"lacks input_blocks\.3\.0"),
    ],
)
def test_checkpoint_of_another_kind_or_contradicted_is_refused(change, resolution, given, message):
    state = change(dict(load_case("E_unet_uncond").weights))
    with pytest.raises(CheckpointError, match=message):
        describe_openai(state, resolution, FamilyOverrides(**given))


def test_networks_that_the_layout_cannot_hold_are_refused():
    with torch.device("meta"):
        adm = UNet("adm", 16, 3, model_channels=32, channel_mult=(1, 1), num_blocks=1)
        augmented = UNet("openai", 16, 3, augment_dim=9, model_channels=32, channel_mult=(1, 1), num_blocks=1)
    for unet, what in ((adm, "frequencies"), (augmented, "augment_dim")):
        with pytest.raises(CheckpointError, match=f"no place for a network of this {what}"):
            to_openai(unet.state_dict(), unet)
