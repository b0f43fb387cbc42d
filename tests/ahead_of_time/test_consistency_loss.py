"""The loss kernels compiled for GPUs that are not there: registers, spills, wide loads, at CIFAR-10's and larger images."""

import pytest
import torch
from ahead_of_time.compiler import check_resources, check_table, compile_launch

from fastcm.bench.shapes import SHAPE_SETS
from fastcm.kernels.consistency_loss.backward import backward_launches
from fastcm.kernels.consistency_loss.derivatives import Denoiser, Gradients, Target
from fastcm.kernels.consistency_loss.forward import forward_launches

CAPABILITIES = (80, 90, 100)
NUM = 128
IMAGES = {name: shape for name, (_, shape, _, _) in SHAPE_SETS.items()} | {"256x256": (3, 256, 256)}


def meta(*shape, dtype=torch.float32, memory_format=torch.channels_last):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format if len(shape) == 4 else None)


def vectors(count):
    return [torch.empty(NUM, device="meta") for _ in range(count)]


def problem(shape, dtype, *, teacher=True, sliced=False, clean_nchw=False, memory_format=torch.channels_last):
    def image(dtype):
        return meta(NUM, *shape, dtype=dtype, memory_format=memory_format)

    F_t = meta(NUM, 2 * shape[0], *shape[1:], dtype=dtype)[:, : shape[0]] if sliced else image(dtype)
    student = Denoiser(F_t, image(torch.float32), *vectors(2))
    other = Denoiser(image(dtype), image(torch.float32), *vectors(2)) if teacher else None
    boundary = torch.empty(NUM, dtype=torch.bool, device="meta")
    clean = meta(NUM, *shape, memory_format=torch.contiguous_format) if clean_nchw else image(torch.float32)
    return student, Target(clean, other, boundary if teacher else None), *vectors(1)


def launches(arch, shape, dtype, distance, *, all_gradients=False, **options):
    student, target, weight = problem(shape, dtype, **options)
    loss, squares, grad = vectors(3)
    c = 0.03 if distance == "pseudo_huber" else 0.0
    image = options.get("memory_format", torch.channels_last)
    out = [meta(NUM, *shape, dtype=each, memory_format=image) for each in (dtype, torch.float32)]
    gradients = Gradients(*out, vectors(1)[0]) if all_gradients else Gradients(out[0], None, None)
    main, *finish = forward_launches(student, target, weight, distance, c, loss, squares, arch)
    (back,) = backward_launches(grad, squares, student, target, weight, distance, c, gradients, arch)
    return {"forward": main, "backward": back} | dict(zip(("finish",), finish, strict=False))


# Name: shape, dtype of F, distance and what else differs. ECT, EDM, iCT, a slice of iDDPM's channels, plain NCHW.
CASES = {
    "ect_ddpmpp32_bf16": (IMAGES["ddpmpp32"], torch.bfloat16, "l2", {}),
    "ect_ddpmpp32_fp32": (IMAGES["ddpmpp32"], torch.float32, "l2", {}),
    "ect_adm64_bf16": (IMAGES["adm64"], torch.bfloat16, "l2", {}),
    "ect_256x256_bf16": (IMAGES["256x256"], torch.bfloat16, "l2", {}),
    "edm_ddpmpp32_bf16": (IMAGES["ddpmpp32"], torch.bfloat16, "squared", {"teacher": False}),
    "ict_ddpmpp32_all_gradients": (IMAGES["ddpmpp32"], torch.float16, "pseudo_huber", {"all_gradients": True}),
    "iddpm_slice_adm64_bf16": (IMAGES["adm64"], torch.bfloat16, "squared", {"teacher": False, "sliced": True}),
    "ect_ddpmpp32_clean_nchw": (IMAGES["ddpmpp32"], torch.bfloat16, "l2", {"clean_nchw": True}),
    "ect_ddpmpp32_nchw": (IMAGES["ddpmpp32"], torch.bfloat16, "l2", {"memory_format": torch.contiguous_format}),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_resources(capability):
    rows = {}
    for name, (shape, dtype, distance, options) in CASES.items():
        for direction, launch in launches(f"sm{capability}", shape, dtype, distance, **options).items():
            resources = compile_launch(launch, capability)
            check_resources(resources, capability, matrix=False, wide=direction != "finish")
            # Two blocks to a multiprocessor at least, so that one loads while the other adds.
            assert direction == "finish" or resources.registers * resources.num_warps * 32 <= 65536 // 2
            rows[f"{name}/{direction}"] = resources
    check_table(f"consistency_loss_sm{capability}", rows)


def test_an_image_that_one_program_does_not_hold_is_split_the_same_way_in_every_batch():
    cut = {name: len(launches("sm90", shape, torch.bfloat16, "l2")) for name, shape in IMAGES.items()}
    assert cut == {"ddpmpp32": 2, "adm64": 3, "256x256": 3}
    main = launches("sm90", IMAGES["256x256"], torch.bfloat16, "l2")["forward"]
    assert main.grid == (NUM * main.arguments["SPLITS"],)
    assert main.arguments["SPLITS"] * main.arguments["TILES"] * main.arguments["BLOCK"] >= 3 * 256 * 256
