"""Triton kernels of attention in the interpreter, against the reference in fp64."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcm.kernels.attention import attention, attention_jvp, attention_reference, derivatives
from fastcm.kernels.attention.forward_ad import attention as attention_with_forward_ad
from fastcm.kernels.attention.registration import _attention
from fastcm.kernels.runtime.fallback import failures, set_strict
from fastcm.kernels.runtime.launch import Launch
from fastcm.kernels.runtime.pinned import answering
from fastcm.random import Stream

# Relative to the largest value of each result: rounding of fp32 sums, or of fp16 weights and results.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3}
DTYPES = (torch.float32, torch.float16)

# heads, D, H, W. Odd T, T = 17 and 250, one token; D that is no power of two, below 16, and up to 256.
SHAPES = [(1, 5, 1, 17), (3, 24, 1, 1), (2, 16, 5, 5), (1, 40, 5, 50), (2, 64, 4, 16), (1, 80, 3, 11), (1, 256, 8, 8)]
LONG = [(1, 16, 17, 17), (2, 24, 13, 23), (1, 256, 16, 17)]

# Tiles small enough that everything has several blocks, of chunks that do not divide D either.
TILES = {"block_m": 16, "block_n": 32, "block_d": 16, "num_warps": 4, "num_stages": 1}
PATHS = {
    "rows": {"full_row": True, "whole_image": False},
    "blocks": {"full_row": False, "whole_image": False},
    "image": {"full_row": True, "whole_image": True},
}


@pytest.fixture(autouse=True)
def _no_fallback():
    before = set_strict(True)
    yield
    set_strict(before)
    assert "attention" not in failures()


def image(name, n, channels, h, w, dtype):
    x = Stream(3, name).image_normal(torch.arange(n), (channels, h, w)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def close(actual, expected, dtype, factor=1.0):
    assert actual.shape == expected.shape
    bound = factor * TOLERANCE[dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


def check(heads, head_dim, h, w, dtype, n=2, offset=0.5):
    """Forward, normaliser, backward and JVP of one shape; the mean offset makes cancellation show."""
    qkv = image("qkv", n, 3 * heads * head_dim, h, w, dtype) + offset
    dout = image("dout", n, heads * head_dim, h, w, dtype)
    tqkv = image("tqkv", n, 3 * heads * head_dim, h, w, dtype) + offset
    leaf, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, lse = _attention(leaf, heads)
    with sdpa_kernel(SDPBackend.MATH):
        expected = attention_reference(exact, heads)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    close(out, expected, dtype)
    close(lse, derivatives.forward(qkv.double(), heads)[1], torch.float32)
    (found,), (truth,) = torch.autograd.grad(out, leaf, dout), torch.autograd.grad(expected, exact, dout.double())
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Relative to each of dq, dk and dv, whose sizes differ.
    for part, true in zip(found.chunk(3, dim=1), truth.chunk(3, dim=1), strict=True):
        if h * w > 1 or true.abs().max() > 0:
            close(part, true, dtype, 2)
    primal, tangent = attention_jvp(qkv, tqkv, heads)
    close(primal, expected.detach(), dtype)
    close(tangent, derivatives.jvp(qkv.double(), tqkv.double(), heads)[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(shape, dtype):
    check(*shape, dtype, n=1 if shape[2] * shape[3] > 64 else 2)


@pytest.mark.parametrize("shape", LONG)
def test_online_softmax_of_long_sequences(shape):
    check(*shape, torch.float16, n=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(2, 24, 3, 11), (1, 40, 6, 8), (2, 5, 4, 4)])
def test_every_kernel_at_every_shape(shape, path, dtype):
    with answering(lambda question, use: {**use, **TILES, **PATHS[path]}):
        check(*shape, dtype)


@pytest.mark.parametrize("path", PATHS)
def test_scores_that_differ_by_hundreds_overflow_nowhere(path):
    qkv = 6 * image("qkv", 1, 3 * 16, 5, 7, torch.float32)
    # The last tokens have by far the largest scores: a running maximum must follow them.
    qkv[:, :32, -1] *= 3
    dout = image("dout", 1, 16, 5, 7, torch.float32)
    with answering(lambda question, use: {**use, **TILES, "block_n": 16, **PATHS[path]}):
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, 1)
        (found,) = torch.autograd.grad(out, leaf, dout)
        tangent = attention_jvp(qkv, qkv, 1)[1]
    expected, lse = derivatives.forward(qkv.double(), 1)
    assert lse.max() > 300
    # Scores of several hundred carry an absolute error of 1e-4 in fp32.
    close(out, expected, torch.float32, 100)
    close(found, derivatives.backward(dout.double(), qkv.double(), expected, lse, 1), torch.float32, 300)
    close(tangent, derivatives.jvp(qkv.double(), qkv.double(), 1)[1], torch.float32, 300)


@pytest.mark.parametrize("path", PATHS)
def test_very_negative_scores_leave_no_weight_to_tokens_that_do_not_exist(path):
    """Padded keys have the score 0, which here is hundreds above that of every real one."""
    sign = torch.tensor([40.0, -40.0, 1.0]).repeat_interleave(16)[None, :, None, None]
    qkv = (image("qkv", 1, 48, 1, 19, torch.float32).abs() + 1) * sign
    with answering(lambda question, use: {**use, **TILES, **PATHS[path]}):
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, 1)
        (found,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        tangent = attention_jvp(qkv, torch.ones_like(qkv), 1)[1]
    expected, lse = derivatives.forward(qkv.double(), 1)
    assert lse.max() < -300
    close(out, expected, torch.float32, 1000)
    for value in (found, tangent):
        assert value.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_a_tangent_that_all_keys_share_costs_no_precision(path):
    """A common shift of tk moves all scores of a query alike: the tangent of softmax must not see it, even in fp16."""
    qkv, tqkv = (image(name, 1, 48, 5, 10, torch.float16) for name in ("qkv", "tqkv"))
    tqkv[:, 16:32] += 64
    with answering(lambda question, use: {**use, **TILES, **PATHS[path]}):
        found = attention_jvp(qkv, tqkv, 1)[1]
    close(found, derivatives.jvp(qkv.double(), tqkv.double(), 1)[1], torch.float16)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [(3, 3), (5, 7)])
def test_what_lies_around_an_image_is_never_used(size, path):
    """The neighbours in memory, in the batch and among the channels, are NaN."""
    wide = {name: image(name, 3, 60, *size, torch.float32) for name in ("qkv", "dout", "tqkv")}
    parts = {name: x[1:2, 6 : 16 if name == "dout" else 36] for name, x in wide.items()}
    values = {name: x.clone() for name, x in parts.items()}
    for name, x in wide.items():
        x.fill_(torch.nan)
        parts[name].copy_(values[name])
    with answering(lambda question, use: {**use, **TILES, "block_n": 16, **PATHS[path]}):
        leaf = parts["qkv"].detach().requires_grad_()
        out = attention(leaf, 2)
        (found,) = torch.autograd.grad(out, leaf, parts["dout"])
        tangent = attention_jvp(parts["qkv"], parts["tqkv"], 2)[1]
    exact = {name: x.double() for name, x in values.items()}
    expected, lse = derivatives.forward(exact["qkv"], 2)
    close(out, expected, torch.float32)
    close(found, derivatives.backward(exact["dout"], exact["qkv"], expected, lse, 2), torch.float32)
    close(tangent, derivatives.jvp(exact["qkv"], exact["tqkv"], 2)[1], torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_slices_of_channels_are_read_in_place(path, monkeypatch):
    """What the backward of cat hands out, and qkv that is itself a slice; only strides tell them from dense images."""
    read = []
    run = Launch.options.fget
    monkeypatch.setattr(Launch, "options", property(lambda self: read.append(self.arguments) or run(self)))
    wide = {name: image(name, 2, 96, 3, 7, torch.float32) for name in ("qkv", "dout", "tqkv")}
    qkv, dout, tqkv = wide["qkv"][:, 8:56], wide["dout"][:, 16:32], wide["tqkv"][:, 24:72]
    with answering(lambda question, use: {**use, **TILES, **PATHS[path]}):
        leaf = qkv.detach().requires_grad_()
        out = attention(leaf, 2)
        (found,) = torch.autograd.grad(out, leaf, dout)
        tangent = attention_jvp(qkv, tqkv, 2)[1]
    expected, lse = derivatives.forward(qkv.double(), 2)
    close(out, expected, torch.float32)
    close(found, derivatives.backward(dout.double(), qkv.double(), expected, lse, 2), torch.float32)
    close(tangent, derivatives.jvp(qkv.double(), tqkv.double(), 2)[1], torch.float32)
    pointers = {"qkv_ptr": qkv, "dout_ptr": dout, "tqkv_ptr": tqkv}
    for arguments in read:
        assert all(arguments[name].data_ptr() == x.data_ptr() for name, x in pointers.items() if name in arguments)


def test_a_crop_and_plain_nchw_give_the_same_bits():
    qkv = image("qkv", 2, 48, 3, 5, torch.float32)
    crop = torch.nn.functional.pad(qkv, (1, 2, 1, 1))[:, :, 1:-1, 1:-2]
    expected = attention(qkv, 2)
    assert torch.equal(attention(qkv.contiguous(), 2), expected)
    assert torch.equal(attention(crop, 2), expected)


def test_gradients_repeat_bit_for_bit_and_do_not_depend_on_the_batch():
    qkv, dout = image("qkv", 3, 48, 5, 10, torch.float32), image("dout", 3, 16, 5, 10, torch.float32)

    def gradient(qkv, dout):
        leaf = qkv.clone().requires_grad_()
        return torch.autograd.grad(attention(leaf, 1), leaf, dout)[0]

    first, second, alone = gradient(qkv, dout), gradient(qkv, dout), gradient(qkv[1:2], dout[1:2])
    assert torch.equal(first, second)
    assert torch.equal(first[1:2], alone)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_forward_mode_runs_the_kernel():
    qkv, tqkv = (image(name, 1, 48, 3, 5, torch.float32) for name in ("qkv", "tqkv"))
    found = torch.func.jvp(lambda x: attention_with_forward_ad(x, 1), (qkv,), (tqkv,))
    assert all(torch.equal(one, other) for one, other in zip(found, attention_jvp(qkv, tqkv, 1), strict=True))


def test_tangents_and_gradients_are_transposes_of_each_other():
    qkv, tqkv = (image(name, 2, 48, 3, 9, torch.float32) for name in ("qkv", "tqkv"))
    dout = image("dout", 2, 16, 3, 9, torch.float32)
    leaf = qkv.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(attention(leaf, 1), leaf, dout)
    pushed = attention_jvp(qkv, tqkv, 1)[1]
    torch.testing.assert_close((pushed * dout).sum(), (tqkv * pulled).sum(), rtol=1e-5, atol=1e-5)
