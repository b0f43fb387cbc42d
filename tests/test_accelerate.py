"""Models made for many samples: the same images, by compiled and replayed evaluations."""

import pytest
import torch
from recorded_calls import OperatorRecorder
from torch._dynamo.testing import CompileCounterWithBackend

from fastcm.diffusion.preconditioners import EDM, VE, VP, EDMBoundary
from fastcm.errors import ConfigError
from fastcm.graphs import CudaRecorder
from fastcm.model import Model, SamplingDefaults
from fastcm.nn import UNet
from fastcm.sampling import AcceleratedModel, accelerate, sample

SMALL = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "label_dim": 3}


def model_of(precond=None, second_time=False, sampler="consistency", device="cpu"):
    net = UNet("ddpmpp", 8, 3, **SMALL, second_time=second_time).init_weights(0)
    model = Model(net, precond or EDM(), (3, 8, 8), 3, sampling=SamplingDefaults(sampler))
    return model.to(device).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (model_of(), {"steps": 3}),
        (model_of(EDMBoundary(0.5, 0.003)), {"steps": 1}),
        (model_of(VP()), {"steps": 3, "sampler": "heun"}),
        (model_of(VE()), {"steps": 3, "sampler": "euler"}),
        (model_of(second_time=True, sampler="trajectory"), {"steps": 3, "gamma": 0.5}),
    ],
    ids=["consistency", "one step", "vp", "ve", "trajectory"],
)
def test_replayed_evaluations_give_the_images_of_the_model(model, options):
    recorder = OperatorRecorder()
    fast = AcceleratedModel(model, compiled=False, recorder=recorder)
    for seed in range(6):
        images = sample(fast, 4, seed=seed, batch_size=4, **options)
        assert torch.equal(images, sample(model, 4, seed=seed, batch_size=4, **options))
    assert recorder.num_replayed > 0


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_evaluations_give_the_images_of_the_model_on_a_gpu(compiled):
    model = model_of(device="cuda")
    fast = accelerate(model, compile=compiled)
    for seed in range(6):
        images, expected = (sample(each, 4, steps=2, seed=seed, batch_size=2) for each in (fast, model))
        torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


def test_compiled_evaluations_have_no_graph_break_and_give_the_images_of_the_model(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="aot_eager", **options))
    model = model_of()
    fast = accelerate(model, compile=True)
    torch.testing.assert_close(sample(fast, 2, steps=2), sample(model, 2, steps=2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [None, 1])
def test_nothing_is_compiled_while_a_graph_is_recorded(monkeypatch, labels):
    counter, compile_, counts = CompileCounterWithBackend("aot_eager"), torch.compile, []

    class Watched:
        """Records nothing, but sees when something would be."""

        def run(self, call):
            return call()

        def record(self, call):
            counts.append(counter.frame_count)
            result = call()
            counts.append(counter.frame_count)
            return result, lambda: None

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counter, **options))
    fast = AcceleratedModel(model_of(), compiled=True, recorder=Watched())
    for seed in range(5):
        sample(fast, 4, steps=1, seed=seed, labels=labels)
    before, after = counts
    assert before == after > 0


def test_any_number_of_batch_sizes_is_served(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    fast, model = accelerate(model_of(), compile=True), model_of()
    for num in range(1, 11):
        torch.testing.assert_close(sample(fast, num, steps=1), sample(model, num, steps=1))


def test_weights_are_shared_and_the_rest_is_the_models_own():
    model = model_of(EDMBoundary(0.5, 0.003))
    fast = accelerate(model, compile=True)
    assert fast.net is model.net
    assert not fast.training
    assert (fast.precond, fast.sampling, fast.image_shape, fast.label_dim) == (
        model.precond, model.sampling, model.image_shape, model.label_dim,
    )  # fmt: skip


def test_evaluations_under_autograd_keep_their_gradient():
    fast = AcceleratedModel(model_of(), compiled=False, recorder=OperatorRecorder())
    x = torch.ones(2, 3, 8, 8, requires_grad=True)
    for _ in range(6):
        fast(x, 1.0).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


def test_graphs_on_a_cpu_are_an_error():
    with pytest.raises(ConfigError, match=r"cuda_graph: the model is on cpu"):
        accelerate(model_of(), cuda_graph=True)
    with pytest.raises(ConfigError, match=r"accelerate: nothing to do for a model on cpu"):
        accelerate(model_of())


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_replayed_unless_told_not_to():
    model = model_of(device="cuda")
    assert isinstance(accelerate(model, compile=False)._evaluate.recorder, CudaRecorder)
    assert not hasattr(accelerate(model, compile=False, cuda_graph=False)._evaluate, "recorder")
