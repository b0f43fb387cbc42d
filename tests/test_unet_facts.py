"""What the names and shapes of EDM's state dicts tell of their networks, and the options that only such networks need."""

import pytest
import torch
from golden_cases import case_names, load_case

from fastcm.config import FamilyOverrides, UNetConfig
from fastcm.errors import CheckpointError, ConfigError
from fastcm.io.edm_layout import describe_edm, from_edm, to_edm
from fastcm.nn import UNet
from fastcm.nn.blocks import Block
from fastcm.nn.build import build_network
from fastcm.random import Stream

CASES = [name for name in case_names("A_") if name != "A_precond_tables"] + ["C_ecm_net", "F_kim_net"]
SMALL = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}


def weights_of(name):
    return {key: value for key, value in load_case(name).weights.items() if key != "u"}


def built(config, label_dim=0, augment_dim=0, **options):
    return build_network(config, (3, 8, 8), label_dim, augment_dim, **options).init_weights(0)


@pytest.mark.parametrize("name", CASES)
def test_official_networks_are_recognised(name):
    weights = weights_of(name)
    net = describe_edm(weights).build()
    net.load_state_dict(from_edm(weights, net))
    official = to_edm(net.state_dict(), net)
    assert all(torch.equal(official[key], value) for key, value in weights.items())


@pytest.mark.parametrize(
    ("options", "conditions"),
    [
        ({"family": "ddpmpp", "channel_mult": (2, 2), "num_blocks": 2, "attn_resolutions": (8, 4)}, (10, 9)),
        (
            {"family": "ddpmpp", "overrides": {"encoder": "skip", "decoder": "skip", "resample_filter": (1.0, 3.0, 3.0, 1.0)}},
            (0, 0),
        ),
        ({"family": "ncsnpp", "fourier_scale": 0.02, "second_time": True}, (0, 9)),
        ({"family": "ncsnpp", "overrides": {"channel_mult_noise": 1, "adaptive_scale": True}}, (0, 0)),
        ({"family": "adm", "channel_mult": (4, 8), "channel_mult_emb": 2, "out_channels": 6}, (10, 0)),
    ],
)
def test_what_names_and_shapes_tell_is_the_network_they_came_from(options, conditions):
    overrides = FamilyOverrides(**options.pop("overrides", {}))
    config = UNetConfig(**(SMALL | options), overrides=overrides)
    net = built(config, *conditions)
    facts = describe_edm(to_edm(net.state_dict(), net))
    assert (facts.network, facts.image_shape) == (config, (3, 8, 8))
    assert (facts.label_dim, facts.augment_dim) == conditions


def test_number_of_heads_is_given_since_it_cannot_be_seen():
    weights = weights_of("A_ddpmpp_uncond")
    facts = describe_edm(weights, FamilyOverrides(num_heads=2, num_heads_up=4))
    heads = {block.num_heads for block in facts.build().modules() if isinstance(block, Block)}
    assert heads == {0, 2, 4}


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (lambda state: {}, {}, r"no enc\.\*_block0"),
        (lambda state: {k: v for k, v in state.items() if k != "map_layer0.weight"}, {}, r"lacks map_layer0\.weight"),
        (lambda state: state | {"map_layer0.weight": torch.zeros(64)}, {}, r"map_layer0\.weight has shape \(64,\)"),
        (lambda state: state | {"map_layer0.weight": torch.zeros(64, 24)}, {}, "24 channels wide.*model_channels 16"),
        (lambda state: state | {"enc.16x16_block0.conv0.weight": torch.zeros(0, 16, 3, 3)}, {}, "0 channels wide"),
        (dict, {"encoder": "residual"}, "encoder was given as residual.*has standard"),
        (lambda state: state | {f"{k}": -v for k, v in state.items() if "filter" in k}, {}, "is no filter to resample with"),
    ],
)
def test_checkpoint_of_another_kind_or_contradicted_is_refused(change, given, message):
    with pytest.raises(CheckpointError, match=message):
        describe_edm(change(weights_of("A_ddpmpp_uncond")), FamilyOverrides(**given))


def test_overrides_are_stored_only_where_given_and_read_back():
    config = UNetConfig(overrides=FamilyOverrides(resample_filter=(1.0, 2.0, 1.0), num_heads=4))
    dumped = config.model_dump(mode="json")
    assert dumped["overrides"] == {"resample_filter": [1.0, 2.0, 1.0], "num_heads": 4}
    assert UNetConfig().model_dump()["overrides"] == {}
    assert UNetConfig.model_validate(dumped) == config


def test_heads_that_do_not_divide_the_width_are_an_error():
    with pytest.raises(ConfigError, match="do not divide into 3 attention heads"):
        built(UNetConfig(**SMALL, overrides=FamilyOverrides(num_heads=3)))


@pytest.mark.parametrize("family", ["ddpmpp", "openai"])
def test_plain_convolutions_can_change_the_resolution(family):
    config = UNetConfig(
        family=family, **(SMALL | {"model_channels": 32}), overrides=FamilyOverrides(resample_layers="conv", num_heads=1)
    )
    net = built(config)
    assert {name for name, _ in net.enc["4x4_down"].named_parameters()} == {"weight", "bias"}
    assert {name for name, _ in net.dec["8x8_up"].named_parameters()} == {"weight", "bias"}
    x = Stream(0, "x").image_normal(torch.arange(2), (3, 8, 8))
    features = Stream(1, "x").image_normal(torch.arange(2), (32, 8, 8))
    down = net.enc["4x4_down"](features, None)
    expected = torch.nn.functional.conv2d(features, net.enc["4x4_down"].weight, net.enc["4x4_down"].bias, padding=1)
    torch.testing.assert_close(down, expected[:, :, ::2, ::2])
    assert net(x, torch.zeros(2)).shape == x.shape


def test_dropout_reaches_only_resolutions_up_to_the_largest_one():
    net = UNet("ddpmpp", 8, 3, **SMALL, dropout=0.3, dropout_max_resolution=4)
    rates = {name: module.dropout for name, module in net.named_modules() if isinstance(module, Block)}
    assert {rate for name, rate in rates.items() if "8x8" in name} == {0.0}
    assert {rate for name, rate in rates.items() if "4x4" in name} == {0.3}
    config = UNetConfig(**SMALL)
    everywhere, limited = (built(config, dropout=0.3, dropout_max_resolution=limit) for limit in (0, 4))
    assert {module.dropout for module in everywhere.modules() if isinstance(module, Block)} == {0.3}
    assert limited.dec["4x4_in0"].dropout == 0.3
    assert limited.dec["8x8_up"].dropout == 0.0
