"""What the adversarial stage need not do, and that compiling it changes nothing."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from test_ctm import adversarial_config
from test_ctm_adversarial import FEATURES, TINY_GAN, images, phase_of

from fastcm.config import GANConfig, parse_config
from fastcm.data.dataset import load_resident
from fastcm.data.sources import open_source
from fastcm.io.feature_files import load_feature_network, load_lpips
from fastcm.nn.features import FeatureNetwork
from fastcm.nn.perceptual import LPIPS
from fastcm.train.adversary import Adversary
from fastcm.train.phase import Phase

CPU = torch.device("cpu")
INDEX = torch.arange(40, 44)


def adversary_of(compiled, **options):
    return Adversary(GANConfig(**(TINY_GAN | options)), FEATURES, 3, 0, 0, CPU, compiled)


@pytest.mark.parametrize("options", [{}, {"conditional": True, "norm": "batch", "different_augment": True}])
def test_the_compiled_losses_are_the_plain_ones_in_one_graph_each(monkeypatch, options):
    compile_, wrapped = torch.compile, []

    def aot_eager(function, **given):
        wrapped.append((function.__name__, given))
        return compile_(function, backend="aot_eager", **given)

    monkeypatch.setattr(torch, "compile", aot_eager)
    plain, compiled = adversary_of(False, **options), adversary_of(True, **options)
    whole = {"fullgraph": True, "dynamic": False}
    assert wrapped == [("_plain_generator_loss", whole), ("_plain_discriminator_loss", whole)]
    labels = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    for turn in range(2):
        results = []
        with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
            for adversary in (plain, compiled):
                fake = images(draw=2 + turn).requires_grad_()
                loss_N = adversary.generator_loss(fake, labels, INDEX)
                (slope,) = torch.autograd.grad(loss_N.mean(), fake)
                adversary.accumulate(images(draw=turn), fake, labels, INDEX, 0.5)
                heads = {name: p.grad.clone() for name, p in adversary.discriminator.heads.named_parameters()}
                results.append({"loss": loss_N.detach(), "slope": slope, **heads})
                adversary.step(torch.tensor(2e-3))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-7)
        assert results[0]["slope"].abs().max() > 0
        assert plain.read() == pytest.approx(compiled.read(), rel=1e-4)


@pytest.mark.parametrize(("mode", "expected"), [("on", True), ("off", False), ("auto", False)])
def test_a_phase_compiles_its_adversary_as_its_step(monkeypatch, mode, expected):
    monkeypatch.setattr(torch, "compile", lambda function, **_: partial(function))
    config = adversarial_config()
    config = parse_config({**config, "compute": {**config.get("compute", {}), "compile": mode}}, "tiny")
    adversary = Phase(config, "distill", load_resident(open_source("digits", "", labels=False), device=CPU), CPU, 64).adversary
    for loss in (adversary._generator_loss, adversary._discriminator_loss):
        assert hasattr(loss, "__wrapped__") == expected


def test_a_discriminators_step_builds_no_graph_of_the_generator_and_asks_no_teacher(monkeypatch):
    phase, saved = phase_of(), []
    step, batch = phase.gradient, phase.loader.batch(64)
    for model in (phase.networks.teacher, phase.networks.student):
        monkeypatch.setattr(model, "forward", lambda *_: pytest.fail("a pass that this step does not need"))
    real = phase.adversary.accumulate

    def accumulate(images_NCHW, fake_NCHW, *rest):
        generated = len(saved)  # before the discriminator's own graph
        assert generated == 0
        assert fake_NCHW.grad_fn is None
        real(images_NCHW, fake_NCHW, *rest)

    monkeypatch.setattr(phase.adversary, "accumulate", accumulate)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
        step.train_discriminator(*step.prepare_discriminator(batch, 64))
        assert saved  # the hooks do see graphs
    assert all(p.grad is None for p in phase.model.parameters())


def of_format(layer):
    return layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_feature_networks_are_channels_last_whatever_their_file(tmp_path):
    name = "mobilenetv3_small_050"
    weights = FeatureNetwork(name, size=64).init_weights(0).weights()
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "cnn.safetensors")
    network = load_feature_network(name, str(tmp_path / "cnn.safetensors"), size=64).to(CPU)
    lpips = LPIPS(resize=32).init_weights(0)
    save_file({key: value.contiguous() for key, value in lpips.weights().items()}, tmp_path / "vgg.safetensors")
    lpips = load_lpips(str(tmp_path / "vgg.safetensors"), resize=32)
    layers = [layer for net in (network, lpips) for layer in net.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(layers) > 20
    assert all(of_format(layer) for layer in layers)
    x = images().expand(-1, 3, -1, -1)
    for x_map in (*network(x), *lpips.features(x)):
        assert x_map.is_contiguous(memory_format=torch.channels_last)


def test_lpips_keeps_no_features_of_the_target_for_a_backward_pass():
    lpips, graphs = LPIPS(resize=32).init_weights(0), []
    lpips.torso[-1].register_forward_hook(lambda layer, inputs, output: graphs.append(output.requires_grad))
    lpips(images().requires_grad_(), images(draw=1).requires_grad_())
    assert sorted(graphs) == [False, True]
