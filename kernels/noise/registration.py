"""``fastcm::add_noise``: the op that torch.compile sees, and the function in front of it."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..philox import PhiloxKey
from ..runtime.checks import FLOATS, check_tensor
from ..runtime.elements import dense, evenly_spaced
from ..runtime.fallback import triton_or_reference
from ..runtime.launch import run
from ..runtime.pinned import architecture
from . import reference
from .reference import NoisedInputs, check_levels

WORD = 2**32


def add_noise(
    clean_NCHW: Float[Tensor, "N C H W"],
    noise: PhiloxKey | Float[Tensor, "N C H W"],
    t_N: Float[Tensor, " N"],
    c_in_t_N: Float[Tensor, " N"],
    *,
    r_N: Float[Tensor, " N"] | None = None,
    c_in_r_N: Float[Tensor, " N"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> NoisedInputs:
    """Noise images to one or two levels with the same noise and scale them for the network, in one pass over the images.

    x_t = y + t n, input_t = c_in_t x_t rounded once to ``dtype``; x_r and input_r the same at level r (arXiv 2206.00364,
    Eq. 7; the shared noise: arXiv 2303.01469, Eq. 10). n is standard normal: given as images, or drawn from a key, where
    element e = (h W + w) C + c of a sample is element e of ``random_normal``.

    Arguments: images [N, C, H, W] of any float dtype in any memory; levels and scalings [N] of any float dtype; r_N and
    c_in_r_N together or not at all; dtype fp32, bf16, fp16 or fp64. x is fp32 and all results are channels_last. fp64
    images are computed in fp64 and by plain PyTorch on every device.
    Not differentiable: raises ValueError for an input that requires grad, and ValueError or TypeError for a shape, dtype or
    device that does not fit, all naming the argument.
    """
    _check(clean_NCHW, noise, {"t_N": t_N, "c_in_t_N": c_in_t_N, "r_N": r_N, "c_in_r_N": c_in_r_N}, dtype)
    if isinstance(noise, Tensor):
        found = _add_noise(clean_NCHW, t_N, c_in_t_N, dtype, r_N, c_in_r_N, noise, None, 0, 0, 0)
    else:
        (key0, key1), index_N, draw = noise
        found = _add_noise(clean_NCHW, t_N, c_in_t_N, dtype, r_N, c_in_r_N, None, index_N, key0, key1, draw)
    return NoisedInputs(*found)


def _check(clean_NCHW: Tensor, noise: PhiloxKey | Tensor, vectors: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    floats = (*FLOATS, torch.float64)
    if clean_NCHW.ndim != 4:
        raise ValueError(f"clean_NCHW has shape {tuple(clean_NCHW.shape)}, expected four axes (N, C, H, W)")
    check_tensor("clean_NCHW", clean_NCHW, dtypes=floats)
    vectors = {name: value for name, value in vectors.items() if value is not None or name not in ("r_N", "c_in_r_N")}
    check_levels(vectors.get("r_N"), vectors.get("c_in_r_N"))
    shape, device = (clean_NCHW.shape[0],), clean_NCHW.device
    for name, value_N in vectors.items():
        check_tensor(name, value_N, shape=shape, dtypes=floats, device=device)
    if isinstance(noise, Tensor):
        check_tensor("noise", noise, shape=clean_NCHW.shape, dtypes=floats, device=device)
        vectors = {**vectors, "noise": noise}
    else:
        check_tensor("noise.index_N", noise.index_N, shape=shape, dtypes=(torch.int64,), device=device)
        if not all(0 <= word < WORD for word in (*noise.key, noise.draw)):
            raise ValueError(f"noise has key {noise.key} and draw {noise.draw}, expected words in [0, 2^32)")
    if dtype not in floats:
        raise TypeError(f"dtype is {dtype}, expected a float dtype of at least 16 bits")
    for name, value in {**vectors, "clean_NCHW": clean_NCHW}.items():
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, and add_noise is not differentiable: detach it")


@torch.library.custom_op("fastcm::add_noise", mutates_args=())
def _add_noise(
    clean: Tensor,
    t: Tensor,
    c_in_t: Tensor,
    dtype: torch.dtype,
    r: Tensor | None,
    c_in_r: Tensor | None,
    given: Tensor | None,
    index: Tensor | None,
    key0: int,
    key1: int,
    draw: int,
) -> list[Tensor]:
    noise = PhiloxKey((key0, key1), index, draw) if given is None else given

    def plain() -> list[Tensor]:
        found = reference.add_noise(clean, noise, t, c_in_t, r_N=r, c_in_r_N=c_in_r, dtype=dtype)
        return [dense(image, torch.channels_last) for image in found if image is not None]

    def kernel() -> list[Tensor]:
        from .forward import add_noise_launches

        out = _outputs(clean, dtype, r is not None)
        vectors = (None if value is None else value.float().contiguous() for value in (t, c_in_t, r, c_in_r))
        readable = noise._replace(index_N=index.contiguous()) if given is None else evenly_spaced(given)
        arguments = (evenly_spaced(clean), readable, *vectors, NoisedInputs(*out))
        run(add_noise_launches(*arguments, architecture(clean.device)), clean.device)
        return out

    if clean.dtype == torch.float64 or dtype == torch.float64:
        return plain()
    return triton_or_reference("add_noise", clean.device, kernel, plain)


@_add_noise.register_fake
def _(
    clean: Tensor,
    t: Tensor,
    c_in_t: Tensor,
    dtype: torch.dtype,
    r: Tensor | None,
    c_in_r: Tensor | None,
    given: Tensor | None,
    index: Tensor | None,
    key0: int,
    key1: int,
    draw: int,
) -> list[Tensor]:
    return _outputs(clean, dtype, r is not None)


def _outputs(clean: Tensor, dtype: torch.dtype, pair: bool) -> list[Tensor]:
    """x and network input of each level, dense channels_last."""
    work = torch.promote_types(clean.dtype, torch.float32)
    dtypes = (work, dtype) * (2 if pair else 1)
    options = {"device": clean.device, "memory_format": torch.channels_last}
    return [torch.empty(clean.shape, dtype=each, **options) for each in dtypes]
