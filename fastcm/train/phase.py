"""One phase at work: network, objective, optimizer and weight averages, advanced one batch at a time."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.config import Config
from fastcm.data.augment import AugmentPipe
from fastcm.data.batch import Batch
from fastcm.data.dataset import ResidentDataset
from fastcm.data.loader import Loader
from fastcm.graphs import CudaRecorder, Recorder, graphed
from fastcm.io.bundle import BundleHeader, model_from_header, save_bundle
from fastcm.io.tensors import copy_into
from fastcm.model import Model
from fastcm.nn.build import build_network
from fastcm.objectives import CTM, Networks
from fastcm.train.adversary import Adversary
from fastcm.train.build import build_objective, sampling_form
from fastcm.train.ctm_step import CTMStep, PreparedBatch
from fastcm.train.loss_scale import LossScale
from fastcm.train.networks import (
    DTYPES,
    bundle_weights,
    copy_weights,
    perceptual_distance,
    target_model,
    teacher_model,
    teacher_source,
)
from fastcm.train.optimizer import Optimizer, WeightAverage
from fastcm.train.schedules import ema_beta, learning_rate
from fastcm.train.step import GradientStep
from fastcm.train.telemetry import LossMeter


class Phase:
    """State and step of one phase.

    ``networks`` are the student (``model``), and the target and teacher where the objective needs them. ``images`` counts the
    images seen in this phase; ``first_image`` is the global sample index of its first one, so that no two phases draw the same
    noise. Weights are uninitialised until ``start`` or ``load_tensors``.
    """

    def __init__(self, config: Config, name: str, data: ResidentDataset, device: torch.device, first_image: int) -> None:
        self.config, self.name, self.first_image, self.images = config, name, first_image, 0
        self.settings = config.phases[name]
        self.device = device
        self.header = phase_header(config, name, data)
        self.objective = build_objective(self.settings.objective)
        self.model = self._build_model(data)
        parameters = dict(self.model.net.named_parameters())
        self.averages = {ema: WeightAverage(parameters) for ema in self.settings.emas}
        self.target_average = None if self.objective.target_halflife(0) is None else WeightAverage(parameters)
        distance = self.objective.perceptual
        perceptual = None if distance is None else perceptual_distance(distance, config.features, config.seed, device)
        self.networks = Networks(self.model, self._build_target(), self._build_teacher(data), perceptual)
        opt = self.settings.optimizer
        self.optimizer = Optimizer(parameters, opt.kind, opt.betas, opt.eps, averages=self._all_averages())
        augment = AugmentPipe.edm_cifar10(self.settings.augment) if self.settings.augment else None
        self.loader = Loader(data, self.settings.batch_size, config.seed, device, xflip=config.data.xflip, augment=augment)
        self.adversary = self._build_adversary()
        self.loss_scale = LossScale(device) if self.dtype == torch.float16 else None
        recorder = graph_recorder(config, device)
        self.gradient = self._build_gradient(compile_step(config, device), recorder)
        self.meter = LossMeter(device)
        # Each is one CUDA graph from its inputs to the last write of its state.
        self._student_step = graphed(self._plain_student_step, recorder)
        self._discriminator_step = graphed(self._plain_discriminator_step, recorder)

    def _build_model(self, data: ResidentDataset) -> Model:
        header, settings = self.header, self.settings
        dropout = {"dropout": settings.dropout, "dropout_max_resolution": settings.dropout_max_resolution}
        net = build_network(self.config.network, data.image_shape, header.label_dim, header.augment_dim, **dropout)
        options = {"label_dim": header.label_dim, "dtype": self.dtype, "trajectory": self.objective.trajectory}
        model = Model(net, self.objective.precond, data.image_shape, **options)
        return model.to(self.device).train()

    def _build_target(self) -> Model | None:
        return None if self.target_average is None else target_model(self.model, self.target_average)

    def _build_teacher(self, data: ResidentDataset) -> Model | None:
        if not self.objective.needs_teacher:
            return None
        names = list(self.config.phases)
        number = names.index(self.name)
        before = phase_header(self.config, names[number - 1], data) if number else None
        return teacher_model(self.settings, before, self.dtype, self.device)

    def _build_adversary(self) -> Adversary | None:
        gan = getattr(self.settings.objective, "gan", None)
        if gan is None:
            return None
        common = (self.config.features, self.header.label_dim, self.config.seed, self.first_image, self.device)
        return Adversary(gan, *common, compile_step(self.config, self.device))

    def _build_gradient(self, compiled: bool, recorder: Recorder | None) -> GradientStep | CTMStep:
        options = (self.networks, self.objective, self.config.seed, self.settings.microbatch_size, compiled)
        scale = None if self.loss_scale is None else self.loss_scale.scale
        if isinstance(self.objective, CTM):
            return CTMStep(*options, self.adversary, recorder, scale)
        return GradientStep(*options, scale)

    @property
    def dtype(self) -> torch.dtype:
        """What the torsos of the networks compute in."""
        return DTYPES[self.config.compute.dtype]

    def _all_averages(self) -> list[WeightAverage]:
        """The averages that follow the weights in the pass of the optimizer, the target network's last."""
        return [*self.averages.values(), *([] if self.target_average is None else [self.target_average])]

    @property
    def finished(self) -> bool:
        """Whether the phase has seen its images."""
        return self.images >= self.settings.duration_images

    @property
    def stage(self) -> range:
        """The images of the phase that the optimizer and its schedules count: all, or those with the present teacher."""
        return self.objective.stage(self.images, self.settings.duration_images)

    def start(self, previous: Mapping[str, Tensor] | None) -> None:
        """Fill the weights in as the phase's ``init`` says; ``previous`` are the averaged weights of the phase before."""
        self.model.net.init_weights(self.config.seed)
        if self.settings.init not in ("fresh", "previous"):
            copy_weights(self.model.net, bundle_weights(Path(self.settings.init)), Path(self.settings.init))
        elif self.settings.init == "previous" and previous is not None:
            copy_weights(self.model.net, previous, Path("previous phase"))
        if self.networks.teacher is not None and teacher_source(self.settings) == "previous":
            copy_weights(self.networks.teacher.net, previous, Path("previous phase"))
        self.model.net.constrain_weights(self._scalar(1.0))
        self._reset_averages()

    def _reset_averages(self) -> None:
        for average in self._all_averages():
            copy_into(average.averages, dict(self.model.net.named_parameters()), "", Path(self.name))

    def _promote_student(self) -> None:
        """Make the student the teacher, and begin anew from there: moments zero, averages at the weights."""
        teacher = self.networks.teacher.net.state_dict()  # it may have more, such as an embedding of augmentation labels
        with torch.no_grad():
            for name, value in self.model.net.state_dict().items():
                teacher[name].copy_(value)
        self.optimizer.reset()
        self._reset_averages()

    def step(self) -> None:
        """Gradient of one batch, optimizer step, weight averages, meter; nothing waits for the device."""
        size = self.settings.batch_size
        if self.stage.start > max(self.images - size, 0):
            self._promote_student()
        first_image = self.first_image + self.images
        batch = self.loader.batch(first_image)
        if self.adversary is not None and self.adversary.trains_discriminator(first_image, size):
            lr = self._scalar(self.adversary.learning_rate(self.images, self.settings.duration_images))
            self._discriminator_step(*self.gradient.prepare_discriminator(batch, first_image), lr)
        else:
            schedule = {key: self._scalar(value) for key, value in self.objective.schedule(self.images).items()}
            prepared = self.gradient.prepare(batch, first_image)
            self._student_step(prepared, schedule, self._scalar(self.learning_rate), self._ema_betas())
        self.images += size

    def _plain_student_step(
        self, prepared: Batch | PreparedBatch, schedule: dict[str, Tensor], lr: Tensor, ema_betas: Tensor
    ) -> None:
        loss_N, sigma_N = self.gradient(prepared, schedule)
        finite, norm = self.optimizer.step(lr, ema_betas, self.gradient.loss_scale)
        self.model.net.constrain_weights(finite)
        if self.loss_scale is not None:
            self.loss_scale.update(finite)
        self.meter.add(loss_N, sigma_N, norm, finite)

    def _plain_discriminator_step(self, batch: Batch, num_steps: Tensor, lr: Tensor) -> None:
        self.gradient.train_discriminator(batch, num_steps)
        self.adversary.step(lr)

    def _ema_betas(self) -> Tensor:
        """The decay of each average in the next step."""
        size = self.settings.batch_size
        betas = [ema_beta(ema, self.images - self.stage.start, size) for ema in self.settings.emas.values()]
        halflife = self.objective.target_halflife(self.images)
        return torch.stack([self._scalar(beta) for beta in betas + ([] if halflife is None else [0.5 ** (size / halflife)])])

    def _scalar(self, value: float) -> Tensor:
        # Unlike torch.tensor, which copies from the host, this does not wait for the device.
        return torch.full((), value, dtype=torch.float32, device=self.device)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.settings.optimizer, self.images - self.stage.start, len(self.stage))

    def averaged_weights(self) -> dict[str, Tensor]:
        """Parameters of the first weight average, and the buffers: what sampling uses and the next phase starts from."""
        return {**self.model.net.state_dict(), **next(iter(self.averages.values())).averages}

    def sampling_model(self) -> Model:
        """A model in evaluation form with the averaged weights."""
        model = model_from_header(self._header_now(), dtype=self.dtype, origin=Path(self.name)).to(self.device)
        copy_into(model.net.state_dict(), self.averaged_weights(), "", Path(self.name))
        return model.eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed phase needs, by name."""
        state = {f"net/{name}": value for name, value in self.model.net.state_dict().items()}
        for ema, average in self.averages.items():
            state |= {f"ema/{ema}/{name}": value for name, value in average.averages.items()}
        if self.target_average is not None:
            state |= {f"target/{name}": value for name, value in self.target_average.averages.items()}
        if self.networks.teacher is not None:
            state |= {f"teacher/{name}": value for name, value in self.networks.teacher.net.state_dict().items()}
        if self.loss_scale is not None:
            state |= {f"loss_scale/{name}": value for name, value in self.loss_scale.tensors().items()}
        if self.adversary is not None:
            state |= {f"adversary/{name}": value for name, value in self.adversary.tensors().items()}
        return (
            state
            | {f"optimizer/{name}": value for name, value in self.optimizer.state_dict().items()}
            | {"meter": self.meter.totals}
        )

    def load_tensors(self, tensors: Mapping[str, Tensor], images: int, origin: Path) -> None:
        """Continue from what ``tensors`` returned after ``images`` images; raises CheckpointError on any mismatch."""
        copy_into(self.tensors(), tensors, "", origin)
        self.images = images

    def save_bundle(self, path: Path) -> None:
        """Write the bundle of the current state."""
        emas = {name: average.averages for name, average in self.averages.items()}
        save_bundle(path, self._header_now(), self.model.net.state_dict(), emas)

    def _header_now(self) -> BundleHeader:
        # The weights are those of the last step, also where the next one would begin another stage.
        return self.header.after(self.images, self.objective.sampling_steps(max(self.images - 1, 0)))


def phase_header(config: Config, name: str, data: ResidentDataset) -> BundleHeader:
    """The header of the bundles that a phase writes."""
    precond, sampling = sampling_form(config.phases[name].objective)
    uses_augment = any(phase.augment for phase in config.phases.values())
    return BundleHeader(
        network=config.network.model_dump(mode="json"),
        image_shape=data.image_shape,
        label_dim=data.label_dim if config.data.conditional else 0,
        augment_dim=AugmentPipe.edm_cifar10(1.0).label_dim if uses_augment else 0,
        preconditioner=precond,
        sampling=sampling,
        emas=tuple(config.phases[name].emas),
        trajectory=_trajectory(config, name),
        trained={
            "phase": name,
            "images": 0,
            "config_hash": config.hash,
            "data": config.data.kind,
            "fingerprint": data.fingerprint,
        },
    )


def _trajectory(config: Config, name: str) -> dict[str, Any] | None:
    """The parametrisation of jumps, of networks that make any."""
    jumps = getattr(config.network, "second_time", False)
    return asdict(build_objective(config.phases[name].objective).trajectory) if jumps else None


def compile_step(config: Config, device: torch.device) -> bool:
    """Whether torch.compile wraps the step: as asked, or by default on CUDA only (a CPU has no compiler for certain)."""
    return config.compute.compile == "on" or (config.compute.compile == "auto" and device.type == "cuda")


def graph_recorder(config: Config, device: torch.device) -> Recorder | None:
    """What records the step as a CUDA graph: on CUDA unless ``compute.cuda_graph`` is off; None for a step as it is."""
    return CudaRecorder(device) if device.type == "cuda" and config.compute.cuda_graph != "off" else None
