"""The augmentation pipe against the official implementation, with the official implementation's random draws."""

import re
from dataclasses import fields

import pytest
import torch
from golden_cases import case_names, load_case

from fastcm.data.augment import AugmentPipe

CASES = [name for name in case_names("J_") if name != "J_inputs"]
SETTINGS = {field.name for field in fields(AugmentPipe)}


def golden_draws(pipe, case):
    """Stored draws by our names; the official shapes put pairs first and keep axes of length one."""
    stored = [case.tensors[key] for key in sorted(case.tensors) if key.startswith("in/draw")]
    names = pipe.draw_names()
    assert len(stored) == len(names)
    pairs = {name: stored_draw.squeeze() for name, stored_draw in zip(names, stored, strict=True)}
    return {name: (value.T if value.ndim == 2 else value).float() for name, value in pairs.items()}


def golden_images(case):
    count, channels = map(int, re.search(r"\[:(\d+), :(\d+)\]", case.config["input"]).groups())
    return load_case("J_inputs").tensors["in/images"][:count, :channels]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_pipe_agrees_with_the_official_one(name, memory_format):
    case = load_case(name)
    pipe = AugmentPipe(**{key: value for key, value in case.config.items() if key in SETTINGS})
    images = golden_images(case).contiguous(memory_format=memory_format)
    images, labels = pipe.apply(images, golden_draws(pipe, case))
    case.close(labels, "out/labels")
    case.close(images, "out/images")
    assert pipe.label_dim == labels.shape[1]


CONSTANTS = {name for name in SETTINGS if name.endswith(("_std", "_max"))}


@pytest.mark.parametrize("constant", sorted(CONSTANTS))
def test_a_wrong_constant_is_noticed(constant):
    """A constant that is 5 % off changes the images of a golden case beyond its tolerance."""
    strength = constant.rsplit("_", 1)[0]
    noticed = []
    for case in map(load_case, CASES):
        settings = {key: value for key, value in case.config.items() if key in SETTINGS}
        if settings.get(strength):
            wrong = AugmentPipe(**settings | {constant: 1.05 * getattr(AugmentPipe(**settings), constant)})
            images, _ = wrong.apply(golden_images(case), golden_draws(wrong, case))
            noticed.append(differs(case, images))
    assert any(noticed)


def differs(case, images):
    try:
        case.close(images, "out/images")
    except AssertionError:
        return True
    return False


def test_every_golden_setting_is_known():
    for name in CASES:
        assert set(load_case(name).config) <= SETTINGS | {"input"}
