"""Learning rate and EMA decay as pure functions of the images seen in a phase, or in a stage of one."""

import math

import numpy as np

from fastcm.config import EMAConfig, OptimizerConfig


def learning_rate(config: OptimizerConfig, images: int, duration_images: int) -> float:
    """Learning rate for the step that begins after ``images`` images n: warm-up, decay, cool-down.

    lr min(1, n / warmup) / sqrt(max(n / decay, 1)) min(1, (duration - n) / cooldown), without the factors that are not
    asked for: linear warm-up (EDM, arXiv 2206.00364, appendix F.1), inverse-square-root decay (EDM2, arXiv 2312.02696,
    appendix B, where decay is t_ref times the batch size), linear cool-down.
    """
    warmup = min(1.0, images / config.warmup_images) if config.warmup_images else 1.0
    decay = math.sqrt(max(images / config.decay_images, 1.0)) if config.decay_images else 1.0
    cooldown = min(1.0, (duration_images - images) / config.cooldown_images) if config.cooldown_images else 1.0
    return config.lr * warmup / decay * max(cooldown, 0.0)


def ema_beta(config: EMAConfig, images: int, batch_size: int) -> float:
    """Decay of the step that raises the images seen from ``images`` to ``images + batch_size``.

    Half-life H: beta = 2^(-batch / min(H, rampup images)) (arXiv 2206.00364, appendix F.2).
    Power function: beta = (1 - batch / (images + batch))^(gamma + 1) (arXiv 2312.02696, Eq. 127).
    """
    if config.kind == "power":
        return (1.0 - batch_size / (images + batch_size)) ** (power_gamma(config.std) + 1.0)
    halflife = min(config.halflife_images, config.rampup_ratio * images) if config.rampup_ratio else config.halflife_images
    return 0.5 ** (batch_size / halflife) if halflife > 0 else 0.0


def power_gamma(std: float) -> float:
    """Exponent gamma of the power-function EMA whose averaging kernel has relative width ``std`` (0 < std < 0.28).

    The real root gamma > 0 of gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + (12 - std^-2) = 0 (arXiv 2312.02696, Eq. 126).
    """
    inverse = std**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_std(gamma: float) -> float:
    """Relative width of the averaging kernel of exponent gamma >= 0; the inverse of ``power_gamma``.

    (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2) (arXiv 2312.02696, section 3.1).
    """
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)
