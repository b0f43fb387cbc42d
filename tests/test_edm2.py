"""EDM2's U-Net: sizes, numerics, forced weight normalisation, dropout, compilation, what it refuses."""

import copy
import math

import pytest
import torch
from edm2_cases import dropout_key, inputs, tiny, with_gains
from torch import Tensor

from fastcm import ops
from fastcm.bench.shapes import AttentionShape, conv_calls, kernel_calls
from fastcm.config import EDM2Config
from fastcm.errors import CheckpointError, ConfigError
from fastcm.io.edm2_layout import from_edm2, to_edm2
from fastcm.kernels.philox import random_dropout
from fastcm.nn import EDM2UNet
from fastcm.nn.build import build_network
from fastcm.nn.magnitude_preserving import MPConv, mp_cat, mp_silu, mp_sum, normalize
from fastcm.random import Stream

FOURIER = [("freqs", "normal"), ("phases", "uniform")]
CHANNELS_LAST = torch.channels_last


def on_meta(*args, **options) -> EDM2UNet:
    with torch.device("meta"):
        return EDM2UNet(*args, **options)


@pytest.mark.parametrize(
    ("channels", "published"),
    [(128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5), (384, 1119.3)],
    ids=["XS", "S", "M", "L", "XL"],
)
def test_parameter_counts_are_the_published_ones(channels, published):
    net = on_meta(64, 3, label_dim=1000, model_channels=channels)
    assert round(sum(weight.numel() for weight in net.parameters()) / 1e6, 1) == published


def test_attention_is_where_the_paper_has_it():
    net = on_meta(64, 3)
    heads = {name: block.num_heads for name, block in net.named_modules() if getattr(block, "num_heads", 0)}
    expected = {f"enc.16x16_block{i}": 9 for i in range(3)} | {f"enc.8x8_block{i}": 12 for i in range(3)} | {"dec.8x8_in0": 12}
    assert heads == expected | {f"dec.8x8_block{i}": 12 for i in range(4)} | {f"dec.16x16_block{i}": 9 for i in range(4)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_output_has_the_dtype_of_the_input_and_is_channels_last(dtype, tolerance):
    net = with_gains(EDM2UNet(8, 3, model_channels=16, channel_mult=(1, 2), num_blocks=1, label_dim=10).init_weights(0))
    x, c_noise = inputs(channels=3)
    out = net(x.to(dtype), c_noise, labels=torch.eye(10)[:3])
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(net(x.to(dtype).contiguous(), c_noise, labels=torch.eye(10)[:3]), out)
    torch.testing.assert_close(out.float(), net(x, c_noise, labels=torch.eye(10)[:3]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_torso_leaves_parameters_and_gradients_in_fp32(dtype):
    net, gradients = with_gains(tiny()), {}
    for torso in (torch.float32, dtype):
        net.zero_grad()
        x, c_noise = inputs()
        (net(x.to(torso), c_noise).float().square().sum() + net.log_variance(c_noise).sum()).backward()
        gradients[torso] = [weight.grad.clone() for weight in net.parameters()]
    assert {gradient.dtype for found in gradients.values() for gradient in found} == {torch.float32}
    half, full = (
        torch.cat([gradient.flatten() for gradient in found]) for found in (gradients[dtype], gradients[torch.float32])
    )
    assert (half - full).norm() < 0.03 * full.norm()


def test_float64_network_agrees_with_float32():
    net, (x, c_noise) = with_gains(tiny(label_dim=10)), inputs()
    single = net(x, c_noise, labels=torch.eye(10)[:3])
    double = copy.deepcopy(net).double()(x.double(), c_noise.double(), labels=torch.eye(10).double()[:3])
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_noise_level_keeps_fp32_precision_under_bfloat16():
    near, far = (with_gains(tiny()).embed(torch.tensor([value])) for value in (0.5, 0.5002))
    assert not torch.equal(near, far)


@pytest.mark.parametrize("size", [1, 5, 7])
def test_odd_sizes_and_widths_work(size):
    net = with_gains(
        EDM2UNet(size, 1, model_channels=6, channel_mult=(1,), num_blocks=1, attn_resolutions=(size,)).init_weights(0)
    )
    out = net(*inputs(size=size))
    assert out.shape == (3, 1, size, size)
    assert out.isfinite().all()
    assert out.std() > 0


def random(shape, purpose, dtype=torch.float64) -> Tensor:
    return Stream(0, purpose).normal(torch.zeros(1, dtype=torch.int64), shape)[0].to(dtype).requires_grad_()


class Weighted(torch.nn.Module):
    """An ``MPConv`` as a function of input, stored weight and gain."""

    def __init__(self, weight, kernel):
        super().__init__()
        self.conv = MPConv(weight.shape[1], weight.shape[0], kernel)

    def forward(self, x, weight, gain):
        return torch.func.functional_call(self.conv, {"weight": weight}, (x, gain))


PRIMITIVES = {
    "pixel norm": (lambda a: normalize(a, (1,)), [(2, 4, 3, 2)]),
    "norm of all": (lambda a: normalize(a, (1, 2, 3)), [(2, 4, 3, 2)]),
    "mp_silu": (mp_silu, [(2, 4)]),
    "mp_sum": (lambda a, b: mp_sum(a, b, 0.3), [(2, 4), (2, 4)]),
    "mp_cat": (lambda a, b: mp_cat(a, b, 0.4), [(2, 4, 3, 2), (2, 3, 3, 2)]),
    "dropout": (lambda a: random_dropout(a, 0.3, dropout_key(2)), [(2, 4, 3, 2)]),
    "convolution": (Weighted(torch.empty(2, 3), 3), [(2, 3, 4, 3), (2, 3, 3, 3), ()]),
    "linear": (Weighted(torch.empty(2, 3), 0), [(2, 3), (2, 3), ()]),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_gradients_of_primitives_are_those_of_finite_differences(name):
    function, shapes = PRIMITIVES[name]
    arguments = [random(shape, f"argument{i}") for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, arguments)


def test_pixel_norm_of_a_black_pixel_is_black_and_has_a_finite_gradient():
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    y = normalize(x, (1,))
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()


def test_layers_keep_the_magnitude_of_unit_normal_activations():
    conv, linear = MPConv(32, 64, 3), MPConv(64, 128)
    for layer, x in ((conv, random((8, 32, 16, 16), "x", torch.float32)), (linear, random((512, 64), "x", torch.float32))):
        layer.load_state_dict({"weight": 7 * random(tuple(layer.weight.shape), "w", torch.float32).detach()})
        assert layer(x).std().item() == pytest.approx(1, rel=0.05)
        assert layer(x, 3.0).std().item() == pytest.approx(3, rel=0.05)
        assert mp_silu(x).square().mean().sqrt().item() == pytest.approx(1, rel=0.02)


def test_the_gradient_of_a_weight_is_orthogonal_to_it():
    net, (x, c_noise) = with_gains(tiny().double()), inputs()
    net(x.double(), c_noise.double()).square().sum().backward()
    for name, weight in net.named_parameters():
        if weight.ndim and "logvar" not in name:
            along = (weight.grad * weight).flatten(1).sum(1)
            assert (along.abs() <= 2e-4 * weight.grad.flatten(1).norm(dim=1) * weight.flatten(1).norm(dim=1)).all()


def test_embedding_and_output_gains_begin_at_zero_and_weights_are_the_named_stream():
    net = tiny(label_dim=10)
    assert all(not weight.any() for weight in net.parameters() if not weight.ndim)
    assert not net(*inputs()).any()
    only = torch.zeros(1, dtype=torch.int64)
    layer = net.enc["8x8_block0"].conv_res0.weight
    assert torch.equal(layer, Stream(0, "init/enc.8x8_block0.conv_res0.weight").normal(only, tuple(layer.shape))[0])
    freqs, phases = (getattr(Stream(0, f"init/emb_fourier.{leaf}"), draw)(only, (16,))[0] for leaf, draw in FOURIER)
    torch.testing.assert_close(net.emb_fourier.freqs, 2 * math.pi * freqs)
    torch.testing.assert_close(net.emb_fourier.phases, 2 * math.pi * phases)


def test_network_is_nan_until_initialised_and_no_global_generator_is_touched():
    before = torch.get_rng_state()
    net = EDM2UNet(8, 1, model_channels=16, channel_mult=(1, 2), label_dim=10)
    assert all(value.isnan().all() for value in net.state_dict().values())
    assert all(value.isfinite().all() for value in net.init_weights(0).state_dict().values())
    assert torch.equal(torch.get_rng_state(), before)


def test_convolution_weights_are_channels_last_in_memory():
    for weight in tiny().parameters():
        assert weight.ndim != 4 or weight.is_contiguous(memory_format=CHANNELS_LAST)


def test_labels_change_the_output_and_no_class_is_a_row_of_zeros():
    net, (x, c_noise) = with_gains(tiny(label_dim=10)), inputs()
    plain = net(x, c_noise)
    assert not torch.allclose(net(x, c_noise, labels=torch.eye(10)[:3]), plain)
    torch.testing.assert_close(net(x, c_noise, labels=torch.zeros(3, 10)), plain)


def test_dropout_has_the_masks_of_group_norm():
    x, gain = 1 + inputs(channels=6)[0].abs(), torch.ones(6)
    normed = ops.group_norm(x, 1, gain, 100 * gain, 1e-5, dropout=0.3, dropout_key=dropout_key())
    dropped = random_dropout(x.contiguous(memory_format=CHANNELS_LAST), 0.3, dropout_key())
    assert torch.equal(normed == 0, dropped == 0)
    torch.testing.assert_close(dropped[dropped != 0], x[dropped != 0] / 0.7)
    assert random_dropout(x, 0.3, None) is x
    assert random_dropout(x.half(), 0.3, dropout_key()).dtype == torch.float16


def test_dropout_depends_on_the_sample_alone():
    net = with_gains(tiny(dropout=0.3))
    together = net(*inputs(4), dropout=dropout_key(4))
    assert torch.equal(copy.deepcopy(net).eval()(*inputs(4), dropout=dropout_key(4)), together)
    for other in (dropout_key(4, first=1), dropout_key(4, seed=1), None):
        assert not torch.allclose(net(*inputs(4), dropout=other), together)
    for first in range(4):
        alone = net(*inputs(1, first=first), dropout=dropout_key(1, first=first))
        torch.testing.assert_close(alone, together[first : first + 1], rtol=1e-4, atol=1e-5)


def test_each_block_has_its_own_mask_at_the_stated_rate():
    net, kept = with_gains(tiny(dropout=0.25)), []
    blocks = [block for block in net.modules() if hasattr(block, "site")]
    for block in blocks:
        block.conv_res1.register_forward_pre_hook(lambda layer, args: kept.append((args[0] != 0).flatten()))
    net(*inputs(64), dropout=dropout_key(64))
    assert [block.site for block in blocks] == list(range(10))
    assert abs(torch.cat(kept).float().mean().item() - 0.75) < 0.003
    pairs = [(a, b) for i, a in enumerate(kept) for b in kept[:i] if a.shape == b.shape]
    assert pairs
    assert all(abs((a == b).float().mean().item() - (0.75**2 + 0.25**2)) < 0.02 for a, b in pairs)


def test_dropout_stays_below_its_largest_resolution():
    def rates(**options):
        blocks = tiny(dropout=0.3, **options).named_modules()
        return {(name.split("_")[0].split(".")[1], block.dropout) for name, block in blocks if hasattr(block, "site")}

    assert rates(dropout_max_resolution=4) == {("8x8", 0.0), ("4x4", 0.3)}
    assert rates() == rates(dropout_max_resolution=8) == {("8x8", 0.3), ("4x4", 0.3)}


def test_forward_and_backward_compile_without_graph_breaks():
    net, (x, c_noise) = with_gains(tiny(num_blocks=0, dropout=0.2, dropout_max_resolution=4, label_dim=10)), inputs()

    def loss(net):
        out = net(x, c_noise, labels=torch.eye(10)[:3], dropout=dropout_key())
        return (out.square().sum() + net.log_variance(c_noise).sum())[None]

    (expected_grad,) = torch.autograd.grad(loss(net), net.emb_noise.weight)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(net)
    torch.testing.assert_close(compiled, loss(net))
    (grad,) = torch.autograd.grad(compiled, net.emb_noise.weight)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5 * expected_grad.abs().max().item())


@pytest.mark.gpu
def test_inductor_gives_the_eager_network():
    net, (x, c_noise) = with_gains(tiny(label_dim=10)).cuda(), (value.cuda() for value in inputs())
    labels = torch.eye(10, device="cuda")[:3]
    compiled = torch.compile(net, fullgraph=True)(x, c_noise, labels=labels)
    torch.testing.assert_close(compiled, net(x, c_noise, labels=labels), rtol=1e-3, atol=1e-3)


def test_network_can_be_copied_for_an_average():
    net = with_gains(tiny())
    twin = copy.deepcopy(net)
    assert torch.equal(twin(*inputs()), net(*inputs()))
    twin.constrain_weights(torch.ones(()))
    assert not torch.equal(twin.emb_noise.weight, net.emb_noise.weight)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"x_NCHW": torch.zeros(3, 1, 16, 16)}, r"shape \(3, 1, 16, 16\).*\[N, 1, 8, 8\]"),
        ({}, {"x_NCHW": torch.zeros(3, 1, 8, 4)}, "takes"),
        ({}, {"labels": torch.zeros(3, 10)}, "built without them .label_dim=0"),
        ({}, {"augment": torch.zeros(3, 9)}, "built without them .augment_dim=0"),
        ({"label_dim": 10}, {"labels": torch.zeros(3, 9)}, r"labels have shape \(3, 9\).*rows of 10 for 3 images"),
        ({}, {"second_N": torch.zeros(3)}, "was given"),
    ],
)
def test_arguments_the_network_was_not_built_for_are_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)(**({"x_NCHW": torch.zeros(3, 1, 8, 8), "c_noise_N": torch.zeros(3)} | arguments))


@pytest.mark.parametrize(
    ("resolution", "options", "message"),
    [
        (30, {}, "resolution 30 cannot be halved for 4 levels"),
        (
            8,
            {"model_channels": 20, "channel_mult": (1,), "channels_per_head": 6},
            "20 channels do not divide into 3 attention heads",
        ),
    ],
)
def test_sizes_that_cannot_work_are_refused(resolution, options, message):
    with pytest.raises(ValueError, match=message):
        EDM2UNet(resolution, 3, **options)


def test_a_network_without_log_variance_says_so():
    net = tiny(logvar_channels=0)
    assert not [name for name in net.state_dict() if "logvar" in name]
    with pytest.raises(ValueError, match="logvar_channels above 0"):
        net.log_variance(torch.zeros(3))


def test_the_configuration_builds_the_network():
    config = EDM2Config(family="edm2", model_channels=16, channel_mult=(1, 2), num_blocks=1, clip_act=3.0, res_balance=0.2)
    net = build_network(config, (1, 8, 8), label_dim=10, dropout=0.1, dropout_max_resolution=4)
    assert isinstance(net, EDM2UNet)
    block = net.dec["4x4_block0"]
    assert (net.label_dim, block.dropout, net.dec["8x8_up"].dropout, block.clip_act) == (10, 0.1, 0.0, 3.0)
    assert block.res_weights == pytest.approx((0.8 / math.hypot(0.8, 0.2), 0.2 / math.hypot(0.8, 0.2)))
    for arguments, message in (({"augment_dim": 9}, "network: .*no augmentation"), ({"image_shape": (1, 9, 9)}, "halved")):
        with pytest.raises(ConfigError, match=message):
            build_network(config, **({"image_shape": (1, 8, 8)} | arguments))


def test_default_sizes_are_those_of_the_paper():
    """Written twice, for Python callers and for configurations."""
    with torch.device("meta"):
        by_config = build_network(EDM2Config(family="edm2"), (3, 64, 64))
    shapes = {name: value.shape for name, value in by_config.state_dict().items()}
    assert shapes == {name: value.shape for name, value in on_meta(64, 3).state_dict().items()}
    assert by_config._block_options == on_meta(64, 3)._block_options


def test_multi_head_qkv_rows_are_permuted_between_the_layouts():
    net = tiny(channels_per_head=8)
    official = to_edm2(net.state_dict(), net)["unet.dec.4x4_in0.attn_qkv.weight"]
    ours, heads, head_dim = net.dec["4x4_in0"].attn_qkv.weight, 4, 8
    for head, channel, kind in ((0, 0, 0), (0, 5, 2), (1, 0, 1), (3, 7, 2)):
        row = kind * heads * head_dim + head * head_dim + channel
        assert torch.equal(official[head * 3 * head_dim + 3 * channel + kind], ours[row])


def test_snapshots_in_fp16_keep_their_dtype_on_the_way_in():
    net = tiny()
    official = {name: value.half() for name, value in to_edm2(net.state_dict(), net).items()}
    assert {"unet.emb_fourier.freqs", "unet.out_gain", "logvar_fourier.phases", "logvar_linear.weight"} <= official.keys()
    loaded = from_edm2(official, net)
    assert {value.dtype for value in loaded.values()} == {torch.float16}
    net.load_state_dict(loaded)
    assert torch.equal(net.emb_noise.weight, official["unet.emb_noise.weight"].float())


def test_checkpoints_of_other_networks_are_refused_by_key():
    net = tiny()
    state, name = to_edm2(net.state_dict(), net), "unet.enc.8x8_block0.conv_res0.weight"
    with pytest.raises(CheckpointError, match=rf"lacks {name}"):
        from_edm2({key: value for key, value in state.items() if key != name}, net)
    with pytest.raises(CheckpointError, match=r"has unet\.emb_label\.weight, which"):
        from_edm2(state | {"unet.emb_label.weight": torch.zeros(1)}, net)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(1, 2\).*needs \(16, 16, 3, 3\)"):
        from_edm2(state | {name: torch.zeros(1, 2)}, net)
    with pytest.raises(CheckpointError, match=r"lacks out_gain and \d+ more"):
        to_edm2({}, net)
    with pytest.raises(CheckpointError, match=r"has logvar_fourier\.freqs and 2 more"):
        from_edm2(state, tiny(logvar_channels=0))


def test_benchmark_shapes_are_those_of_size_s():
    assert kernel_calls("edm2-64") == {AttentionShape(256, 9, 64): 7, AttentionShape(64, 12, 64): 8}
    total = sum(number * shape.flops_per_image for shape, number in conv_calls("edm2-64").items())
    assert total / 2e9 == pytest.approx(100.2, abs=0.05)
