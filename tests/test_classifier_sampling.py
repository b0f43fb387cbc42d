"""Guidance by a classifier on distributions whose guided form is known, and rejection of what a classifier refuses."""

import math

import pytest
import torch
from torch import nn

from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.diffusion.preconditioners import EDM
from fastcm.diffusion.trajectory import Trajectory
from fastcm.errors import ConfigError
from fastcm.model import Model, SamplingDefaults
from fastcm.random import Stream
from fastcm.sampling import ClassifierGuided, Guided, sample, sample_euler, sample_heun, sample_trajectory
from fastcm.sampling import sample_with_rejection as keep
from fastcm.sampling.classifier import log_probability

SHAPE = (1, 2, 2)
DEVIATION = 0.3
MEANS = torch.tensor([-0.6, 0.1, 0.8])  # of every pixel of an image of each class
PRIORS = torch.tensor([0.5, 0.2, 0.3])


class Known(nn.Module):
    """Images whose pixels are N(mean, 0.3^2): exact denoiser and jump, with what ``sample`` asks of a model.

    With label_dim, class k has the mean MEANS[k].
    """

    image_shape, sigma_min, sigma_max, second_time = SHAPE, 0.0, math.inf, True
    sampling, trajectory = SamplingDefaults("trajectory"), Trajectory()
    round_sigma = staticmethod(lambda sigma: sigma)

    def __init__(self, label_dim=0):
        super().__init__()
        self.label_dim, self.seen = label_dim, []
        self.device = nn.Parameter(torch.zeros(()))

    def mean(self, labels):
        self.seen.append(labels)
        return torch.zeros(()) if labels is None else MEANS[labels][:, None, None, None]

    def forward(self, x, sigma, labels=None):
        sigma, mean = torch.as_tensor(sigma).reshape(-1, 1, 1, 1), self.mean(labels)
        return mean + DEVIATION**2 / (DEVIATION**2 + sigma**2) * (x - mean)

    def jump(self, x, t, s, labels=None):
        t, s, mean = (torch.as_tensor(level).reshape(-1, 1, 1, 1) for level in (t, s, self.mean(labels)))
        return mean + (x - mean) * ((DEVIATION**2 + s**2) / (DEVIATION**2 + t**2)).sqrt()


class Mixture(Known):
    """The mixture of all classes: its denoiser is the mean of theirs, weighted by p(class | x; sigma)."""

    def forward(self, x, sigma, labels=None):
        share = mixture_logits(x, torch.as_tensor(sigma), None).softmax(1)
        every = [Known(3)(x, sigma, torch.full((len(x),), k)) for k in range(3)]
        return sum(share[:, k, None, None, None] * every[k] for k in range(3))


def mixture_logits(x, sigma, labels):
    """log p(class | x; sigma) of ``Mixture`` but for what is common to all classes."""
    distance = (x[:, None] - MEANS[:, None, None, None]).square().sum((2, 3, 4))
    return PRIORS.log() - distance / (2 * (DEVIATION**2 + sigma.reshape(-1, 1) ** 2))


TILT = 2.0


def tilt(x, sigma, labels):
    """log p = TILT sum(x_0) for ``Known``, given the noisy x: the guided distribution is N(TILT 0.3^2, 0.3^2)."""
    return TILT * DEVIATION**2 / (DEVIATION**2 + sigma**2) * x.sum((1, 2, 3))


def start(num=4, sigma=80.0):
    return Stream(0, "latents").image_normal(torch.arange(num), SHAPE).double() * sigma


def noise(step, num=4):
    return Stream(0, "sampler_noise").image_normal(torch.arange(num), SHAPE, draw=step)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 2.0, 80.0])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_guided_mixture_is_the_class(label, sigma):
    """At scale 1 the guided score is that of p(x | y), so that the guided denoiser is the class's own."""
    labels, x = torch.full((4,), label), start(sigma=math.hypot(sigma, 0.5)).float()
    guided = ClassifierGuided(Mixture(), mixture_logits, label_dim=3)
    expected = Known(3)(x, sigma, labels)
    torch.testing.assert_close(guided(x, sigma, labels), expected, rtol=1e-4, atol=1e-4)
    one_hot = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(guided(x, torch.full((4,), sigma), one_hot), guided(x, sigma, labels))


@pytest.mark.parametrize("sampler", [sample_heun, sample_euler])
def test_guided_samples_of_a_mixture_are_those_of_the_class(sampler):
    labels, sigmas = torch.tensor([0, 1, 2, 1]), karras_sigmas(40)
    guided = sampler(ClassifierGuided(Mixture(), mixture_logits, label_dim=3), start(), sigmas, labels=labels)
    torch.testing.assert_close(guided, sampler(Known(3), start(), sigmas, labels=labels), rtol=1e-3, atol=1e-3)
    unguided = sampler(Mixture(), start(), sigmas)
    assert (guided - unguided).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_scale_multiplies_the_tilt(scale):
    images = sample_heun(ClassifierGuided(Known(), tilt, scale), start(), karras_sigmas(60))
    shift = images - sample_heun(Known(), start(), karras_sigmas(60))
    torch.testing.assert_close(shift, torch.full_like(shift, scale * TILT * DEVIATION**2), rtol=0.01, atol=0)


def test_guided_jumps_converge_to_the_guided_distribution_with_first_order():
    def error(num_jumps, gamma=0.0):
        guided = ClassifierGuided(Known(), tilt)
        sigmas = karras_sigmas(num_jumps + 1)
        images = sample_trajectory(guided, start(), sigmas, gamma=gamma, noise=noise)
        unguided = sample_trajectory(Known(), start(), sigmas, gamma=gamma, noise=noise)
        return (images - unguided - TILT * DEVIATION**2).abs().max().item()

    coarse, fine = error(32), error(64)
    assert fine < 0.01
    assert 1.8 < coarse / fine < 2.4
    assert error(64, gamma=0.5) < 0.03


def test_guided_jump_is_the_jump_of_the_guided_denoiser():
    """With g = D, as of a network that is told nothing of s, both ways of guiding are one."""

    class Flat(nn.Module):
        second_time = True

        def forward(self, x, c_noise, labels=None, augment=None, dropout=None, second_N=None):
            return 0.3 * x + c_noise[:, None, None, None]

    model = Model(Flat(), EDM(), SHAPE)
    guided, x = ClassifierGuided(model, mixture_logits, 2.0, label_dim=3), start(sigma=3.0).float()
    t, s, labels = torch.tensor([3.0, 2.0, 0.5, 0.4]), torch.tensor([1.0, 0.0, 0.5, 0.1]), torch.tensor([0, 1, 2, 0])
    share = (s / t)[:, None, None, None]
    torch.testing.assert_close(guided.jump(x, t, s, labels), share * x + (1 - share) * guided(x, t, labels))
    assert torch.equal(guided.jump(x, t, t, labels), x)


def test_class_conditional_model_and_classifier_see_the_same_labels():
    model, seen, labels = Known(3), [], torch.tensor([2, 0, 1, 1])
    guided = ClassifierGuided(model, lambda x, sigma, labels: seen.append(labels) or mixture_logits(x, sigma, labels))
    assert guided.label_dim == 3
    guided(start().float(), 1.0, labels)
    assert torch.equal(model.seen[0], labels)
    assert torch.equal(seen[0], labels)


def test_model_without_classes_is_given_none():
    model = Known()
    images = sample(ClassifierGuided(model, mixture_logits, label_dim=3), 4, 8, labels=2)
    assert model.seen
    assert all(labels is None for labels in model.seen)
    assert not torch.allclose(images, sample(model, 4, 8))


@pytest.mark.parametrize("sampler", ["heun", "trajectory"])
def test_sample_takes_a_guided_model_at_any_batch_size(sampler):
    guided = ClassifierGuided(Known(), mixture_logits, label_dim=3)
    together = sample(guided, 5, 4, sampler=sampler)
    torch.testing.assert_close(sample(guided, 5, 4, sampler=sampler, batch_size=2), together, rtol=1e-4, atol=1e-4)
    assert not together.requires_grad


def test_guided_models_can_be_guided_by_classifiers():
    both = ClassifierGuided(Guided(Known(3), Known(), 2.0), mixture_logits)
    assert sample(both, 2, 4, sampler="heun", labels=1).isfinite().all()
    with pytest.raises(ConfigError, match="second time"):
        sample(both, 2, 4, labels=1)


def test_weights_of_the_classifier_get_no_gradient():
    weights = nn.Linear(4, 3)
    ClassifierGuided(Known(), lambda x, sigma, labels: weights(x.flatten(1)), label_dim=3)(start(), 1.0, torch.zeros(4).long())
    assert weights.weight.grad is None


@pytest.mark.parametrize(
    ("classifier", "labels", "message"),
    [
        (lambda x, sigma, labels: x, torch.zeros(4).long(), r"expected logits \[4, classes\]"),
        (lambda x, sigma, labels: x[:1].flatten(1), torch.zeros(4).long(), "expected logits"),
        (lambda x, sigma, labels: x.flatten(1), None, "say which class"),
        (lambda x, sigma, labels: x.flatten(1), torch.ones(4, 3), "rows of 3 classes"),
        (lambda x, sigma, labels: x.detach().flatten(1), torch.zeros(4).long(), "no gradient"),
    ],
)
def test_classifiers_that_cannot_guide_say_why(classifier, labels, message):
    with pytest.raises(ConfigError, match=message):
        ClassifierGuided(Known(), classifier, label_dim=4)(start().float(), 1.0, labels)


def test_other_numbers_of_classes_say_why():
    with pytest.raises(ConfigError, match="the model has 3 classes, the classifier 4"):
        ClassifierGuided(Known(3), mixture_logits, label_dim=4)


def test_log_probability_is_that_of_the_label():
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]])
    x, sigma = torch.zeros(2, *SHAPE), torch.zeros(2)
    log_p = log_probability(lambda *_: logits, x, sigma, torch.tensor([1, 2]))
    torch.testing.assert_close(log_p, torch.stack((logits[0].log_softmax(0)[1], logits[1].log_softmax(0)[2])))
    assert log_probability(lambda *_: logits, x, sigma, torch.tensor([3, -1])).exp().tolist() == [0, 0]


def above(level):
    """p = 1 for images of which the mean pixel is above a level, else 0.01."""
    return lambda x, sigma, labels: torch.where(x.mean((1, 2, 3)) > level, 0.0, math.log(0.01))


def test_what_is_kept_is_the_part_of_the_distribution_that_the_classifier_wants():
    images = keep(Known(), 4000, 1, classifier=above(0.0), threshold=0.5, candidates=40)
    means = images.mean((1, 2, 3))
    assert means.min() > 0
    # The mean of a normal distribution above its middle; that of four pixels has half the deviation of one.
    assert means.mean().item() == pytest.approx(DEVIATION / 2 * math.sqrt(2 / math.pi), rel=0.04)
    assert means.std().item() == pytest.approx(DEVIATION / 2 * math.sqrt(1 - 2 / math.pi), rel=0.06)


def test_first_candidates_are_the_images_of_sample():
    plain = sample(Known(), 40, 2, 3, gamma=0.5)
    kept = keep(Known(), 40, 2, 3, classifier=above(0.0), threshold=0.5, gamma=0.5)
    fine = plain.mean((1, 2, 3)) > 0
    assert 5 < fine.sum() < 35
    assert torch.equal(kept[fine], plain[fine])
    assert torch.cdist(kept[~fine].flatten(1), plain.flatten(1)).min() > 1e-3  # nor are they those of other indices
    assert torch.equal(keep(Known(), 40, 2, 3, classifier=above(0.0), candidates=1, gamma=0.5), plain)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_kept_images_depend_on_nothing_but_seed_and_index(threshold):
    options = {"classifier": mixture_logits, "threshold": threshold, "candidates": 200 if threshold else 5}
    together = keep(Mixture(), 8, 6, 1, labels=torch.arange(8) % 3, sampler="heun", **options)
    apart = keep(Mixture(), 8, 6, 1, labels=torch.arange(8) % 3, sampler="heun", batch_size=3, **options)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)
    later = keep(Mixture(), 3, 6, 1, labels=torch.arange(5, 8) % 3, sampler="heun", index_offset=5, **options)
    torch.testing.assert_close(later, together[5:], rtol=1e-4, atol=1e-5)
    other = keep(Mixture(), 8, 6, 2, labels=torch.arange(8) % 3, sampler="heun", **options)
    assert not torch.isclose(other, together).all(dim=(1, 2, 3)).any()


def test_labels_of_a_model_without_classes_are_for_the_classifier():
    labels = torch.arange(30) % 3
    images = keep(Mixture(), 30, 12, classifier=mixture_logits, labels=labels, threshold=0.9, candidates=200, sampler="heun")
    assert ((images.mean((1, 2, 3)) - MEANS[labels]).abs() < 0.5).all()
    p = mixture_logits(images, torch.tensor(0.002), None).softmax(1)[torch.arange(30), labels]
    assert (p >= 0.9).all()


def test_every_image_keeps_its_drawn_class():
    model, told = Known(3), []

    def classifier(x, sigma, labels):
        told.append((sigma, labels))
        return above(-0.4)(x, sigma, labels)

    keep(model, 50, 1, classifier=classifier, threshold=0.5, candidates=400, classifier_sigma=0.01)
    drawn = told[0][1]
    assert len(drawn.unique()) == 3
    assert torch.equal(model.seen[0], drawn)
    assert set(told[-1][1].tolist()) == {0}  # the class that is rarely above -0.4 takes longest
    assert (told[0][0] == 0.01).all()
    assert (keep(Known(3), 9, 1, classifier=mixture_logits, labels=2, candidates=3).mean((1, 2, 3)) > 0.3).all()


def test_best_of_more_candidates_is_better():
    def mean(candidates):
        return keep(Known(), 200, 1, classifier=lambda x, *_: x.mean((1, 2, 3)), candidates=candidates).mean((1, 2, 3))

    one, two, eight = (mean(candidates) for candidates in (1, 2, 8))
    assert ((one <= two) & (two <= eight)).all()
    # The largest of two standard normals has the mean 1 / sqrt(pi), of eight 1.4236.
    assert two.mean().item() == pytest.approx(DEVIATION / 2 / math.sqrt(math.pi), abs=0.03)
    assert eight.mean().item() == pytest.approx(DEVIATION / 2 * 1.4236, abs=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": 0}, "num and candidates"),
        ({"candidates": 0}, "num and candidates"),
        ({"threshold": 0.0}, "threshold: expected"),
        ({"threshold": 1.5}, "threshold: expected"),
        ({"threshold": math.nan}, "threshold: expected"),
        ({"classifier": above(9.0), "threshold": 0.5}, "threshold: 5 of 5 images have no candidate among 3 .*0.01"),
        ({"classifier": lambda x, *_: x.mean((1, 2, 3)) * math.nan}, "above 0"),
        ({"classifier": mixture_logits, "labels": 3}, "above 0"),
        ({"classifier": mixture_logits}, "say which class"),
        ({"labels": torch.arange(4)}, "each of 5 images"),
        ({"sampler": "ddim"}, "ddim"),
    ],
)
def test_impossible_rejections_say_why(change, message):
    with pytest.raises(ConfigError, match=message):
        keep(**({"model": Known(), "num": 5, "steps": 1, "classifier": above(0.0), "candidates": 3} | change))
