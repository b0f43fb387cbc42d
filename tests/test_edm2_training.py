"""EDM2 in training and sampling: forced weight normalisation, learned uncertainty, guidance."""

import copy
import math

import pytest
import torch
from edm2_cases import inputs, tiny, with_gains
from golden_models import batch_of
from torch import Tensor

from fastcm.config import load_config
from fastcm.diffusion.preconditioners import EDM
from fastcm.errors import ConfigError
from fastcm.model import Model
from fastcm.nn import EDM2UNet, UNet
from fastcm.objectives import EDMObjective
from fastcm.sampling import Guided
from fastcm.sampling import sample as sample_images
from fastcm.train.optimizer import Optimizer, WeightAverage

ONE, ZERO = torch.ones(()), torch.zeros(())


def rms_of_rows(weight: Tensor) -> Tensor:
    return weight.flatten(1).square().mean(1).sqrt()


def test_constrained_weights_have_unit_magnitude_and_gains_stay():
    net = with_gains(tiny(label_dim=10), 0.7)
    net.constrain_weights(ONE)
    for weight in net.parameters():
        if weight.ndim:
            torch.testing.assert_close(rms_of_rows(weight), torch.ones(len(weight)), rtol=0, atol=5e-4)
        else:
            assert weight == torch.tensor(0.7)


def test_no_bit_changes_where_the_step_was_skipped():
    net = tiny()
    with torch.no_grad():
        net.out_conv.weight[0, 0, 0] = torch.tensor([0.0, -0.0, 1e-42])
        net.emb_noise.weight[0] = torch.nan
    before = {name: weight.detach().clone().view(torch.int32) for name, weight in net.named_parameters()}
    net.constrain_weights(ZERO)
    assert all(torch.equal(weight.view(torch.int32), before[name]) for name, weight in net.named_parameters())


def literal_normalisation(net: EDM2UNet) -> None:
    """What the official layers do at the start of a forward pass in training mode, spelled out."""
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim:
                weight.copy_(weight / (1e-4 + rms_of_rows(weight)).reshape(-1, *[1] * (weight.ndim - 1)))


@pytest.mark.parametrize(("kind", "lr"), [(torch.optim.Adam, 0.05), (torch.optim.SGD, 0.02)])
def test_once_per_step_is_the_official_sequence(kind, lr):
    """Several steps with constrain_weights after each, against normalisation at the start of each forward pass."""
    ours, literal = (with_gains(tiny(), 0.5).double() for _ in range(2))
    optimizers = [kind(net.parameters(), lr=lr) for net in (ours, literal)]
    averages = [copy.deepcopy(net) for net in (ours, literal)]
    ours.constrain_weights(ONE)
    for step in range(4):
        literal_normalisation(literal)
        assert_same_parameters(ours, literal)
        for net, optimizer, average in zip((ours, literal), optimizers, averages, strict=True):
            x, c_noise = (value.double() for value in inputs(first=3 * step))
            optimizer.zero_grad()
            ((net(x, c_noise) - x).square().sum() + net.log_variance(c_noise).square().sum()).backward()
            optimizer.step()
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), net.parameters(), strict=True):
                    mean.lerp_(weight, 0.4)
        drift = max((rms_of_rows(weight) - 1).abs().max() for weight in ours.parameters() if weight.ndim)
        assert drift > 1e-5  # the step left the sphere, so what the average sees is not what is stored next
        ours.constrain_weights(ONE)
    assert_same_parameters(*averages)


def assert_same_parameters(one, two):
    for name, weight in one.named_parameters():
        torch.testing.assert_close(weight, dict(two.named_parameters())[name], rtol=1e-8, atol=1e-9)


def test_constraining_compiles_without_graph_breaks():
    one, two = tiny(), tiny()
    one.constrain_weights(ONE)
    constrain = torch.compile(two.constrain_weights, fullgraph=True, backend="aot_eager")
    constrain(ZERO)
    assert torch.equal(two.emb_noise.weight, tiny().emb_noise.weight)
    constrain(ONE)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.gpu
def test_a_captured_constraint_follows_the_flag():
    net, finite = tiny().cuda(), torch.ones((), device="cuda")
    net.constrain_weights(finite)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net.constrain_weights(finite)
    with torch.no_grad():
        net.emb_noise.weight.mul_(3)
    moved = net.emb_noise.weight.detach().clone()
    finite.zero_()
    graph.replay()
    assert torch.equal(net.emb_noise.weight, moved)
    finite.fill_(1)
    graph.replay()
    torch.testing.assert_close(net.emb_noise.weight, moved / 3, rtol=1e-3, atol=0)


def model_of(net) -> Model:
    return Model(net, EDM(), (1, 8, 8), net.label_dim)


def losses_at(objective, model, sigma):
    x, _ = inputs(n=len(sigma))
    return objective.loss_at(model, batch_of(x), sigma, inputs(n=len(sigma), first=50)[0]).loss_N


def test_the_log_variance_that_minimises_the_loss_is_that_of_the_error():
    """d/du (S / e^u + u d) = 0 at e^u = S / d, where the loss is d (1 + u)."""
    model, sigma, elements = model_of(with_gains(tiny())), torch.full((4,), 0.5), 64
    with torch.no_grad():
        mean_error = losses_at(EDMObjective(), model, sigma).mean() / elements
    model.net.log_variance = lambda c_noise_N: u.expand(len(c_noise_N))
    u = mean_error.log().requires_grad_()
    loss = losses_at(EDMObjective(uncertainty=True), model, sigma).mean()
    loss.backward()
    torch.testing.assert_close(loss, elements * (1 + u))
    assert u.grad.abs() < 1e-3 * elements


def test_uncertainty_trains_the_log_variance():
    model, sigma = model_of(tiny()), torch.tensor([0.1, 1.0, 10.0])
    layer = model.net.logvar_linear.weight
    losses_at(EDMObjective(), model, sigma).sum().backward()
    assert layer.grad is None
    losses_at(EDMObjective(uncertainty=True), model, sigma).sum().backward()
    assert layer.grad.isfinite().all()
    assert layer.grad.any()


def test_uncertainty_needs_a_network_that_learns_it():
    message = r"phases\.pretrain\.objective\.uncertainty needs network\.family edm2 with logvar_channels above 0"
    with pytest.raises(ConfigError, match=message):
        load_config("edm_cifar10", ["phases.pretrain.objective.uncertainty=true"])
    with pytest.raises(ConfigError, match=message):
        load_config("edm2_imagenet64_s", ["network.logvar_channels=0"])
    unet = UNet("ddpmpp", 8, 1, model_channels=16, channel_mult=(1,), num_blocks=1).init_weights(0)
    with pytest.raises(ValueError, match="UNet has no log variance: use family edm2"):
        losses_at(EDMObjective(uncertainty=True), model_of(unet), torch.ones(3))


def test_the_recipe_has_the_constants_of_the_paper():
    phase = load_config("edm2_imagenet64_s").phases["pretrain"]
    mebi = 2**20
    assert (phase.duration_images, phase.ema_snapshot_images) == (2048 * mebi, 8 * mebi)
    assert phase.optimizer.decay_images == 35_000 * phase.batch_size
    assert [ema.std for ema in phase.emas.values()] == [0.05, 0.10]


def labelled(seed=0, **options) -> Model:
    net = with_gains(EDM2UNet(8, 1, **(SMALL | options)).init_weights(seed))
    return model_of(net.requires_grad_(False))


SMALL = {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "label_dim": 3}


def test_guidance_extrapolates_from_the_guide_through_the_model():
    model, guide = labelled(), labelled(seed=1)
    x, sigma, labels = inputs()[0], torch.tensor([0.1, 1.0, 10.0]), torch.arange(3)
    good, weak = model(x, sigma, labels), guide(x, sigma, labels)
    torch.testing.assert_close(Guided(model, guide, 1.7)(x, sigma, labels=labels), weak + 1.7 * (good - weak))
    torch.testing.assert_close(Guided(model, guide, 0.0)(x, sigma, labels=labels), weak)


def test_a_guide_without_classes_and_the_model_itself_see_no_labels():
    model, unconditional = labelled(), labelled(seed=1, label_dim=0)
    x, sigma, labels = inputs()[0], torch.tensor([0.1, 1.0, 10.0]), torch.arange(3)
    good = model(x, sigma, labels)
    for guide, guided in (
        (unconditional(x, sigma), Guided(model, unconditional, 2.0)),
        (model(x, sigma), Guided(model, model, 2.0, drop_labels=True)),
    ):
        torch.testing.assert_close(guided(x, sigma, labels=labels), 2 * good - guide)


def test_guidance_of_one_does_not_evaluate_the_guide():
    model, guide = labelled(), labelled(seed=1)
    guide.forward = None
    x, labels = inputs()[0], torch.arange(3)
    assert torch.equal(Guided(model, guide, 1.0)(x, 0.5, labels=labels), model(x, 0.5, labels))


def test_a_guided_model_is_sampled_as_any_other():
    model, guide = labelled(), labelled(seed=1)
    samples = {guidance: sample_images(Guided(model, guide, guidance), 4, 3) for guidance in (1.0, 1.5)}
    torch.testing.assert_close(samples[1.0], sample_images(model, 4, 3))
    assert not torch.allclose(samples[1.5], samples[1.0])
    assert samples[1.5].isfinite().all()


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda model: model, "cannot guide itself"),
        (lambda model: labelled(label_dim=4), "4 classes, the model 3"),
        (lambda model: Model(model.net, EDM(), (3, 8, 8), 3), r"shape \(3, 8, 8\)"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(guide, message):
    model = labelled()
    with pytest.raises(ConfigError, match=message):
        Guided(model, guide(model), 1.5)


def test_the_optimizer_and_the_constraint_skip_the_same_steps():
    net = with_gains(tiny())
    parameters = dict(net.named_parameters())
    average = WeightAverage(parameters)
    optimizer = Optimizer(parameters, "adam", (0.9, 0.99), 1e-8, averages=[average])
    for poison in (math.inf, 0.0):
        before = [weight.detach().clone() for weight in net.parameters()]
        (net(*inputs()).square().sum() + net.log_variance(torch.ones(2)).sum()).backward()
        net.out_gain.grad += poison
        finite, _ = optimizer.step(torch.tensor(0.01), torch.tensor([0.9]))
        net.constrain_weights(finite)
        changed = [not torch.equal(weight, old) for weight, old in zip(net.parameters(), before, strict=True)]
        assert any(changed) == all(changed) == (poison == 0)
