"""The registered attention on the CPU: equal to the reference, its derivatives, its place in torch.compile, its backends."""

import importlib.machinery
import inspect
import math
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcm.kernels.attention import (
    attention,
    attention_jvp,
    attention_reference,
    attention_xformers,
    cost,
    derivatives,
    preferred_backend,
    xformers_unavailable,
)
from fastcm.kernels.attention.forward_ad import attention as attention_with_forward_ad
from fastcm.kernels.runtime.pinned import ARCHITECTURES
from fastcm.random import Stream

# PyTorch's own forward-mode rules are loaded with a call that it has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit")

# N, heads, D, H, W: odd T, D that is no power of two, a single pixel.
SHAPES = [(2, 1, 8, 4, 4), (2, 3, 5, 1, 17), (1, 2, 24, 3, 5), (3, 1, 4, 1, 1)]


def image(name, n, channels, h, w, dtype=torch.float64):
    x = Stream(0, name).image_normal(torch.arange(n), (channels, h, w)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def qkv_of(shape, dtype=torch.float64, name="qkv"):
    n, heads, head_dim, h, w = shape
    return image(name, n, 3 * heads * head_dim, h, w, dtype), heads


def with_gradient(function, qkv, heads, dout):
    leaf = qkv.detach().requires_grad_()
    out = function(leaf, heads)
    return out.detach(), *torch.autograd.grad(out, leaf, dout)


def memories(x):
    wide = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)
    crop = F.pad(x, (1, 1, 2, 1))[:, :, 2:-1, 1:-1]
    return [x.contiguous(memory_format=torch.channels_last), x.contiguous(), wide[:, : x.shape[1]], crop]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_reference(shape, dtype, tolerance):
    qkv, heads = qkv_of(shape, dtype)
    dout = image("dout", *attention_reference(qkv, heads).shape, dtype)
    expected = with_gradient(attention_reference, qkv.double(), heads, dout.double())
    for found, truth in zip(with_gradient(attention, qkv, heads, dout), expected, strict=True):
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


def test_the_saved_normaliser_is_the_natural_logarithm_of_the_sum_of_exponentials():
    qkv, _ = qkv_of((2, 2, 8, 2, 3), torch.float32)
    _, lse = torch.ops.fastcm.attention(qkv, 2)
    q, k, _ = (part.unflatten(1, (2, 8)).flatten(3).double() for part in qkv.chunk(3, dim=1))
    expected = torch.logsumexp(torch.einsum("nhdt,nhdu->nhtu", q, k) / math.sqrt(8), dim=-1)
    assert (lse.shape, lse.dtype) == ((2, 2, 6), torch.float32)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_finite_differences(shape):
    qkv, heads = qkv_of((min(shape[0], 2), *shape[1:]))
    assert gradcheck(lambda x: attention(x, heads), qkv.requires_grad_(), fast_mode=True)


def test_every_gradient_is_that_of_finite_differences():
    assert gradcheck(lambda x: attention(x, 2), qkv_of((1, 2, 3, 1, 3))[0].requires_grad_())


def reference_jvp(qkv, tqkv, heads):
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = forward_ad.unpack_dual(attention_reference(forward_ad.make_dual(qkv, tqkv), heads))
        return dual.primal.clone(), dual.tangent.clone()


@forward_mode
@pytest.mark.parametrize("shape", SHAPES)
def test_tangent_is_that_of_the_references_forward_mode(shape):
    (qkv, heads), (tqkv, _) = qkv_of(shape), qkv_of(shape, name="tqkv")
    expected = reference_jvp(qkv, tqkv, heads)
    for found, truth in zip(attention_jvp(qkv, tqkv, heads), expected, strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13)
    primal, pushed = torch.func.jvp(lambda x: attention_with_forward_ad(x, heads), (qkv,), (tqkv,))
    assert torch.equal(primal, attention(qkv, heads))
    torch.testing.assert_close(pushed, expected[1], rtol=1e-12, atol=1e-13)


@forward_mode
def test_forward_and_reverse_mode_of_the_eager_class_are_those_of_finite_differences():
    qkv = qkv_of((1, 2, 3, 1, 3))[0].requires_grad_()
    assert gradcheck(lambda x: attention_with_forward_ad(x, 2), qkv, check_forward_ad=True)
    assert gradcheck(lambda x: attention_with_forward_ad(x.permute(0, 1, 3, 2), 2), qkv, check_forward_ad=True)


def test_a_central_difference_of_the_output_is_the_tangent():
    (qkv, heads), (tqkv, _) = qkv_of(SHAPES[1]), qkv_of(SHAPES[1], name="tqkv")
    step = 1e-5
    difference = (attention(qkv + step * tqkv, heads) - attention(qkv - step * tqkv, heads)) / (2 * step)
    torch.testing.assert_close(attention_jvp(qkv, tqkv, heads)[1], difference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_tangents_and_gradients_are_transposes_of_each_other(shape):
    (qkv, heads), (tqkv, _) = qkv_of(shape), qkv_of(shape, name="tqkv")
    out, pushed = attention_jvp(qkv, tqkv, heads)
    dout = image("dout", *out.shape)
    _, pulled = with_gradient(attention, qkv, heads, dout)
    torch.testing.assert_close((pushed * dout).sum(), (tqkv * pulled).sum(), rtol=1e-12, atol=1e-13)


# opcheck itself looks at the gradients of copies that it has made of the inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("memory", range(4))
def test_the_ops_are_registered_as_pytorch_wants_them(memory):
    qkv = memories(qkv_of((2, 2, 4, 3, 4), torch.float32)[0])[memory]
    tqkv = memories(qkv_of((2, 2, 4, 3, 4), torch.float32, "tqkv")[0])[memory]
    torch.library.opcheck(torch.ops.fastcm.attention.default, (qkv.detach().requires_grad_(), 2))
    torch.library.opcheck(torch.ops.fastcm.attention_jvp.default, (qkv, tqkv, 2))
    out, lse = torch.ops.fastcm.attention(qkv, 2)
    dout = memories(image("dout", *out.shape, torch.float32))[memory]
    torch.library.opcheck(torch.ops.fastcm.attention_backward.default, (dout, qkv, out, lse, 2))


@pytest.mark.parametrize("memory", range(4))
def test_any_memory_gives_the_same_bits(memory):
    qkv, tqkv = (qkv_of((2, 2, 4, 3, 4), torch.float32, name)[0] for name in ("qkv", "tqkv"))
    dout = image("dout", 2, 8, 3, 4, torch.float32)
    expected = (*with_gradient(attention, qkv, 2, dout), *attention_jvp(qkv, tqkv, 2))
    moved = [memories(value)[memory] for value in (qkv, tqkv, dout)]
    found = (*with_gradient(attention, moved[0], 2, moved[2]), *attention_jvp(*moved[:2], 2))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def concatenated(attend):
    """What the backward of cat hands out: the gradient is a slice of channels."""

    def run(qkv, heads):
        return (torch.cat([attend(qkv, heads), qkv], dim=1) ** 2).sum()

    return run


def test_one_compiled_graph_gives_the_same_values_and_gradients():
    qkv, heads = qkv_of((2, 2, 8, 4, 4), torch.float32)
    expected = with_gradient(concatenated(attention_reference), qkv, heads, torch.tensor(1.0))
    compiled = torch.compile(concatenated(attention), fullgraph=True, backend="aot_eager")
    for function in (concatenated(attention), compiled):
        for found, truth in zip(with_gradient(function, qkv, heads, torch.tensor(1.0)), expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


def test_the_jvp_compiles_to_one_graph():
    qkv, tqkv = (qkv_of((2, 2, 8, 4, 4), torch.float32, name)[0] for name in ("qkv", "tqkv"))
    compiled = torch.compile(attention_jvp, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(qkv, tqkv, 2), attention_jvp(qkv, tqkv, 2), strict=True):
        assert torch.equal(found, expected)


def test_the_same_call_gives_the_same_bits():
    qkv, heads = qkv_of((2, 2, 8, 4, 4), torch.float32)
    dout = image("dout", 2, 16, 4, 4, torch.float32)
    first, second = (with_gradient(attention, qkv, heads, dout) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_scores_of_any_size_stay_finite():
    qkv, heads = qkv_of((1, 1, 8, 2, 4), torch.float32)
    out, gradient = with_gradient(attention, 1e3 * qkv, heads, image("dout", 1, 8, 2, 4, torch.float32))
    assert out.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 4, 3, 3), (2, 1, 4, 0, 3)])
def test_nothing_in_nothing_out(shape):
    qkv, heads = torch.empty(shape[0], 3 * shape[1] * shape[2], *shape[3:]), shape[1]
    out, gradient = with_gradient(attention, qkv, heads, torch.empty(shape[0], shape[1] * shape[2], *shape[3:]))
    assert gradient.shape == qkv.shape
    assert [value.shape for value in attention_jvp(qkv, qkv, heads)] == [out.shape] * 2


def wrong(change=lambda qkv: qkv, heads=2):
    return change, heads


WRONG = {
    "qkv_NCHW has shape (2, 12, 4)": (wrong(lambda qkv: qkv[..., 0]), ValueError),
    "qkv_NCHW has dtype int64": (wrong(lambda qkv: qkv.long()), TypeError),
    "qkv_NCHW has 12 channels, which do not divide into q, k, v of num_heads 3": (wrong(heads=3), ValueError),
    "num_heads is 0": (wrong(heads=0), ValueError),
    "qkv_NCHW has heads of 258 channels": (wrong(lambda qkv: qkv.repeat(1, 129, 1, 1)), ValueError),
}


@pytest.mark.parametrize("message", WRONG)
def test_impossible_arguments_are_named(message):
    (change, heads), error = WRONG[message]
    qkv = change(qkv_of((2, 2, 2, 4, 4), torch.float32)[0])
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    for function in (attention, attention_with_forward_ad):
        with pytest.raises(error, match=pattern):
            inspect.unwrap(function)(qkv, heads)
    with pytest.raises(error, match=pattern):
        inspect.unwrap(attention_jvp)(qkv, qkv, heads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t[1:], ValueError, r"tqkv_NCHW has shape \(1, 12, 4, 4\), expected \(2, 12, 4, 4\)"),
        (lambda t: t.bfloat16(), TypeError, "tqkv_NCHW has dtype bfloat16; the kernel takes float32"),
        (lambda t: t.to("meta"), ValueError, "tqkv_NCHW is on meta"),
    ],
)
def test_impossible_tangents_are_named(change, error, message):
    qkv, heads = qkv_of((2, 2, 2, 4, 4), torch.float32)
    with pytest.raises(error, match=message):
        inspect.unwrap(attention_jvp)(qkv, change(qkv), heads)


@forward_mode
def test_a_tangent_is_refused_and_not_dropped():
    qkv, heads = qkv_of(SHAPES[0])
    with pytest.raises(ValueError, match="qkv_NCHW has a forward-mode tangent"):
        torch.func.jvp(lambda x: attention(x, heads), (qkv,), (qkv,))


def test_cost_counts_each_byte_once():
    qkv, heads = qkv_of((2, 3, 5, 2, 4), torch.bfloat16)
    out, lse = torch.ops.fastcm.attention(qkv, heads)
    sizes = {"num": 2, "tokens": 8, "num_heads": 3, "head_dim": 5, "itemsize": 2}
    product = 2 * 2 * 3 * 8 * 8 * 5
    assert cost.forward(**sizes) == (qkv.nbytes, out.nbytes + lse.nbytes, 2 * product)
    assert cost.backward(**sizes) == (qkv.nbytes + 2 * out.nbytes + lse.nbytes, qkv.nbytes, 5 * product)
    assert cost.jvp(**sizes) == (2 * qkv.nbytes, 2 * out.nbytes, 6 * product)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dispatch_prefers_the_kernel_where_memory_binds_and_pytorch_where_arithmetic_does(arch):
    for tokens, head_dim in ((1, 5), (64, 256), (256, 64), (256, 256)):
        assert preferred_backend(tokens, head_dim, arch) == "triton"
    for tokens, head_dim in ((257, 64), (1024, 64), (4096, 256), (64, 512)):
        assert preferred_backend(tokens, head_dim, arch) == "torch"


class FakeXformers(types.ModuleType):
    """Records what it is given and computes with PyTorch."""

    def __init__(self):
        super().__init__("xformers.ops")
        self.calls = []

    def memory_efficient_attention(self, query, key, value, scale=None):
        self.calls.append((query, key, value))
        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)), scale=scale)
        return out.transpose(1, 2)


@pytest.fixture
def fake_xformers(monkeypatch):
    package, ops = types.ModuleType("xformers"), FakeXformers()
    package.__spec__ = importlib.machinery.ModuleSpec("xformers", None)
    package.ops, package.__path__ = ops, []
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    xformers_unavailable.cache_clear()
    yield ops
    xformers_unavailable.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_xformers_computes_attention_from_views(shape, fake_xformers):
    qkv, heads = qkv_of(shape)
    n, _, head_dim, h, w = shape
    expected = with_gradient(attention_reference, qkv, heads, image("dout", n, heads * head_dim, h, w))
    found = with_gradient(attention_xformers, qkv, heads, image("dout", n, heads * head_dim, h, w))
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-13)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    padded = -(-head_dim // 8) * 8
    assert [part.shape for part in fake_xformers.calls[0]] == [(n, h * w, heads, padded)] * 3
    if padded == head_dim:
        offsets = [(part.data_ptr() - qkv.data_ptr()) // qkv.itemsize for part in fake_xformers.calls[0]]
        assert offsets == [0, heads * head_dim, 2 * heads * head_dim]


def test_xformers_says_why_it_cannot_run(fake_xformers, monkeypatch):
    cuda = torch.device("cuda")
    assert xformers_unavailable(torch.device("cpu"), torch.float32) == "xformers needs a CUDA device, not cpu"
    assert xformers_unavailable(cuda, torch.float64) == "xformers takes no float64"
    assert xformers_unavailable(cuda, torch.bfloat16) is None
    xformers_unavailable.cache_clear()
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "xformers.ops cannot be imported" in xformers_unavailable(cuda, torch.bfloat16)


def test_xformers_that_is_missing_is_named(monkeypatch):
    xformers_unavailable.cache_clear()
    monkeypatch.setattr("fastcm.kernels.attention.xformers.find_spec", lambda name: None)
    assert xformers_unavailable(torch.device("cuda"), torch.float32) == "xformers is not installed"
    xformers_unavailable.cache_clear()


@pytest.mark.usefixtures("fake_xformers")
def test_xformers_rejects_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="10 channels"):
        attention_xformers(torch.zeros(1, 10, 2, 2), 2)


def test_importing_the_kernels_imports_neither_triton_nor_xformers():
    code = "import sys, fastcm.kernels.attention; print([m for m in ('triton', 'xformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_derivatives_work_in_double_precision_for_double_and_else_in_single():
    for dtype, work in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        out, lse = derivatives.forward(qkv_of(SHAPES[0], dtype)[0], 1)
        assert (out.dtype, lse.dtype) == (dtype, work)
