"""A model for sampling many images: its evaluations compiled, and each replayed as one CUDA graph."""

from typing import Any

import torch
from torch import Tensor

from fastcm import graphs
from fastcm.errors import ConfigError
from fastcm.model import Model


class AcceleratedModel(Model):
    """``model`` with the same weights, whose evaluations without gradient are compiled and replayed.

    What it computes is what ``model`` does, to rounding. An evaluation under autograd is the model's own.
    """

    def __init__(self, model: Model, compiled: bool, recorder: graphs.Recorder | None) -> None:
        options = (model.label_dim, model.dtype, model.sampling, model.trajectory)
        super().__init__(model.net, model.precond, model.image_shape, *options)
        self.train(model.training)
        self._evaluate = graphs.graphed(graphs.compiled(super()._g, compiled), recorder)

    def _g(self, *arguments: Any) -> Tensor:
        return super()._g(*arguments) if torch.is_grad_enabled() else self._evaluate(*arguments)


def accelerate(model: Model, *, compile: bool | None = None, cuda_graph: bool | None = None) -> AcceleratedModel:
    """The model for many samples: the first evaluations of each batch size take longer, all others less.

    compile: wrap the network in torch.compile. cuda_graph: replay each evaluation as one CUDA graph, which is what makes
    small batches fast. None means where the model is on a CUDA device. Weights are shared, and must stay in the memory where
    they are. One thread and one stream at a time may use it; its own memory is free again after ``gc.collect()``.
    ConfigError for graphs on another device, and where nothing is left to do.
    """
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    if cuda_graph and not on_cuda:
        raise ConfigError(f"cuda_graph: the model is on {device}, and CUDA graphs run on CUDA devices only; leave it out")
    compiled, replayed = on_cuda if compile is None else compile, on_cuda and cuda_graph is not False
    if not compiled and not replayed:
        raise ConfigError(f"accelerate: nothing to do for a model on {device}; use a GPU, or leave accelerate out")
    return AcceleratedModel(model, compiled, graphs.CudaRecorder(device) if replayed else None)
