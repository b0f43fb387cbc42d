import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from fastcm import backends, ops
from fastcm.backends import Backend
from fastcm.errors import ConfigError
from fastcm.kernels.runtime.fallback import KernelUnavailableError, is_strict
from fastcm.random import Stream

CHANNELS_LAST = torch.channels_last
FILTERS = [(1.0, 1.0), (1.0, 3.0, 3.0, 1.0), (1.0, 5.0, 10.0, 10.0, 5.0, 1.0)]

# PyTorch's own forward-mode rules are loaded with a call that it has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit")


def normal(*shape, purpose="test", dtype=torch.float64):
    return Stream(0, purpose).normal(torch.arange(shape[0]), shape[1:]).to(dtype)


def image(n, c, h, w, dtype=torch.float64, purpose="image"):
    return Stream(0, purpose).image_normal(torch.arange(n), (c, h, w)).to(dtype)


def norm_arguments(n, c, dtype=torch.float64):
    """weight, bias and the three modulations of one group norm."""
    weight, bias = normal(2, c, purpose="affine", dtype=dtype)
    addend, scale, shift = normal(3, n, c, purpose="modulation", dtype=dtype)
    return weight, bias, addend, scale, shift


def written_out_norm(x, groups, weight, bias, eps, addend, scale, shift):
    """The definition, with loops, in fp64."""
    x = x.double() + addend.double()[:, :, None, None]
    y = torch.empty_like(x)
    for part in torch.arange(x.shape[1]).chunk(groups):
        values = x[:, part]
        mean = values.mean((1, 2, 3), keepdim=True)
        var = ((values - mean) ** 2).mean((1, 2, 3), keepdim=True)
        y[:, part] = (values - mean) / (var + eps).sqrt()
    y = y * weight.double()[:, None, None] + bias.double()[:, None, None]
    y = y * (1 + scale.double()[:, :, None, None]) + shift.double()[:, :, None, None]
    return y * torch.sigmoid(y)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("channels", "groups", "size"), [(8, 2, (4, 4)), (15, 5, (3, 7)), (6, 1, (1, 1)), (5, 5, (2, 3))])
def test_group_norm_is_its_definition(dtype, tolerance, channels, groups, size):
    x = image(3, channels, *size, dtype=dtype) * 0.05
    weight, bias, addend, scale, shift = norm_arguments(3, channels, torch.float32)
    addend = addend * 0.05
    expected = written_out_norm(x, groups, weight, bias, 1e-3, addend, scale, shift)
    actual = ops.group_norm(x, groups, weight, bias, 1e-3, addend_NC=addend, scale_NC=scale, shift_NC=shift, silu=True)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("mean", "tolerance"), [(50, 1e-5), (500, 500 * 2**-23)])  # the latter: a unit in x's last place
def test_group_norm_keeps_precision_when_the_mean_is_large(mean, tolerance):
    x = (image(2, 8, 16, 16) + mean).float()
    one, zero = torch.ones(8), torch.zeros(8)
    expected = ops.group_norm(x.double(), 2, one, zero, 1e-6)
    torch.testing.assert_close(ops.group_norm(x, 2, one, zero, 1e-6).double(), expected, rtol=0, atol=tolerance)


def test_group_norm_of_bfloat16_rounds_once_at_the_end():
    x = image(2, 8, 5, 5, dtype=torch.bfloat16)
    weight, bias, addend, scale, shift = norm_arguments(2, 8, torch.float32)
    extras = {"addend_NC": addend, "scale_NC": scale, "shift_NC": shift, "silu": True}
    in_fp32 = ops.group_norm(x.float(), 2, weight, bias, 1e-6, **extras)
    assert torch.equal(ops.group_norm(x, 2, weight, bias, 1e-6, **extras), in_fp32.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_keeps_the_memory_format(dtype):
    x = image(2, 8, 4, 4, dtype=dtype)
    one, zero = torch.ones(8), torch.zeros(8)
    assert ops.group_norm(x, 2, one, zero, 1e-6).is_contiguous(memory_format=CHANNELS_LAST)
    assert ops.group_norm(x.contiguous(), 2, one, zero, 1e-6).is_contiguous()
    part = torch.cat([x, x], dim=1)[:, 4:12]
    assert ops.group_norm(part, 2, one, zero, 1e-6).is_contiguous(memory_format=CHANNELS_LAST)


@forward_mode
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_group_norm_gradients_are_those_of_its_values(dropout):
    leaves = [image(2, 6, 3, 2), *norm_arguments(2, 6)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    key = Stream(0, "dropout").at(torch.tensor([3, 5]))

    def norm(x, weight, bias, addend, scale, shift):
        extras = {"addend_NC": addend, "scale_NC": scale, "shift_NC": shift}
        return ops.group_norm(x, 3, weight, bias, 1e-2, silu=True, dropout=dropout, dropout_key=key, **extras)

    assert gradcheck(norm, leaves, check_forward_ad=True)


def test_gradient_is_right_when_it_arrives_strided_from_a_cat():
    x = image(2, 8, 4, 4).requires_grad_()
    weight, bias, *_ = norm_arguments(2, 8)
    direction = image(2, 12, 4, 4, purpose="direction")

    def gradient(upstream):
        (grad,) = torch.autograd.grad(ops.group_norm(x, 2, weight, bias, 1e-6, silu=True), x, upstream)
        return grad

    joined = torch.cat([ops.group_norm(x, 2, weight, bias, 1e-6, silu=True), torch.ones(2, 4, 4, 4)], dim=1)
    (actual,) = torch.autograd.grad(joined, x, direction)
    torch.testing.assert_close(actual, gradient(direction[:, :8].contiguous()))


def test_dropout_mask_is_the_integer_rule_in_pixel_major_order():
    x = torch.ones(2, 3, 4, 5).contiguous(memory_format=CHANNELS_LAST)
    key = Stream(7, "dropout").at(torch.tensor([11, 2**40]), draw=3)
    y = ops.group_norm(x, 1, torch.ones(3), torch.ones(3), 1e-6, dropout=0.3, dropout_key=key)
    bits = Stream(7, "dropout").bits(key.index_N, (4, 5, 3), draw=3)
    expected = torch.where(bits.permute(0, 3, 1, 2) >= round(0.3 * 2**32), 1 / (1 - 0.3), 0.0)
    torch.testing.assert_close(y, expected)


def test_dropout_needs_a_key_and_a_probability():
    x, one = image(2, 4, 2, 2), torch.ones(4)
    plain = ops.group_norm(x, 2, one, one, 1e-6)
    key = Stream(0, "dropout").at(torch.arange(2))
    assert torch.equal(ops.group_norm(x, 2, one, one, 1e-6, dropout=0.5), plain)
    assert torch.equal(ops.group_norm(x, 2, one, one, 1e-6, dropout_key=key), plain)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("heads", "head_dim", "size"), [(1, 8, (4, 4)), (3, 4, (2, 3)), (2, 5, (1, 7))])
def test_attention_is_its_definition(dtype, tolerance, heads, head_dim, size):
    qkv = image(2, 3 * heads * head_dim, *size, dtype=dtype)
    out = ops.attention(qkv, heads)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=CHANNELS_LAST)
    for n in range(2):
        for head in range(heads):
            start = head * head_dim
            q, k, v = (part[start : start + head_dim].flatten(1).T.double() for part in qkv[n].chunk(3))
            expected = torch.softmax(q @ k.T / math.sqrt(head_dim), dim=1) @ v
            actual = out[n, start : start + head_dim].flatten(1).T.double()
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_attention_reads_channels_last_input_in_place(monkeypatch):
    seen = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: seen.extend(qkv) or original(*qkv))
    qkv = image(2, 24, 4, 4)
    ops.attention(qkv, 2)
    assert [part.data_ptr() - qkv.data_ptr() for part in seen] == [0, 8 * 8, 16 * 8]


def test_attention_gradients_are_those_of_its_values():
    assert gradcheck(lambda qkv: ops.attention(qkv, 2), image(2, 12, 3, 2).requires_grad_())


def test_attention_rejects_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="10 channels"):
        ops.attention(image(1, 10, 2, 2), 2)


def full_filter(taps, channels):
    taps = torch.tensor(taps, dtype=torch.float64)
    return (torch.outer(taps, taps) / taps.sum() ** 2).expand(channels, 1, -1, -1)


@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("size", [(4, 6), (8, 8), (2, 2)])
def test_resample_is_the_two_dimensional_filter(taps, size):
    x = image(2, 3, *size)
    kernel, padding = full_filter(taps, 3), (len(taps) - 1) // 2
    up = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=3)
    down = F.conv2d(x, kernel, stride=2, padding=padding, groups=3)
    torch.testing.assert_close(ops.resample(x, taps, True), up)
    torch.testing.assert_close(ops.resample(x, taps, False), down)
    assert up.shape[2:] == (2 * size[0], 2 * size[1])


@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resample_keeps_dtype_and_memory_format(taps, up, dtype):
    y = ops.resample(image(2, 4, 8, 8, dtype=dtype), taps, up)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    exact = ops.resample(image(2, 4, 8, 8, dtype=dtype).double(), taps, up)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)


@forward_mode
@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("up", [True, False])
def test_resample_gradients_are_those_of_its_values(taps, up):
    assert gradcheck(lambda x: ops.resample(x, taps, up), image(1, 2, 4, 4).requires_grad_(), check_forward_ad=True)


def test_unknown_backend_is_refused_with_the_names_that_exist():
    with pytest.raises(ConfigError, match=r"no backend 'warp'.*auto, torch"), ops.use_backend("warp"):
        pass


def test_choices_say_what_runs_and_why():
    assert set(ops.choices()) >= {"group_norm", "attention", "resample"}
    assert ops.choices("cpu")["add_noise"] == ("torch", "Triton kernels need a CUDA device, not cpu")
    with ops.use_backend("torch"):
        assert set(ops.choices().values()) == {("torch", "asked for by name")}


def test_environment_variable_chooses_the_backend_and_is_checked():
    code = "from fastcm import ops; print(ops.choices()['attention'].reason)"
    for value, expected in (("torch", "asked for by name"), ("warp", "FASTCM_BACKEND: there is no backend 'warp'")):
        environment = os.environ | {"FASTCM_BACKEND": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert expected in done.stdout + done.stderr


@pytest.fixture
def doubling_backend(monkeypatch):
    """A second backend that implements one op, wrongly enough to be told apart, and does not run in bfloat16."""

    def unavailable(device, dtype):
        return "no bfloat16 here" if dtype == torch.bfloat16 else None

    reference = ops.TABLE["attention"]["torch"].run
    doubling = Backend(lambda qkv, heads: 2 * reference(qkv, heads), unavailable)
    monkeypatch.setattr(backends, "_names", {*backends._names, "doubling"})
    monkeypatch.setitem(ops.TABLE, "attention", {"doubling": doubling, **ops.TABLE["attention"]})
    backends._warn_once.cache_clear()
    ops._chosen.cache_clear()
    yield
    ops._chosen.cache_clear()


@pytest.mark.usefixtures("doubling_backend")
def test_backend_is_the_first_of_its_row_that_runs_unless_asked_for():
    qkv = image(1, 6, 2, 2)
    with ops.use_backend("torch"):
        plain = ops.attention(qkv, 1)
    torch.testing.assert_close(ops.attention(qkv, 1), 2 * plain)
    with ops.use_backend("doubling"):
        assert ops.choices()["resample"] == ("torch", "doubling does not implement resample")
    torch.testing.assert_close(ops.attention(qkv.bfloat16(), 1), plain.bfloat16(), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("doubling_backend")
def test_fallback_is_said_once_with_its_reason_and_is_an_error_under_strict(caplog):
    qkv = image(1, 6, 2, 2, dtype=torch.bfloat16)
    with ops.use_backend("doubling"):
        for _ in range(2):
            ops.attention(qkv, 1)
    assert caplog.messages == ["attention runs on its PyTorch reference, because doubling cannot run: no bfloat16 here"]
    with (
        ops.use_backend("doubling", strict=True),
        pytest.raises(KernelUnavailableError, match="attention: doubling cannot run: no bfloat16 here"),
    ):
        ops.attention(qkv, 1)
    assert not is_strict()


def test_kernels_asked_for_where_they_cannot_run_fall_back_or_fail():
    x, level = image(2, 3, 4, 4, dtype=torch.float32), torch.ones(2)
    key = Stream(0, "noise").at(torch.arange(2))
    with ops.use_backend("triton"):
        noised = ops.add_noise(x, key, level, level)
    with ops.use_backend("torch"):
        assert torch.equal(noised.x_t, ops.add_noise(x, key, level, level).x_t)
    with (
        ops.use_backend("triton", strict=True),
        pytest.raises(KernelUnavailableError, match=r"add_noise.*CUDA device, not cpu"),
    ):
        ops.add_noise(x, key, level, level)


def test_without_triton_the_references_run_with_one_warning_and_info_lists_why():
    """In a process of its own, which must not import Triton at all."""
    script = """
import json, logging, sys
sys.modules["triton"] = None  # as where it is not installed: find_spec and import fail
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
import torch
from fastcm import ops
from fastcm.info import describe_installation
from fastcm.kernels.runtime.fallback import KernelUnavailableError, set_strict
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("fastcm").addHandler(handler)
x, one = torch.randn(2, 8, 6, 6), torch.ones(8)
with ops.use_backend("triton"):
    first, second = (ops.group_norm(x, 2, one, one, 1e-5) for _ in range(2))
expected = torch.nn.functional.group_norm(x, 2, one, one, 1e-5)
set_strict(True)
try:
    with ops.use_backend("triton"):
        ops.group_norm(x, 2, one, one, 1e-5)
    strict = "no error"
except KernelUnavailableError as error:
    strict = str(error)
set_strict(False)
close = torch.allclose(first, expected, atol=1e-5) and torch.equal(first, second)
print(json.dumps([close, warnings, describe_installation()["kernels"]["group_norm"], strict]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    close, warnings, listed, strict = json.loads(done.stdout.splitlines()[-1])
    assert close
    assert len(warnings) == 1
    assert all("Triton is not installed" in text for text in (*warnings, listed, strict))


@pytest.mark.usefixtures("doubling_backend")
def test_compiled_functions_notice_another_backend():
    qkv = image(1, 6, 2, 2)
    compiled = torch.compile(lambda x: ops.attention(x, 1), backend="eager", fullgraph=True)
    with ops.use_backend("torch"):
        plain = compiled(qkv)
    with ops.use_backend("doubling"):
        torch.testing.assert_close(compiled(qkv), 2 * plain)
