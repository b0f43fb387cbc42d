"""The baseline: EDM and ECT steps as a textbook would write them in PyTorch, with no thought of speed.

The network is DDPM++ from plain ``torch.nn`` calls with fastcm's parameter names, so that both start from equal weights;
the steps use torch's generator, torch.optim and a Python loop for the moving average. ``CompiledPlainStep`` is what someone
makes of it who cares for speed and writes no kernel: torch.compile, channels_last, bf16, multi-tensor averages.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """GroupNorm, SiLU, conv, plus embedding, twice; then attention where asked for."""

    def __init__(self, channels_in: int, channels: int, emb: int, attention: bool, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.norm0 = nn.GroupNorm(min(32, channels_in // 4), channels_in, eps=1e-6)
        self.conv0 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.affine = nn.Linear(emb, channels)
        self.norm1 = nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels or resample else nn.Identity()
        self.attention = attention
        if attention:
            self.norm2 = nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
            self.proj = nn.Conv2d(channels, channels, 1)

    def scale(self, x: Tensor) -> Tensor:
        """Double or halve the resolution."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2) if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """One block."""
        h = F.silu(self.norm0(x))
        h = self.conv0(self.scale(h))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        x = (self.conv1(h) + self.skip(self.scale(x))) * math.sqrt(0.5)
        if self.attention:
            q, k, v = self.qkv(self.norm2(x)).flatten(2).chunk(3, dim=1)
            weight = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(q.shape[1]), dim=-1)
            x = (self.proj(torch.einsum("nqk,nck->ncq", weight, v).reshape(x.shape)) + x) * math.sqrt(0.5)
        return x


class PlainUNet(nn.Module):
    """DDPM++ for unconditional images."""

    def __init__(
        self, resolution: int, channels: int, width: int, mults: tuple[int, ...], num_blocks: int, attention: int
    ) -> None:
        super().__init__()
        self.width, emb = width, 4 * width
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb), nn.Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{resolution}x{resolution}_conv"] = nn.Conv2d(channels, width, 3, padding=1)
        now, skips = width, [width]
        for level, mult in enumerate(mults):
            side = resolution >> level
            if level:
                self.enc[f"{side}x{side}_down"] = PlainBlock(now, now, emb, False, "down")
                skips.append(now)
            for i in range(num_blocks):
                self.enc[f"{side}x{side}_block{i}"] = PlainBlock(now, width * mult, emb, side == attention)
                now = width * mult
                skips.append(now)
        for level, mult in reversed(list(enumerate(mults))):
            side = resolution >> level
            if level == len(mults) - 1:
                self.dec[f"{side}x{side}_in0"] = PlainBlock(now, now, emb, True)
                self.dec[f"{side}x{side}_in1"] = PlainBlock(now, now, emb, False)
            else:
                self.dec[f"{side}x{side}_up"] = PlainBlock(now, now, emb, False, "up")
            for i in range(num_blocks + 1):
                attends = i == num_blocks and side == attention
                self.dec[f"{side}x{side}_block{i}"] = PlainBlock(now + skips.pop(), width * mult, emb, attends)
                now = width * mult
        self.dec[f"{resolution}x{resolution}_aux_norm"] = nn.GroupNorm(min(32, now // 4), now, eps=1e-6)
        self.dec[f"{resolution}x{resolution}_aux_conv"] = nn.Conv2d(now, channels, 3, padding=1)

    def embed(self, c_noise: Tensor) -> Tensor:
        """Sinusoids (sine first), then a two-layer MLP."""
        half = self.width // 2
        frequencies = (1 / 10000) ** (torch.arange(half, device=c_noise.device) / (half - 1))
        angles = c_noise[:, None] * frequencies
        emb = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.map_layer0.weight.dtype)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """The raw network output."""
        emb, skips = self.embed(c_noise), []
        for name, module in self.enc.items():
            x = module(x) if name.endswith("_conv") else module(x, emb)
            skips.append(x)
        for name, module in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = module(x) if "_aux_" in name else module(x, emb)
            x = F.silu(x) if name.endswith("_aux_norm") else x
        return x


class PlainStep:
    """One training step of EDM or ECT after another on random batches of a set of images in [-1, 1]."""

    def __init__(self, net: nn.Module, images: Tensor, batch_size: int, objective: str, seed: int = 0) -> None:
        self.net, self.images, self.batch_size, self.objective = net, images, batch_size, objective
        self.ema = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = torch.optim.Adam if objective == "edm" else torch.optim.RAdam
        self.optimizer = optimizer(net.parameters(), lr=1e-4)
        self.generator = torch.Generator(images.device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, device=self.images.device)

    def raw(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """The network."""
        return self.net(x, c_noise)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """EDM preconditioning around the network."""
        s = sigma[:, None, None, None]
        c_skip, c_out, c_in = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt(), 1 / (s**2 + 0.25).sqrt()
        return c_skip * x + c_out * self.raw(x * c_in, sigma.log() / 4)

    def loss(self, y: Tensor, noise: Tensor, normal: Tensor) -> Tensor:
        """The mean loss of a batch."""
        if self.objective == "edm":
            sigma = (normal * 1.2 - 1.2).exp()
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            error = self.denoise(y + sigma[:, None, None, None] * noise, sigma) - y
            return (weight * error.square().flatten(1).sum(1)).mean()
        t = (normal * 2.0 - 1.1).exp()
        r = t * (1 - (1 + 8 * torch.sigmoid(-t)) / 256)
        student = self.denoise(y + t[:, None, None, None] * noise, t)
        with torch.no_grad():
            teacher = self.denoise(y + r[:, None, None, None] * noise, r)
        return ((student - teacher).square().flatten(1).sum(1).sqrt() / (t - r)).mean()

    def average(self) -> None:
        """Let the moving averages follow."""
        for name, p in self.net.named_parameters():
            self.ema[name].lerp_(p, 1 - 0.9999)

    def __call__(self) -> Tensor:
        """Loss, gradient, optimizer, moving average; returns the loss, which nobody waits for."""
        index = torch.randint(len(self.images), (self.batch_size,), generator=self.generator, device=self.images.device)
        y = self.images[index]
        loss = self.loss(y, self.normal(*y.shape), self.normal(len(y)))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.average()
        return loss.detach()


class CompiledPlainStep(PlainStep):
    """The same step compiled, channels_last, with bf16 activations and weights cast inside the graph, averages by foreach."""

    def __init__(
        self, net: nn.Module, images: Tensor, batch_size: int, objective: str, seed: int = 0, compiler: str = "inductor"
    ) -> None:
        net = net.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        super().__init__(net, images, batch_size, objective, seed)
        self.loss = torch.compile(super().loss, fullgraph=True, dynamic=False, backend=compiler)

    def raw(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """The network in bf16 with its weights in fp32, as EDM's own code does it in fp16."""
        weights = {name: p.to(torch.bfloat16) for name, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, weights, (x.to(torch.bfloat16), c_noise)).float()

    def average(self) -> None:
        """All averages in a few launches."""
        torch._foreach_lerp_(list(self.ema.values()), list(self.net.parameters()), 1 - 0.9999)
