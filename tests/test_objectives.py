"""Objectives: determinism, independence of the batch, finite gradients, one graph without host syncs."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from golden_models import batch_of
from torch import nn

from fastcm.diffusion.consistency import consistency_weight, t_to_r
from fastcm.diffusion.grid import Grid, ScaleSchedule
from fastcm.diffusion.preconditioners import EDM
from fastcm.errors import ConfigError
from fastcm.model import Model, one_hot
from fastcm.nn import UNet
from fastcm.objectives import (
    ECT,
    OBJECTIVES,
    ConsistencyDistillation,
    ConsistencyTraining,
    EDMObjective,
    ImprovedConsistencyTraining,
    Networks,
    ProgressiveDistillation,
)
from fastcm.objectives.base import dropout_key, noise_key
from fastcm.objectives.consistency import noise_pair, pair_loss, solver_pair
from fastcm.objectives.distances import image_distance, weighted_distance
from fastcm.random import Stream

SHAPE = (3, 8, 8)
ALL = {
    "edm": EDMObjective(),
    "vp": EDMObjective(variant="vp"),
    "ve": EDMObjective(variant="ve"),
    "ect": ECT(),
    "ect_const": ECT(mapping="const", q=256.0, distance="squared", weight="edm"),
    "ect_huber": ECT(q=4.0, distance="pseudo_huber", c=0.03),
    "cd": ConsistencyDistillation(),
    "cd_euler_l1": ConsistencyDistillation(solver="euler", distance="l1"),
    "ct": ConsistencyTraining(start_scales=20, scales_images=8_000_000, target_halflife_images=1000.0),
    "ict": ImprovedConsistencyTraining(scales_images=8_000_000),
    "pd": ProgressiveDistillation(stage_images=2_000_000),
}


def tiny_model(dropout=0.3, label_dim=4, dtype=torch.float32):
    net = UNet(
        "ddpmpp",
        SHAPE[1],
        SHAPE[0],
        label_dim=label_dim,
        model_channels=8,
        channel_mult=(1, 1),
        num_blocks=1,
        attn_resolutions=(4,),
        dropout=dropout,
    ).init_weights(0)
    with torch.no_grad():  # layers that start near zero would hide labels and dropout
        for weight in net.parameters():
            if weight.ndim == 4:
                weight.mul_(1 / (weight.std() * weight[0].numel() ** 0.5))
    return Model(net, EDM(), SHAPE, label_dim, dtype)


def tiny_batch(num=5, first_index=100, label_dim=4):
    index = torch.arange(first_index, first_index + num)
    images = Stream(7, "images").image_normal(index, SHAPE).clamp(-2, 2) / 2
    return batch_of(images, one_hot(Stream(7, "labels").integers(index, label_dim), label_dim), first_index)


def scheduled(objective, images=0):
    return {name: torch.tensor(value) for name, value in objective.schedule(images).items()}


def networks_for(objective, model):
    """The model as student and, where the objective has a use for them, frozen copies as target and teacher."""
    needs = (objective.target_halflife(0) is not None, objective.needs_teacher)
    return Networks(model, *(copy.deepcopy(model).requires_grad_(False) if needed else None for needed in needs))


def losses(objective, model, batch, seed=3, images=0):
    return objective.loss(networks_for(objective, model), batch, seed, scheduled(objective, images))


class Spy(nn.Module):
    """A network that records how it is called and answers with a multiple of its input."""

    def __init__(self):
        super().__init__()
        self.gain, self.calls = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, c_noise, labels=None, augment=None, dropout=None):
        self.calls.append({"x": x, "c_noise": c_noise, "labels": labels, "augment": augment, "dropout": dropout})
        return self.gain * x


@pytest.fixture
def all_rows(monkeypatch):
    """Have the target work for the rows at the boundary too, as on a device whose values the host does not see."""
    monkeypatch.setattr("fastcm.objectives.consistency.on_cpu", lambda value: False)


@pytest.fixture(params=ALL)
def objective(request):
    return ALL[request.param]


def test_loss_is_one_finite_number_per_image_with_gradients_everywhere(objective):
    model, batch = tiny_model(), tiny_batch()
    terms = losses(objective, model, batch)
    assert terms.loss_N.shape == terms.sigma_N.shape == (5,)
    assert terms.loss_N.dtype == terms.sigma_N.dtype == torch.float32
    assert terms.loss_N.isfinite().all()
    assert (terms.loss_N > 0).all()
    assert all(value.ndim == 0 for value in terms.logs.values())
    terms.loss_N.mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in model.parameters()) > 0


def test_same_seed_same_loss_and_another_seed_another(objective):
    model, batch = tiny_model(), tiny_batch()
    first, again, other = (losses(objective, model, batch, seed) for seed in (3, 3, 4))
    assert torch.equal(first.loss_N, again.loss_N)
    assert (first.sigma_N != other.sigma_N).any()
    assert (first.loss_N != other.loss_N).all()


def test_global_generator_is_not_touched(objective):
    before = torch.get_rng_state()
    losses(objective, tiny_model(), tiny_batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_loss_of_an_image_does_not_depend_on_its_batch(objective):
    model, batch = tiny_model(), tiny_batch()
    whole = losses(objective, model, batch)
    rows = torch.tensor([3, 1])
    part = losses(
        objective, model, replace(batch, images=batch.images[rows], labels=batch.labels[rows], index=batch.index[rows])
    )
    assert torch.equal(part.sigma_N, whole.sigma_N[rows])
    torch.testing.assert_close(part.loss_N, whole.loss_N[rows], rtol=1e-4, atol=1e-5)


def test_loss_depends_on_sample_numbers_labels_and_dropout(objective):
    model, batch = tiny_model(), tiny_batch()
    base = losses(objective, model, batch).loss_N
    assert (losses(objective, model, replace(batch, index=batch.index + 1000)).loss_N != base).all()
    assert (losses(objective, model, replace(batch, labels=batch.labels.roll(1, 1))).loss_N != base).any()
    assert (losses(objective, tiny_model(dropout=0.0), batch).loss_N != base).all()


def test_loss_never_waits_for_the_device(objective):
    model, batch = tiny_model().to("meta"), tiny_batch()
    on_meta = replace(batch, images=batch.images.to("meta"), labels=batch.labels.to("meta"), index=batch.index.to("meta"))
    schedule = {name: value.to("meta") for name, value in scheduled(objective).items()}
    terms = objective.loss(networks_for(objective, model), on_meta, 3, schedule)
    terms.loss_N.mean().backward()
    assert terms.loss_N.is_meta


@pytest.mark.parametrize(
    ("device", "compiler"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", ["edm", "ect", "cd", "ct", "ict", "pd"])
def test_loss_and_gradient_compile_to_one_graph_that_serves_every_stage(name, device, compiler):
    objective, model, batch = ALL[name], tiny_model().to(device), tiny_batch(3)
    networks = networks_for(objective, model)
    batch = replace(batch, **{column: getattr(batch, column).to(device) for column in ("images", "labels", "index")})

    def loss(schedule):
        return objective.loss(networks, batch, 3, schedule).loss_N

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for i, images in enumerate((0, 4_000_000, 7_000_000)):
        schedule = {key: value.to(device) for key, value in scheduled(objective, images).items()}
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            actual = compiled(schedule)
        expected = loss(schedule)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    gradients = zip(*(torch.autograd.grad(each.mean(), list(model.parameters())) for each in (actual, expected)), strict=True)
    for one, other in gradients:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_every_registered_objective_is_constructed_by_keyword_alone():
    assert all(objective().schedule(0) is not None for objective in OBJECTIVES.values())


def test_channels_last_images_reach_the_network_as_channels_last(objective):
    spy = Spy()
    losses(objective, Model(spy, EDM(), SHAPE, 4), tiny_batch())
    assert all(call["x"].is_contiguous(memory_format=torch.channels_last) for call in spy.calls)


def test_low_precision_torso_gives_a_single_precision_loss(objective):
    terms = losses(objective, tiny_model(dtype=torch.bfloat16), tiny_batch())
    assert terms.loss_N.dtype == torch.float32
    torch.testing.assert_close(terms.loss_N, losses(objective, tiny_model(), tiny_batch()).loss_N, rtol=0.1, atol=1.0)


@pytest.mark.parametrize("variant", ["edm", "vp", "ve"])
def test_noise_levels_have_the_distribution_of_the_paper(variant):
    objective = EDMObjective(variant=variant)
    noise, stream, index = objective.noise, Stream(0, "sigma"), torch.arange(20_000)
    sigma = noise.sigma(stream.normal(index) if noise.draw == "normal" else stream.uniform(index)).double()
    if variant == "edm":
        assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.03)
        assert sigma.log().std().item() == pytest.approx(1.2, abs=0.03)
        return
    position = objective.precond.schedule.inverse(sigma) if variant == "vp" else (sigma / 0.02).log() / math.log(5000)
    assert position.mean().item() == pytest.approx(0.5, abs=0.01)
    assert position.var().item() == pytest.approx(1 / 12, abs=0.003)


def test_ect_noise_levels_are_lognormal_and_not_clipped():
    batch = tiny_batch(20_000)
    t = ECT().loss(Networks(Model(Spy(), EDM(), SHAPE, 4)), batch, 0, scheduled(ECT())).sigma_N
    assert t.log().mean().item() == pytest.approx(-1.1, abs=0.05)
    assert t.log().std().item() == pytest.approx(2.0, abs=0.05)
    assert t.min() < 0.002
    assert t.max() > 80


def boundary_case(objective, t=(0.01, 0.3, 5.0, 60.0, 0.2)):
    """(spy, batch, terms) with decay 1/2, where r = 0 for t up to 1.946."""
    spy, batch = Spy(), tiny_batch()
    terms = objective.loss_at(Model(spy, EDM(), SHAPE, 4), batch, torch.tensor(t), noise_key(batch, 1), torch.tensor(0.5))
    return spy, batch, terms


def test_rows_with_r_zero_are_compared_with_the_clean_image():
    _, batch, terms = boundary_case(ECT())
    t = terms.sigma_N[:, None, None, None]
    c_skip, c_out, c_in, _ = (value[:, None, None, None] for value in EDM().scalings(terms.sigma_N))
    x = batch.images + t * Stream(1, "noise").image_normal(batch.index, SHAPE)
    distance = (c_skip * x + c_out * 0.5 * c_in * x - batch.images).flatten(1).norm(dim=1)
    assert terms.logs["boundary"].item() == pytest.approx(3 / 5)
    rows = terms.sigma_N < 1.9
    torch.testing.assert_close(terms.loss_N[rows], (distance / terms.sigma_N)[rows])
    assert not torch.isclose(terms.loss_N[~rows], (distance / terms.sigma_N)[~rows]).any()


@pytest.mark.usefixtures("all_rows")
def test_network_is_never_asked_for_noise_level_zero():
    spy, _, terms = boundary_case(ECT())
    student, target = spy.calls
    assert student["c_noise"].isfinite().all()
    assert target["c_noise"].isfinite().all()
    assert target["x"].isfinite().all()
    rows = terms.sigma_N < 1.9
    assert torch.equal(target["c_noise"][rows], student["c_noise"][rows])
    assert (target["c_noise"][~rows] < student["c_noise"][~rows]).all()


def test_gradient_is_finite_at_r_zero():
    model, batch = tiny_model(), tiny_batch()
    t = torch.tensor([1e-6, 0.01, 0.3, 1.0, 1.9])
    terms = ECT().loss_at(model, batch, t, noise_key(batch, 1), torch.tensor(0.5), dropout_key(batch, 1))
    assert terms.logs["boundary"] == 1
    terms.loss_N.mean().backward()
    assert terms.loss_N.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("distance", "c"), [("l2", 0.0), ("squared", 0.0), ("pseudo_huber", 0.0), ("pseudo_huber", 0.03)])
def test_gradient_is_finite_where_student_equals_target(distance, c):
    """A black image without noise, and a network that answers 0: D_t = D_r = 0 = clean, exactly."""
    model, batch = tiny_model(), tiny_batch()
    with torch.no_grad():
        for parameter in list(model.net.parameters())[-2:]:  # weight and bias of the last convolution
            parameter.zero_()
    black = replace(batch, images=torch.zeros_like(batch.images))
    objective = ECT(distance=distance, c=c)
    t = torch.tensor([0.01, 0.3, 5.0, 60.0, 200.0])
    terms = objective.loss_at(model, black, t, torch.zeros_like(batch.images), torch.tensor(0.5), dropout_key(batch, 1))
    terms.loss_N.mean().backward()
    assert torch.equal(terms.loss_N, torch.zeros(5))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.usefixtures("all_rows")
def test_student_and_target_share_their_dropout_masks():
    model, batch = tiny_model(dropout=0.5), tiny_batch()
    t, noise, key = torch.full((5,), 2.0), noise_key(batch, 1), dropout_key(batch, 1)
    pair = noise_pair(batch.images, noise, t, t, EDM())  # the same point twice: equal outputs if and only if equal masks
    loss = pair_loss(model, model, pair, batch, torch.ones(5), dropout=key)
    torch.testing.assert_close(loss, torch.zeros(5), rtol=0, atol=1e-5)
    spy = Spy()
    losses(ECT(), Model(spy, EDM(), SHAPE, 4), batch)
    assert spy.calls[0]["dropout"] is not None
    assert spy.calls[0]["dropout"].key == spy.calls[1]["dropout"].key
    assert all(torch.equal(call["dropout"].index_N, batch.index) for call in spy.calls)


@pytest.mark.parametrize("at_boundary", [[], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_the_target_leaves_out_the_rows_at_the_boundary(at_boundary, distance, request):
    """Labels and dropout masks of the rows that stay are their own: nothing changes but rounding."""
    model, batch = tiny_model(dropout=0.5), tiny_batch()
    t, key = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), dropout_key(batch, 1)
    r = torch.where(torch.isin(torch.arange(5), torch.tensor(at_boundary)), 0, t / 2)
    pair, seen = noise_pair(batch.images, noise_key(batch, 1), t, r, EDM()), []

    def losses_of():
        target = copy.deepcopy(model)
        target.net.register_forward_pre_hook(lambda net, inputs: seen.append(len(inputs[0])))
        return pair_loss(model, target, pair, batch, torch.ones(5), dropout=key, distance=distance)

    found = losses_of()
    request.getfixturevalue("all_rows")
    torch.testing.assert_close(found, losses_of(), rtol=1e-5, atol=1e-6)
    assert seen == [5 - len(at_boundary), 5] if len(at_boundary) < 5 else [5]


@pytest.mark.usefixtures("all_rows")
def test_both_evaluations_see_labels_and_augmentation():
    spy, batch = Spy(), replace(tiny_batch(), augment=torch.ones(5, 9))
    losses(ECT(), Model(spy, EDM(), SHAPE, 4), batch)
    assert len(spy.calls) == 2
    for call in spy.calls:
        assert torch.equal(call["labels"], batch.labels)
        assert torch.equal(call["augment"], batch.augment)


def test_target_gets_no_gradient():
    student, batch = tiny_model(), tiny_batch()
    target = copy.deepcopy(student)
    noise, t = noise_key(batch, 1), torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0])
    pair = noise_pair(batch.images, noise, t, t / 2, EDM())
    pair_loss(student, target, pair, batch, torch.ones(5)).mean().backward()
    assert all(parameter.grad is None for parameter in target.parameters())
    expected = torch.autograd.grad(pair_loss(student, student, pair, batch, torch.ones(5)).mean(), list(student.parameters()))
    for parameter, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_pair_shares_its_noise():
    batch = tiny_batch()
    noise, t = noise_key(batch, 1), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    pair = noise_pair(batch.images, noise, t, t / 4, EDM())
    torch.testing.assert_close((pair.at_t.x_NCHW - batch.images) / 4, pair.at_r.x_NCHW - batch.images)


def test_pair_of_a_teacher_that_knows_the_image_lies_on_the_straight_line_to_it():
    """With D = y both solvers are exact: x_r = y + r n, the pair that shares its noise."""
    batch, t = tiny_batch(), torch.tensor([1.0, 2.0, 3.0, 4.0, 80.0])
    noise = noise_key(batch, 1)
    shared = noise_pair(batch.images, noise, t, t / 4, EDM())
    for second_order in (False, True):
        pair = solver_pair(batch.images, noise, t, t / 4, EDM(), lambda x, *_: batch.images, None, second_order=second_order)
        torch.testing.assert_close(pair.at_r.x_NCHW, shared.at_r.x_NCHW, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pair.at_r.input_NCHW, shared.at_r.input_NCHW, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [2, 3, 11, 1281])
def test_lognormal_indices_have_the_discretised_probabilities(levels):
    grid, u = Grid(), (torch.arange(400_000) + 0.5) / 400_000
    index = grid.lognormal_index(u, torch.tensor(float(levels)), -1.1, 2.0)
    assert index.min() >= 0
    assert index.max() <= levels - 2
    sigma = grid.sigma(torch.arange(levels, dtype=torch.float64), levels)
    cumulative = torch.erf((sigma.log() + 1.1) / (2 * math.sqrt(2)))
    expected = (cumulative[:-1] - cumulative[1:]) / (cumulative[0] - cumulative[-1])
    found = torch.bincount(index.long(), minlength=levels - 1) / len(u)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("levels", [2, 18, 1281])
def test_uniform_indices_reach_every_pair_and_none_beyond(levels):
    u = torch.cat([torch.rand(50_000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1 - 2.0**-24])])
    index = Grid().uniform_index(u, torch.tensor(float(levels)))
    assert torch.equal(index.unique(), torch.arange(levels - 1).float())


def test_doubling_curriculum_is_that_of_the_paper():
    schedule = ScaleSchedule("doubling", 10, 1280, 800)
    assert [schedule.num_levels(images) for images in (0, 99, 100, 799, 800, 10**9)] == [11, 11, 21, 1281, 1281, 1281]


def test_half_life_of_the_target_follows_the_number_of_intervals():
    objective = ConsistencyTraining(start_scales=2, end_scales=150, scales_images=100, target_halflife_images=10.0)
    assert objective.target_halflife(0) == pytest.approx(10.0 / 2)  # N' = 1 at the very beginning
    assert objective.target_halflife(100) == pytest.approx(10.0 * 150 / 2)
    assert ConsistencyDistillation(target="fixed", target_halflife_images=7.0).target_halflife(10**6) == 7.0
    assert ImprovedConsistencyTraining().target_halflife(0) is None


def test_steps_of_progressive_distillation_halve_and_stop():
    objective = ProgressiveDistillation(start_steps=16, end_steps=2, stage_images=100)
    assert [objective.schedule(images)["num_steps"] for images in (0, 99, 100, 200, 300, 10**6)] == [16, 16, 8, 4, 2, 2]


def test_stages_of_progressive_distillation_end_with_the_phase():
    objective = ProgressiveDistillation(start_steps=4, end_steps=1, stage_images=100)
    stages = {0: range(100), 99: range(100), 100: range(100, 200), 199: range(100, 200), 250: range(200, 450)}
    assert {images: objective.stage(images, 450) for images in stages} == stages
    assert objective.stage(120, 150) == range(100, 150)
    assert ECT().stage(10**6, 450) == range(450)


def test_feature_distance_without_a_feature_network_says_so():
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="feature network"):
        image_distance("lpips", images, images)


@pytest.mark.parametrize("distance", ["l2", "squared", "pseudo_huber", "l1"])
def test_weighted_distance_of_images_and_its_gradient(distance):
    """Against the formulas in fp64: an image that is there already is a denoised image, so the fused loss serves it too."""
    x, y = (Stream(0, name).image_normal(torch.arange(4), SHAPE) for name in "xy")
    y[1] = x[1]
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0])
    of_images = {
        "l2": lambda v: v.square().sum((1, 2, 3)).clamp(min=1e-300).sqrt(),
        "squared": lambda v: v.square().sum((1, 2, 3)),
        "pseudo_huber": lambda v: (v.square().sum((1, 2, 3)) + 0.03**2).sqrt() - 0.03,
        "l1": lambda v: v.abs().sum((1, 2, 3)),
    }
    exact = x.double().requires_grad_()
    expected = weight * of_images[distance](exact - y)
    x.requires_grad_(), y.requires_grad_()
    found = weighted_distance(distance, x, y, weight, c=0.03)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-12)
    grad_x, grad_y = torch.autograd.grad(found.sum(), (x, y), allow_unused=True)
    torch.testing.assert_close(grad_x.double(), torch.autograd.grad(expected.sum(), exact)[0], rtol=1e-5, atol=1e-7)
    assert grad_y is None


@pytest.mark.parametrize("mapping", ["sigmoid", "const"])
@pytest.mark.parametrize("decay", [0.9, 0.5, 1 / 256, 2.0**-30, 0.0])
def test_r_lies_below_t_however_late_the_stage(mapping, decay):
    t = torch.logspace(-6, 5, 500)
    r = t_to_r(t, torch.tensor(decay), mapping)
    assert ((r >= 0) & (r < t)).all()
    assert consistency_weight(t, r).isfinite().all()


def test_loss_is_finite_after_any_number_of_images():
    model, batch = tiny_model(), tiny_batch()
    terms = losses(ECT(), model, batch, images=10**12)
    terms.loss_N.mean().backward()
    assert terms.loss_N.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_weights_are_those_of_the_paper():
    t, r = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.25])
    torch.testing.assert_close(consistency_weight(t, r), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(consistency_weight(t, r, "edm", 0.5), torch.tensor([4.25, 8.0]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EDMObjective(variant="edm3"), "edm3"),
        (lambda: ECT(mapping="linear"), "mapping.*linear"),
        (lambda: ECT(distance="lpips"), "distance.*lpips"),
        (lambda: ECT(weight="none"), "weight.*none"),
        (lambda: ECT(q=1.0), "q: .*1.0"),
        (lambda: ECT(double_images=0), "double_images"),
        (lambda: ConsistencyTraining(end_scales=1), "start 2, end 1"),
        (lambda: ConsistencyTraining(scales="linear"), "scales.*linear"),
        (lambda: ConsistencyTraining(target_halflife_images=0.0), "target_halflife_images"),
        (lambda: ConsistencyDistillation(solver="rk4"), "solver.*rk4"),
        (lambda: ConsistencyDistillation(distance="ssim"), "distance.*ssim"),
        (lambda: ConsistencyDistillation(sigma_min=90.0), "sigma_min < sigma_max"),
        (lambda: ImprovedConsistencyTraining(indices="normal"), "indices.*normal"),
        (lambda: ProgressiveDistillation(start_steps=4, end_steps=8), "end_steps"),
        (lambda: ProgressiveDistillation(weight="none"), "weight.*none"),
    ],
)
def test_impossible_constants_say_why(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
