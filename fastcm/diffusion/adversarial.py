"""Losses of the adversarial stage and the weight that balances two losses."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPS = 1e-4


def generator_hinge(fake_NK: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """-mean_k D_k(x_fake) of each image over its K logits; arXiv 1802.05957, Eq. 17."""
    return -fake_NK.mean(1)


def discriminator_hinge(real_NK: Float[Tensor, "N K"], fake_NK: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """mean_k max(0, 1 - D_k(x_real)) + mean_k max(0, 1 + D_k(x_fake)) of each pair; arXiv 1802.05957, Eq. 16."""
    return F.relu(1 - real_NK).mean(1) + F.relu(1 + fake_NK).mean(1)


def adaptive_weight(
    reference: Float[Tensor, "..."], other: Float[Tensor, "..."], low: float = 0.0, high: float = 1e4
) -> Float[Tensor, "..."]:
    """lambda = clamp(||grad L_reference|| / (||grad L_other|| + 1e-4), low, high), the norms with respect to the last layer.

    CTM takes the consistency loss as reference, [0, 1e4] for denoising and [0.01, 10] for the adversarial loss.
    arXiv 2310.02279, section 3 (after arXiv 2012.09841, Eq. 7). No gradient flows through the weight.
    """
    return (reference / (other + EPS)).clamp(low, high).detach()
