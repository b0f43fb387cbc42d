"""What a run says while it goes: the loss by noise level, one JSON line per interval, a progress bar."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastcm.train.run_folder import RunFolder

log = logging.getLogger("fastcm")

SIGMA_EDGES = (0.02, 0.063, 0.2, 0.63, 2.0, 6.3, 20.0)  # two buckets per decade
BUCKETS = tuple(f"{low:g}..{high:g}" for low, high in zip((0.0, *SIGMA_EDGES), (*SIGMA_EDGES, float("inf")), strict=True))


class LossMeter:
    """Sums since the last log line, kept on the device so that no step waits for the host.

    ``totals`` holds per noise bucket the sum of losses and the number of samples, then the sum of gradient norms, the
    number of finite steps and the number of steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.edges = torch.tensor(SIGMA_EDGES, device=device)
        self.buckets_B1 = torch.arange(len(BUCKETS), device=device)[:, None]
        self.totals = torch.zeros(2 * len(BUCKETS) + 3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss_N: Tensor, sigma_N: Tensor, grad_norm: Tensor, finite: Tensor) -> None:
        """Add one step; the sums of a non-finite step are left out, the step is counted."""
        member_BN = (torch.bucketize(sigma_N, self.edges) == self.buckets_B1).double()
        norm_and_step = torch.stack((grad_norm, finite)).double()
        sums = torch.cat((member_BN @ loss_N.double(), member_BN.sum(1), norm_and_step))
        keep = (finite > 0) & sums.isfinite().all()
        self.totals[:-1].add_(torch.where(keep, sums, 0.0))  # += would copy the sums onto themselves as well
        self.totals[-1].add_(1)

    def read(self) -> dict[str, Any]:
        """Means since the last call, then start again; this is the one place that waits for the device."""
        values = self.totals.tolist()
        self.totals.zero_()
        sums, counts = values[: len(BUCKETS)], values[len(BUCKETS) : 2 * len(BUCKETS)]
        norm, finite, steps = values[2 * len(BUCKETS) :]
        by_sigma = {name: s / c for name, s, c in zip(BUCKETS, sums, counts, strict=True) if c}
        return {
            "loss": sum(sums) / sum(counts) if sum(counts) else None,
            "grad_norm": norm / finite if finite else None,
            "skipped_steps": int(steps - finite),
            "loss_by_sigma": by_sigma,
        }


class Telemetry:
    """Progress of one phase: a bar on a terminal, log lines elsewhere, metrics.jsonl always."""

    def __init__(self, run: RunFolder, phase: str, images: int, duration_images: int) -> None:
        self.run, self.phase, self.duration_images = run, phase, duration_images
        self.bar = tqdm(
            total=duration_images, initial=images, desc=phase, unit="img", unit_scale=True, disable=not sys.stderr.isatty()
        )
        self.logged_images, self.busy_since = images, time.perf_counter()

    def advance(self, num_images: int) -> None:
        """Move the bar by one batch."""
        self.bar.update(num_images)

    def write(self, images_total: int, images: int, values: Mapping[str, Any]) -> None:
        """Write one line of metrics: images counts within the phase, images_total over the whole run."""
        seconds = max(time.perf_counter() - self.busy_since, 1e-9)
        rate = (images - self.logged_images) / seconds
        entry = {"phase": self.phase, "images": images_total, "phase_images": images, **values, "images_per_s": round(rate, 1)}
        self.run.append_metrics(entry)
        left = max(self.duration_images - images, 0) / rate if rate > 0 else float("inf")
        loss = _loss_in_words(values)
        self.bar.set_postfix_str(loss)
        if self.bar.disable:
            log.info("%s %d/%d images, %s, %.0f img/s, %.0f s left", self.phase, images, self.duration_images, loss, rate, left)
        self.logged_images, self.busy_since = images, time.perf_counter()

    def resume_clock(self) -> None:
        """Leave the time spent on pictures and checkpoints out of images/s."""
        self.busy_since = time.perf_counter()

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


def _loss_in_words(values: Mapping[str, Any]) -> str:
    """The mean loss, or why there is none."""
    if values["loss"] is not None:
        return f"loss {values['loss']:.4g}"
    if not values["skipped_steps"]:
        return "no step of the generator"
    scale = f", loss scale now {values['loss_scale']:g}" if "loss_scale" in values else ""
    return f"all {values['skipped_steps']} steps left out, not finite{scale}"
