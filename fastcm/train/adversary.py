"""The discriminator of an adversarial phase: whose turn it is, what it says to the generator, and its own training.

arXiv 2310.02279, section 3.3, with a projected discriminator (arXiv 2111.01007, 2202.00273).
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastcm import graphs
from fastcm.config import FeaturesConfig, GANConfig
from fastcm.diffusion.adversarial import discriminator_hinge, generator_hinge
from fastcm.errors import ConfigError
from fastcm.nn.diff_augment import DiffAugment
from fastcm.nn.discriminator import ProjectedDiscriminator
from fastcm.train.networks import projected_features
from fastcm.train.optimizer import Optimizer
from fastcm.train.schedules import learning_rate

METERS = ("discriminator_loss", "generator_loss")


class Adversary:
    """A projected discriminator with its optimizer; feature networks and projections follow from files and the seed.

    From ``config.start_images`` of the phase on, one step in every ``config.period`` is the generator's, the first of them,
    and the others are the discriminator's. Images are counted globally, from ``first_image`` of the phase.
    compiled: whether torch.compile wraps the two losses, that of the generator and that of the discriminator.
    Raises ConfigError or CheckpointError for feature networks without weights, ConfigError for classes that are not there.
    """

    def __init__(
        self,
        config: GANConfig,
        features: FeaturesConfig,
        label_dim: int,
        seed: int,
        first_image: int,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        if config.conditional and not label_dim:
            raise ConfigError("gan.conditional is true, but the network has no classes: set data.conditional, or leave it out")
        self.config, self.seed = config, seed
        self.start = first_image + config.start_images
        projected = projected_features(features.discriminator, features, seed, config.scale_kernel)
        self.label_dim = label_dim if config.conditional else 0
        augment = DiffAugment() if config.augment else None
        options = {"label_dim": self.label_dim, "width": config.width, "norm": config.norm, "augment": augment}
        self.discriminator = ProjectedDiscriminator(projected, **options).init_weights(seed).to(device)
        opt = config.optimizer
        self.optimizer = Optimizer(dict(self.discriminator.heads.named_parameters()), opt.kind, opt.betas, opt.eps)
        losses = self._plain_generator_loss, self._plain_discriminator_loss
        self._generator_loss, self._discriminator_loss = (graphs.compiled(loss, compiled) for loss in losses)
        self.totals = torch.zeros(2 * len(METERS), dtype=torch.float64, device=device)

    def active(self, image: int) -> bool:
        """Whether the batch that begins with this global image is part of the adversarial stage."""
        return image >= self.start

    def trains_discriminator(self, image: int, batch_size: int) -> bool:
        """Whether the batch that begins with this global image trains the discriminator."""
        return self.active(image) and (image - self.start) // batch_size % self.config.period != 0

    def generator_loss(
        self, fake_NCHW: Float[Tensor, "N C H W"], labels: Tensor | None, index_N: Int64[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """What the generator loses for each of its images; the discriminator gets no gradient."""
        self.discriminator.heads.requires_grad_(False)
        loss_N = self._generator_loss(fake_NCHW, labels, index_N)
        self._count("generator_loss", loss_N)
        return loss_N

    def accumulate(
        self,
        real_NCHW: Float[Tensor, "N C H W"],
        fake_NCHW: Float[Tensor, "N C H W"],
        labels: Tensor | None,
        index_N: Int64[Tensor, " N"],
        share: float = 1.0,
    ) -> None:
        """Add the discriminator's gradient on these images, times their share of the batch."""
        self.discriminator.heads.requires_grad_(True)
        loss_N = self._discriminator_loss(real_NCHW, fake_NCHW.detach(), labels, index_N)
        (share * loss_N.mean()).backward()
        self._count("discriminator_loss", loss_N)

    def learning_rate(self, images: int, duration_images: int) -> float:
        """That of the discriminator after ``images`` of the phase's images; its schedule begins when it does."""
        before = self.config.start_images
        return learning_rate(self.config.optimizer, images - before, duration_images - before)

    def step(self, lr: Tensor) -> None:
        """One step of the discriminator's optimizer with the gradients accumulated; one that is not finite changes nothing."""
        finite, _ = self.optimizer.step(lr)
        self.discriminator.constrain_weights(finite)

    def _plain_generator_loss(self, fake_NCHW: Tensor, labels: Tensor | None, index_N: Tensor) -> Tensor:
        return generator_hinge(self._logits(fake_NCHW, labels, index_N, fake=True))

    def _plain_discriminator_loss(self, real_NCHW: Tensor, fake_NCHW: Tensor, labels: Tensor | None, index_N: Tensor) -> Tensor:
        real_NK = self._logits(real_NCHW, labels, index_N, fake=False)
        return discriminator_hinge(real_NK, self._logits(fake_NCHW, labels, index_N, fake=True))

    def _logits(self, images_NCHW: Tensor, labels: Tensor | None, index_N: Tensor, fake: bool) -> Tensor:
        different = fake and self.config.different_augment
        draws = self.discriminator.draw(index_N, self.seed, fake=different) if self.config.augment else None
        return self.discriminator(images_NCHW, labels if self.label_dim else None, draws)

    @torch.no_grad()
    def _count(self, name: str, loss_N: Tensor) -> None:
        place, finite_N = 2 * METERS.index(name), loss_N.isfinite()
        self.totals[place] += loss_N.detach().double().where(finite_N, 0.0).sum()
        self.totals[place + 1] += finite_N.sum()

    def read(self) -> dict[str, float]:
        """Mean losses of the images since the last call, those without a finite one left out; waits for the device."""
        values = self.totals.tolist()
        self.totals.zero_()
        return {name: values[2 * i] / values[2 * i + 1] for i, name in enumerate(METERS) if values[2 * i + 1]}

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed phase needs."""
        state = {f"heads/{name}": value for name, value in self.discriminator.heads.state_dict().items()}
        return state | {f"optimizer/{k}": v for k, v in self.optimizer.state_dict().items()} | {"meter": self.totals}
