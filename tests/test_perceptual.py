"""LPIPS against torchmetrics' and a plain implementation, its gradients, and where its weights come from."""

import sys

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from torchmetrics.functional.image.lpips import _LPIPS

from fastcm.config.features import FeaturesConfig
from fastcm.errors import CheckpointError, ConfigError
from fastcm.io.feature_files import load_lpips
from fastcm.nn.features import map_distance
from fastcm.nn.perceptual import LPIPS, TAPS
from fastcm.random import Stream

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture(scope="module")
def recipe() -> LPIPS:
    return LPIPS(resize=48).init_weights(0)


@pytest.fixture(scope="module")
def plain() -> LPIPS:
    return LPIPS(resize=0, replace_pooling=False).init_weights(0)


@pytest.fixture(scope="module")
def library(plain) -> _LPIPS:
    """torchmetrics' network with the same VGG and its own, published linear weights."""
    library = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    ours = plain.weights()
    for name, value in library.net.state_dict().items():
        value.copy_(ours[f"features.{name.split('.', 1)[1]}"])
    return library


def images(*shape: int, draw: int = 0) -> torch.Tensor:
    return Stream(7, "test").uniform(torch.arange(shape[0]), shape[1:], draw) * 2 - 1


def pair(side: int = 32, num: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = images(num, 3, side, side)
    return x, (x + 0.3 * images(num, 3, side, side, draw=1)).clamp(-1, 1)


def reference(lpips: LPIPS, x, y, pool, resize: int):
    """The formula written out, with ImageNet's statistics of images in [0, 1]."""
    weights, linear = lpips.weights(), [weight.flatten() for weight in lpips.linear_weights().values()]

    def features(image):
        hidden = ((F.interpolate(image, size=resize, mode="bilinear") + 1) / 2 - MEAN) / STD
        for index in range(max(TAPS) + 1):
            if f"features.{index}.weight" in weights:
                kernel, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
                hidden = F.conv2d(hidden, kernel, bias, padding=1).relu()
                if index + 1 in TAPS:
                    yield hidden / hidden.norm(dim=1, keepdim=True).clamp_min(1e-10)
                    hidden = pool(hidden, 2)

    levels = zip(features(x), features(y), linear, strict=True)
    return sum(((a - b) ** 2 * w[:, None, None]).sum(1).mean((1, 2)) for a, b, w in levels)


def test_equals_torchmetrics_with_its_linear_weights_in_value_and_gradient(plain, library, tmp_path):
    save_file({name: value.contiguous() for name, value in plain.weights().items()}, tmp_path / "vgg.safetensors")
    ours = load_lpips(str(tmp_path / "vgg.safetensors"), resize=0, replace_pooling=False)
    x, y = pair()
    x.requires_grad_(True)
    expected, actual = library(x, y).flatten(), ours(x, y)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    (wanted,), (found,) = (torch.autograd.grad(value.sum(), x) for value in (expected, actual))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_the_recipe_pools_by_averages_and_resizes_small_images(recipe):
    x, y = pair()
    torch.testing.assert_close(recipe(x, y), reference(recipe, x, y, F.avg_pool2d, 48), rtol=1e-3, atol=1e-6)


def test_average_pooling_and_resizing_each_matter(recipe, plain):
    x, y = pair()
    with_max = reference(recipe, x, y, F.max_pool2d, 48)
    assert not torch.allclose(recipe(x, y), with_max, rtol=0.01)
    torch.testing.assert_close(plain(x, y), reference(plain, x, y, F.max_pool2d, 32), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(plain(x, y), with_max, rtol=0.01)


def test_images_of_256_pixels_and_more_are_not_resized(recipe):
    x = images(1, 3, 256, 256)
    with torch.no_grad():
        assert recipe.features(x)[0].shape == (1, 64, 256, 256)
        assert recipe.features(x[..., :255])[0].shape == (1, 64, 48, 48)


def test_each_image_has_its_own_distance_and_equal_images_have_none(recipe):
    x, y = pair(num=4)
    together = recipe(x, y)
    assert together.shape == (4,)
    torch.testing.assert_close(torch.cat([recipe(x[:1], y[:1]), recipe(x[1:], y[1:])]), together, rtol=1e-4, atol=1e-7)
    assert recipe(x, x).abs().max() == 0


def test_gray_images_are_repeated(recipe):
    x, y = images(2, 1, 16, 16), images(2, 1, 16, 16, draw=1)
    torch.testing.assert_close(recipe(x, y), recipe(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="2 channels, feature networks take 1 or 3"):
        recipe(images(2, 2, 16, 16), images(2, 2, 16, 16))


def test_only_x_gets_a_gradient_and_only_if_it_asks(recipe):
    x, y = pair()
    assert not recipe(x, y).requires_grad
    x.requires_grad_(True)
    y.requires_grad_(True)
    recipe(x, y).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    assert y.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in recipe.parameters())


def test_gradient_is_the_derivative():
    lpips = LPIPS(resize=24).init_weights(0).double()
    x, y = (image.double() for image in pair(16, 1))
    x.requires_grad_(True)
    direction = images(1, 3, 16, 16, draw=2).double()
    (gradient,) = torch.autograd.grad(lpips(x, y).sum(), x)
    step = 1e-6 * direction
    with torch.no_grad():
        measured = (lpips(x + step, y) - lpips(x - step, y)).sum() / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), measured, rtol=1e-4, atol=1e-9)


def test_map_distance_is_its_formula():
    x, y = torch.tensor([3e-4, 4e-4]).reshape(1, 2, 1, 1), torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1)
    unit = 25 / 26  # ||x||^2 = 25e-8 and 1e-8 under the root
    expected = 10 * 0.36 * unit + 100 * (0.8 * unit**0.5 - 1) ** 2
    weights = [torch.tensor([10.0, 100.0])]
    torch.testing.assert_close(map_distance([x.expand(1, 2, 3, 3)], [y], weights), torch.tensor([expected]), rtol=1e-4, atol=0)
    torch.testing.assert_close(map_distance([x] * 2, [y] * 2), 2 * map_distance([x], [y]))


def test_map_distance_has_the_right_gradient_and_a_finite_one_where_features_are_dead():
    x, y = images(2, 3, 2, 2).double().requires_grad_(True), images(2, 3, 2, 2, draw=1).double()
    weights = [torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda value: map_distance([value], [y], weights), x)
    dead = torch.zeros(1, 3, 2, 2, requires_grad=True)
    map_distance([dead], [torch.ones(1, 3, 2, 2)]).sum().backward()
    assert dead.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_torso_gives_nearly_the_same_fp32_distance(recipe, dtype):
    half = LPIPS(resize=48, dtype=dtype).init_weights(0)
    x, y = pair()
    actual = half(x, y)
    assert actual.dtype == torch.float32
    assert half.features(x)[0].dtype == dtype
    torch.testing.assert_close(actual, recipe(x, y), rtol=0.03, atol=0)


def test_compiles_to_one_graph_with_the_same_result(recipe):
    x, y = pair(16)
    x.requires_grad_(True)
    actual = torch.compile(recipe, backend="aot_eager", fullgraph=True)(x, y)
    torch.testing.assert_close(actual, recipe(x, y))
    (found,), (wanted,) = (torch.autograd.grad(value.sum(), x) for value in (actual, recipe(x, y)))
    torch.testing.assert_close(found, wanted)


def test_stays_in_eval_mode_and_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    lpips = LPIPS().train()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in lpips.modules())
    assert all(value.isnan().all() for value in lpips.weights().values())


def test_reads_a_file_of_torchvision_and_linear_weights_of_its_own(plain, tmp_path):
    state = {**plain.weights(), "classifier.6.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "vgg16.pth")
    torch.save(plain.linear_weights(), tmp_path / "linear.pth")
    ours = load_lpips(str(tmp_path / "vgg16.pth"), linear=str(tmp_path / "linear.pth"), resize=0, replace_pooling=False)
    x, y = pair()
    torch.testing.assert_close(ours(x, y), plain(x, y), rtol=0, atol=0)


def test_files_that_do_not_fit_are_named(plain, tmp_path):
    path = tmp_path / "vgg.safetensors"
    with pytest.raises(CheckpointError, match=r"vgg\.safetensors: no such file, expected weights"):
        load_lpips(str(path))
    path.write_bytes(b"{" * 100)
    with pytest.raises(CheckpointError, match=r"vgg\.safetensors: damaged or cut short"):
        load_lpips(str(path))
    state = {name: value.contiguous() for name, value in plain.weights().items()}
    save_file({name: value for name, value in state.items() if name != "features.5.bias"}, path)
    with pytest.raises(CheckpointError, match=r"'features\.5\.bias' is missing; the file belongs to another architecture"):
        load_lpips(str(path))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth: holds no weights by name"):
        load_lpips(str(tmp_path / "list.pth"))


def test_configuration_names_no_source_by_default_and_rejects_nonsense():
    config = FeaturesConfig()
    assert config.lpips == ""
    assert config.discriminator == {"deit_base_distilled_patch16_224": "", "tf_efficientnet_lite0": ""}
    assert FeaturesConfig.model_validate({"discriminator": {"resnet18": "random"}}).discriminator == {"resnet18": "random"}
    for wrong in ({"size": 16}, {"lpips_resize": -1}, {"discriminator": {}}, {"dtype": "int8"}, {"lpip": "x"}):
        with pytest.raises(ValidationError):
            FeaturesConfig.model_validate(wrong)


def test_no_source_and_a_missing_package_say_what_to_do(monkeypatch):
    with pytest.raises(ConfigError, match="give a file, 'download' or, to try, 'random'"):
        load_lpips("")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ConfigError, match=r"pip install fastcm\[features\]"):
        load_lpips("random")


def test_a_failed_download_names_the_repository(monkeypatch):
    import huggingface_hub

    def fail(repository: str, name: str) -> str:
        raise OSError(f"no route to {repository}/{name}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors of timm/vgg16\.tv_in1k could not be fetched"):
        load_lpips("download")
