"""The loss kernels compiled for GPUs that are not there: registers, spills, wide loads, at CIFAR-10's and larger images."""

import pytest
import torch
from ahead_of_time.compiler import check_resources, check_table, compile_distinct

from fastcm.bench.shapes import SHAPE_SETS
from fastcm.kernels.consistency_loss.backward import backward_launches
from fastcm.kernels.consistency_loss.derivatives import Denoiser, Gradients, Tangents, Target
from fastcm.kernels.consistency_loss.forward import forward_launches
from fastcm.kernels.consistency_loss.jvp import jvp_launches

CAPABILITIES = (80, 90, 100)
NUM = 128
IMAGES = {name: shape for name, (_, shape, _, _) in SHAPE_SETS.items()} | {"256x256": (3, 256, 256)}


def meta(*shape, dtype=torch.float32, memory_format=torch.channels_last):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format if len(shape) == 4 else None)


def vectors(count):
    return [torch.empty(NUM, device="meta") for _ in range(count)]


def problem(shape, dtype, *, teacher=True, boundary=True, sliced=False, clean_nchw=False, memory_format=torch.channels_last):
    def image(dtype):
        return meta(NUM, *shape, dtype=dtype, memory_format=memory_format)

    F_t = meta(NUM, 2 * shape[0], *shape[1:], dtype=dtype)[:, : shape[0]] if sliced else image(dtype)
    student = Denoiser(F_t, image(torch.float32), *vectors(2))
    other = Denoiser(image(dtype), image(torch.float32), *vectors(2)) if teacher else None
    boundary_N = torch.empty(NUM, dtype=torch.bool, device="meta") if teacher and boundary else None
    clean = meta(NUM, *shape, memory_format=torch.contiguous_format) if clean_nchw else image(torch.float32)
    return student, Target(clean, other, boundary_N), *vectors(1)


def launches(arch, shape, dtype, distance, *, needed=(True, False, False), **options):
    """The launches of each pass; ``needed``: which gradients are written, of F_t, x_t and the weight."""
    student, target, weight = problem(shape, dtype, **options)
    loss, second, grad = vectors(3)
    c = 0.03 if distance == "pseudo_huber" else 0.0
    image = options.get("memory_format", torch.channels_last)
    F, x = (meta(NUM, *shape, dtype=each, memory_format=image) for each in (dtype, torch.float32))
    gradients = Gradients(*(value if wanted else None for value, wanted in zip((F, x, *vectors(1)), needed, strict=True)))
    # A solver moves what the network makes and what it was given.
    tangents = Tangents(F, x, gradients.weight_N)
    main, *finish = forward_launches(student, target, weight, distance, c, loss, second, arch)
    (back,) = backward_launches(grad, second, student, target, weight, distance, c, gradients, arch)
    moved, *finish_jvp = jvp_launches(tangents, student, target, weight, distance, c, loss, second, arch)
    rest = dict(zip(("finish", "finish jvp"), (*finish, *finish_jvp), strict=False))
    return {"forward": main, "backward": back, "jvp": moved} | rest


# Distance of an objective, and what else differs.
OBJECTIVES = {
    "edm": ("squared", {"teacher": False}),
    "edm_uncertainty": ("squared", {"teacher": False, "needed": (True, False, True)}),
    "cd": ("squared", {"boundary": False}),
    "ect": ("l2", {}),
    "ict": ("pseudo_huber", {}),
}
NETWORKS = ("ddpmpp32", "adm64")
# Name: image, dtype of F, distance and what else differs.
CASES = {
    f"{objective}_{network}_bf16": (IMAGES[network], torch.bfloat16, *OBJECTIVES[objective])
    for network in NETWORKS
    for objective in OBJECTIVES
}
CASES |= {
    f"ect_{network}_{name}": (IMAGES[network], dtype, "l2", {})
    for network in NETWORKS
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16))
}
# CTM's images, which are their own denoised images; a slice of iDDPM's channels, plain NCHW, larger images.
CASES |= {f"ctm_{network}": (IMAGES[network], torch.float32, "squared", {"teacher": False}) for network in NETWORKS}
CASES |= {
    "iddpm_slice_adm64_bf16": (IMAGES["adm64"], torch.bfloat16, "squared", {"teacher": False, "sliced": True}),
    "ict_ddpmpp32_all_gradients": (IMAGES["ddpmpp32"], torch.float16, "pseudo_huber", {"needed": (True, True, True)}),
    "ect_ddpmpp32_clean_nchw": (IMAGES["ddpmpp32"], torch.bfloat16, "l2", {"clean_nchw": True}),
    "ect_ddpmpp32_nchw": (IMAGES["ddpmpp32"], torch.bfloat16, "l2", {"memory_format": torch.contiguous_format}),
    "ect_256x256_bf16": (IMAGES["256x256"], torch.bfloat16, "l2", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_resources(capability):
    chosen = {
        f"{name}/{direction}": launch
        for name, (shape, dtype, distance, options) in CASES.items()
        for direction, launch in launches(f"sm{capability}", shape, dtype, distance, **options).items()
    }
    rows = compile_distinct(chosen, capability)
    for name, resources in rows.items():
        is_finish = "finish" in name
        check_resources(resources, capability, matrix=False, wide=not is_finish)
        # Two blocks to a multiprocessor at least, so that one loads while the other adds.
        assert is_finish or resources.registers * resources.num_warps * 32 <= 65536 // 2, name
    check_table(f"consistency_loss_sm{capability}", rows)


def test_an_image_that_one_program_does_not_hold_is_split_the_same_way_in_every_batch():
    cut = {name: len(launches("sm90", shape, torch.bfloat16, "l2")) for name, shape in IMAGES.items()}
    assert cut == {"ddpmpp32": 3, "adm64": 5, "256x256": 5}
    main = launches("sm90", IMAGES["256x256"], torch.bfloat16, "l2")["forward"]
    assert main.grid == (NUM * main.arguments["SPLITS"],)
    assert main.arguments["SPLITS"] * main.arguments["TILES"] * main.arguments["BLOCK"] >= 3 * 256 * 256
