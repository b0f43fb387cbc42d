"""The attention kernels on a GPU: against fp64 at full shapes, bit for bit twice, in a CUDA graph, compiled."""

import pytest
import torch

from fastcm.bench.shapes import SHAPE_SETS, AttentionShape, kernel_calls
from fastcm.kernels.attention import attention, attention_jvp, derivatives
from fastcm.kernels.runtime.fallback import failures, set_strict
from fastcm.random import Stream

pytestmark = pytest.mark.gpu

NETWORKS = sorted({shape for name in SHAPE_SETS for shape in kernel_calls(name) if isinstance(shape, AttentionShape)})
ODD = [(1, 1, 5), (17, 2, 24), (250, 3, 40), (300, 1, 80), (1000, 2, 128), (1023, 1, 256), (4096, 1, 64), (4096, 1, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _no_fallback():
    before = set_strict(True)
    yield
    set_strict(before)
    assert "attention" not in failures()


def images(tokens, heads, head_dim, dtype, num=2):
    """qkv, its tangent and the gradient of the output, with a mean offset, where cancellation shows."""
    index, width = torch.arange(num, device="cuda"), heads * head_dim
    height = 16 if tokens % 16 == 0 else 1

    def image(name, channels, offset):
        x = Stream(0, name).image_normal(index, (channels, height, tokens // height)) + offset
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    return image("qkv", 3 * width, 0.5), image("tqkv", 3 * width, 0.5), image("dout", width, 0)


def with_gradient(function, qkv, heads, dout):
    leaf = qkv.detach().requires_grad_()
    out = function(leaf, heads)
    return out.detach(), *torch.autograd.grad(out, leaf, dout)


def parts_of(x, heads):
    n, _, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)


def plain(qkv, heads):
    """The definition, op by op in the dtype of the input."""
    q, k, v = parts_of(qkv, heads)
    out = torch.softmax((q @ k.mT) * q.shape[-1] ** -0.5, dim=-1) @ v
    return out.transpose(2, 3).reshape(len(qkv), -1, *qkv.shape[2:])


def plain_jvp(qkv, tqkv, heads):
    """Its tangent, op by op in the dtype of the input."""
    (q, k, v), (tq, tk, tv) = parts_of(qkv, heads), parts_of(tqkv, heads)
    scale = q.shape[-1] ** -0.5
    p = torch.softmax((q @ k.mT) * scale, dim=-1)
    ts = (tq @ k.mT + q @ tk.mT) * scale
    h = p * (ts - (p * ts).sum(-1, keepdim=True))
    return (p @ tv + h @ v).transpose(2, 3).reshape(len(qkv), -1, *qkv.shape[2:])


def check_errors(found, baseline, truth):
    """At most twice the error of PyTorch's operations in the same precision."""
    for kernel, plain_result, exact in zip(found, baseline, truth, strict=True):
        assert kernel.dtype == plain_result.dtype
        error, allowed = ((value.double() - exact).abs().max() for value in (kernel, plain_result))
        assert error <= 2 * allowed + 2e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*NETWORKS, *ODD])
def test_errors_are_at_most_twice_those_of_pytorch(shape, dtype):
    tokens, heads, head_dim = shape
    qkv, tqkv, dout = images(tokens, heads, head_dim, dtype)
    out, lse = derivatives.forward(qkv.double(), heads)
    truth = out, derivatives.backward(dout.double(), qkv.double(), out, lse, heads)
    check_errors(with_gradient(attention, qkv, heads, dout), with_gradient(plain, qkv, heads, dout), truth)
    primal, tangent = attention_jvp(qkv, tqkv, heads)
    exact = derivatives.jvp(qkv.double(), tqkv.double(), heads)
    check_errors((primal, tangent), (plain(qkv, heads), plain_jvp(qkv, tqkv, heads)), exact)


@pytest.mark.parametrize("shape", [*NETWORKS, *ODD])
def test_the_same_call_gives_the_same_bits_in_any_batch(shape):
    tokens, heads, head_dim = shape
    qkv, tqkv, dout = images(tokens, heads, head_dim, torch.bfloat16, num=5)

    def everything(part):
        return *with_gradient(attention, qkv[part], heads, dout[part]), *attention_jvp(qkv[part], tqkv[part], heads)

    first, second, alone = everything(slice(None)), everything(slice(None)), everything(slice(2, 3))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(one[2:3], other) for one, other in zip(first, alone, strict=True))


@pytest.mark.parametrize("shape", NETWORKS)
def test_a_gradient_that_is_a_slice_of_channels_gives_the_same_bits(shape):
    tokens, heads, head_dim = shape
    qkv, _, dout = images(tokens, heads, head_dim, torch.bfloat16)
    wide = torch.cat([dout, dout], dim=1).contiguous(memory_format=torch.channels_last)
    expected = with_gradient(attention, qkv, heads, dout)
    found = with_gradient(attention, qkv, heads, wide[:, dout.shape[1] :])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_offsets_beyond_2_to_the_31_elements():
    """The last images of a large batch lie where 32-bit offsets would wrap around."""
    num, heads, head_dim, side = 12, 1, 256, 512
    qkv = torch.zeros(num, 3 * head_dim, side, side, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    assert qkv[:-1].numel() > 2**31
    small = images(256, heads, head_dim, torch.bfloat16)[0][:1]
    # Each row of 512 pixels stands for an image of T = 512 tokens; only the last image has content.
    rows = qkv.permute(0, 2, 3, 1).reshape(num * side, 1, side, 3 * head_dim).permute(0, 3, 1, 2)
    rows[-1, :, 0, :256] = small[0].flatten(1)
    expected = attention(rows[-1:].clone(), heads)
    assert torch.equal(attention(rows, heads)[-1:], expected)


@pytest.mark.parametrize("shape", NETWORKS)
def test_one_cuda_graph_of_forward_and_backward(shape):
    tokens, heads, head_dim = shape
    qkv, _, dout = images(tokens, heads, head_dim, torch.bfloat16)
    expected = with_gradient(attention, qkv, heads, dout)
    leaf = qkv.detach().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(attention(leaf, heads), leaf, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(leaf, heads)
        (gradient,) = torch.autograd.grad(out, leaf, dout)
    for _ in range(2):
        graph.replay()
    assert all(torch.equal(one, other) for one, other in zip((out, gradient), expected, strict=True))


def test_one_compiled_graph():
    qkv, tqkv, dout = images(256, 2, 64, torch.bfloat16)
    compiled = torch.compile(attention, fullgraph=True)
    expected, found = (with_gradient(function, qkv, 2, dout) for function in (attention, compiled))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    pushed = torch.compile(attention_jvp, fullgraph=True)(qkv, tqkv, 2)
    assert all(torch.equal(one, other) for one, other in zip(pushed, attention_jvp(qkv, tqkv, 2), strict=True))
