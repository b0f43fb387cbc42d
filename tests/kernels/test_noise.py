"""The registered noise op on the CPU: the formula bit for bit, and its place in torch.compile."""

import inspect

import pytest
import torch

from fastcm.diffusion.preconditioners import EDM
from fastcm.kernels.noise import add_noise, add_noise_reference, cost
from fastcm.kernels.runtime.elements import element_strides, evenly_spaced
from fastcm.random import Stream

INDEX = torch.tensor([0, 5, 2**33])
SHAPE = (3, 6, 7)
T, R = torch.tensor([0.002, 1.7, 80.0]), torch.tensor([0.001, 1.2, 79.0])
KEY = Stream(3, "noise").at(INDEX)


def images(dtype=torch.float32):
    return Stream(0, "images").image_normal(INDEX, SHAPE).to(dtype)


def both_levels(function, clean, noise=KEY, dtype=torch.float32):
    return function(clean, noise, T, EDM().scalings(T).c_in, r_N=R, c_in_r_N=EDM().scalings(R).c_in, dtype=dtype)


def memories(x):
    wide = torch.cat([x[:, -1:], x, x], dim=1).contiguous(memory_format=torch.channels_last)
    crop = torch.nn.functional.pad(x, (1, 1, 2, 1))[:, :, 2:-1, 1:-1]
    return [x.contiguous(memory_format=torch.channels_last), x.contiguous(), wide[:, 1 : x.shape[1] + 1], crop]


@pytest.mark.parametrize("function", [add_noise, add_noise_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_images", [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_those_of_the_formula_bit_for_bit(function, dtype, of_images):
    noise = Stream(3, "noise").image_normal(INDEX, SHAPE)
    for clean in memories(images(of_images)):
        found = both_levels(function, clean, dtype=dtype)
        for x, input, level in ((*found[:2], T), (*found[2:], R)):
            expected = clean + level[:, None, None, None] * noise
            scaled = (EDM().scalings(level).c_in[:, None, None, None] * expected).to(dtype)
            assert torch.equal(x, expected)
            assert torch.equal(input, scaled)
            assert x.dtype == expected.dtype
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert input.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory", range(4))
def test_given_noise_is_used_as_it_is(memory):
    noise = Stream(1, "given").image_normal(INDEX, SHAPE)
    found = both_levels(add_noise, images(), memories(noise)[memory])
    assert torch.equal(found.x_t, images() + T[:, None, None, None] * noise)
    assert torch.equal(found.x_r, images() + R[:, None, None, None] * noise)


def test_a_drawn_number_and_a_seed_are_other_noise():
    first = both_levels(add_noise, images()).x_t
    for key in (KEY.at(1), KEY._replace(key=(4, KEY.key[1])), KEY._replace(index_N=INDEX + 1)):
        assert not torch.isclose(both_levels(add_noise, images(), key).x_t, first).flatten(1).all(1).any()


def test_one_level_alone():
    found = add_noise(images(), KEY, T, T, dtype=torch.float16)
    assert found.x_r is None
    assert found.input_r is None
    assert torch.equal(found.x_t, both_levels(add_noise, images()).x_t)


@pytest.mark.parametrize("memory", range(4))
def test_the_op_is_registered_as_pytorch_wants_it(memory):
    clean, noise = memories(images())[memory], images()
    key = (None, INDEX, *KEY.key, 2)
    for source, levels in ((key, (R, R)), (key, (None, None)), ((noise, None, 0, 0, 0), (R, R))):
        torch.library.opcheck(torch.ops.fastcm.add_noise.default, (clean, T, T, torch.bfloat16, *levels, *source))


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 1, 1), (1, 1, 1), (3, 4, 1), (3, 1, 4)])
def test_strides_are_those_that_compiled_code_expects_also_of_axes_of_size_one(shape):
    for clean in memories(Stream(0, "images").image_normal(INDEX, shape)):
        for image in both_levels(add_noise, clean):
            assert image.stride() == torch.empty(3, *shape, memory_format=torch.channels_last).stride()


def test_only_images_whose_pixels_are_not_evenly_spaced_are_copied():
    channels_last, nchw, part, crop = memories(images())
    assert element_strides(channels_last) == (126, 3, 1)
    assert element_strides(nchw) == (126, 1, 42)
    assert element_strides(part) == (7 * 42, 7, 1)
    assert element_strides(crop) is None
    for image in (channels_last, nchw, part, nchw[..., :1], nchw[:, :, 2:3], nchw[:, 1:2]):
        assert evenly_spaced(image).data_ptr() == image.data_ptr()
    assert torch.equal(evenly_spaced(crop), images())
    # Axes of size 1, whose strides mean nothing, do not make images look sparse.
    assert element_strides(nchw[..., :1]) == (126, 7, 42)
    assert element_strides(nchw[:, 1:2]) == (126, 1, 1)
    assert element_strides(images()[:, :, :1, :1]) == (126, 3, 1)


def test_one_compiled_graph_gives_the_same():
    compiled = torch.compile(both_levels, fullgraph=True, backend="aot_eager")
    for plain, graph in zip(both_levels(add_noise, images()), compiled(add_noise, images()), strict=True):
        assert torch.equal(plain, graph)
        assert plain.stride() == graph.stride()


def test_a_compiled_graph_follows_the_draw():
    compiled = torch.compile(lambda clean, draw: add_noise(clean, KEY.at(draw), T, T).x_t, fullgraph=True, backend="aot_eager")
    for draw in (0, 1, 2, 2**31):
        assert torch.equal(compiled(images(), draw), add_noise(images(), KEY.at(draw), T, T).x_t)


WRONG = {
    "clean_NCHW has shape (3, 3, 6)": ({"clean_NCHW": images()[..., 0]}, ValueError),
    "clean_NCHW has dtype uint8": ({"clean_NCHW": images().byte()}, TypeError),
    "t_N has shape (2,)": ({"t_N": T[1:]}, ValueError),
    "c_in_t_N is on meta": ({"c_in_t_N": T.to("meta")}, ValueError),
    "c_in_r_N is None": ({"r_N": R}, ValueError),
    "r_N is None": ({"c_in_r_N": R}, ValueError),
    "noise has shape (3, 3, 6, 6)": ({"noise": images()[..., 1:]}, ValueError),
    "noise.index_N has dtype int32": ({"noise": KEY._replace(index_N=INDEX.int())}, TypeError),
    "noise has key (-1, 0)": ({"noise": KEY._replace(key=(-1, 0))}, ValueError),
    "dtype is torch.int32": ({"dtype": torch.int32}, TypeError),
    "clean_NCHW requires grad": ({"clean_NCHW": images().requires_grad_()}, ValueError),
    "t_N requires grad": ({"t_N": T.clone().requires_grad_()}, ValueError),
}


@pytest.mark.parametrize("message", WRONG)
def test_impossible_arguments_are_named(message):
    change, error = WRONG[message]
    arguments = {"clean_NCHW": images(), "noise": KEY, "t_N": T, "c_in_t_N": T} | change
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        inspect.unwrap(add_noise)(**arguments)


def test_images_may_require_grad_where_no_gradient_is_recorded():
    with torch.no_grad():
        assert torch.equal(add_noise(images().requires_grad_(), KEY, T, T).x_t, add_noise(images(), KEY, T, T).x_t)


def test_cost_counts_each_byte_once():
    found, elements = both_levels(add_noise, images(), dtype=torch.bfloat16), images()[0].numel()
    whole = cost.forward(3, elements, levels=2, clean_bytes=4, input_bytes=2)
    assert (whole.read_bytes, whole.write_bytes) == (images().nbytes, sum(image.nbytes for image in found))
    given = cost.forward(3, elements, 1, 4, 2, given=True)
    assert given.read_bytes == 2 * images().nbytes
    assert given.flops < whole.flops
