"""The peers of the benchmark: the same images, two steps of D and one of G, hinge loss, Adam."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

from carproto.config import TrainConfig
from carproto.core import pick_precision
from carproto.gan.trainer import Trainer
from carproto.images import to_tensor

Z_DIM = 128
D_STEPS = 2
ADAM = {"lr": 2e-4, "betas": (0.0, 0.9)}
MIMICRY_FOLDER = Path(__file__).resolve().parents[1] / ".bench"


class Absent(Exception):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True)
class Work:
    """What every peer is given."""

    size: int  # side of the pictures, pixels
    width: int  # channels at full size
    batch: int  # photos and drawings in a step of either network
    device: str

    def photos(self) -> torch.Tensor:
        """Return uint8 noise in place of photos: time does not depend on what they show."""
        return torch.randint(256, (8 * self.batch, 3, self.size, self.size), dtype=torch.uint8)


@dataclass
class Peer:
    """Networks ready to be trained."""

    step: Callable[[], object]  # two steps of D and one of G
    flop: float  # floating point operations that one call needs
    precision: str  # "bf16" or "fp32"
    parameters: tuple[int, int] | None  # of G and D; None without networks


def count_parameters(*nets: nn.Module) -> tuple[int, ...]:
    """Return the number of parameters of each network."""
    return tuple(sum(p.numel() for p in net.parameters()) for net in nets)


def count_flop(make_nets: Callable[[], tuple[nn.Module, nn.Module]], batch: int) -> float:
    """Count the FLOPs of two steps of D and one of G: a backward pass to weights and input costs two forward ones."""
    with torch.device("meta"), torch.no_grad():
        G, D = make_nets()
        with FlopCounterMode(display=False) as counter:
            images = G(torch.randn(1, Z_DIM))
            g = counter.get_total_flops()
            D(images)
        d = counter.get_total_flops() - g
    return float(batch * (D_STEPS * (g + 2 * 3 * d) + 3 * g + 2 * d))


# --- torch-mimicry 0.1.16, as its own training loop calls it


def import_mimicry() -> tuple[ModuleType, type]:
    """Import its SN-GAN and its log, with stand-ins for names that left torch and for what training does not need."""
    if not (MIMICRY_FOLDER / "torch_mimicry").is_dir():
        raise Absent("torch-mimicry is not installed here: `make bench` installs it where there is a network")
    sys.path.insert(0, str(MIMICRY_FOLDER))
    stand_ins = {
        "torch._six": {"PY3": True},
        "torch.utils.tensorboard": {"SummaryWriter": None},
        "skimage": {"io": None},
        "torch_mimicry.metrics": {},
    }
    for name, content in stand_ins.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    from torch_mimicry.nets import sngan
    from torch_mimicry.training.metric_log import MetricLog

    return sngan, MetricLog


def make_mimicry(work: Work) -> Peer:
    """Build torch-mimicry's SN-GAN; at width 64 it is the published one."""
    sngan, MetricLog = import_mimicry()
    if not hasattr(sngan, f"SNGANGenerator{work.size}"):
        raise Absent(f"torch-mimicry has no SN-GAN for {work.size} px")
    n_generator, n_discriminator = (4, 2) if work.size == 32 else (16, 16)

    def make_nets() -> tuple[nn.Module, nn.Module]:
        G = getattr(sngan, f"SNGANGenerator{work.size}")(nz=Z_DIM, ngf=n_generator * work.width)
        return G, getattr(sngan, f"SNGANDiscriminator{work.size}")(ndf=n_discriminator * work.width)

    G, D = (net.to(work.device) for net in make_nets())
    optimizer_g, optimizer_d = (torch.optim.Adam(net.parameters(), **ADAM) for net in (G, D))
    photos = work.photos().to(work.device)

    def step() -> None:
        log = MetricLog()
        for _ in range(D_STEPS):
            real = (pick_batch(photos, work.batch), None)
            D.train_step(real_batch=real, netG=G, optD=optimizer_d, log_data=log, device=work.device)
        G.train_step(real_batch=real, netD=D, optG=optimizer_g, log_data=log, device=work.device)

    return Peer(step, count_flop(make_nets, work.batch), "fp32", count_parameters(G, D))


def pick_batch(photos: torch.Tensor, batch: int) -> torch.Tensor:
    """Return random photos as the networks read them."""
    return to_tensor(photos[torch.randint(len(photos), (batch,), device=photos.device)])


# --- the plain form of our own networks: layer by layer as the paper has them; names of weights as ours


class PlainUp(nn.Module):
    """A block of G."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(n_in, eps=1e-4), nn.BatchNorm2d(n_out, eps=1e-4)
        self.conv1, self.conv2 = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x)), scale_factor=2))
        return self.conv2(F.relu(self.norm2(h))) + self.shortcut(F.interpolate(x, scale_factor=2))


class PlainDown(nn.Module):
    """A block of D."""

    def __init__(self, n_in: int, n_out: int, *, is_first: bool, pool: bool):
        super().__init__()
        self.is_first, self.pool = is_first, pool
        self.conv1, self.conv2 = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if pool else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.is_first else F.relu(x))))
        if not self.pool:
            return h + x
        return F.avg_pool2d(h, 2) + (
            self.shortcut(F.avg_pool2d(x, 2)) if self.is_first else F.avg_pool2d(self.shortcut(x), 2)
        )


class PlainGenerator(nn.Module):
    """Codes (N, Z_DIM) -> images (N, 3, size, size)."""

    def __init__(self, size: int, width: int):
        super().__init__()
        channels = [min(16 * width, width * size // side) for side in powers(4, size)]
        self.linear = nn.Linear(Z_DIM, channels[0] * 16)
        self.blocks = nn.Sequential(*map(PlainUp, channels, channels[1:]))
        self.norm, self.conv = nn.BatchNorm2d(width, eps=1e-4), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.blocks(self.linear(z).view(len(z), -1, 4, 4))
        return torch.tanh(self.conv(F.relu(self.norm(h))))


class PlainDiscriminator(nn.Module):
    """Images (N, 3, size, size) -> logits (N,); `normalise` makes it the paper's."""

    def __init__(self, size: int, width: int):
        super().__init__()
        channels = [3] + [min(16 * width, width * size // 2 // side) for side in reversed(powers(4, size // 2))]
        blocks = [PlainDown(n_in, n_out, is_first=n_in == 3, pool=True) for n_in, n_out in zip(channels, channels[1:])]
        self.blocks = nn.Sequential(*blocks, PlainDown(channels[-1], channels[-1], is_first=False, pool=False))
        self.linear = nn.Linear(channels[-1], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.relu(self.blocks(x)).sum((2, 3))).squeeze(1)


def powers(first: int, last: int) -> list[int]:
    """Return first, 2 first, 4 first, ... last."""
    return [first] if first >= last else [first, *powers(2 * first, last)]


def normalise(net: nn.Module) -> nn.Module:
    """Wrap each layer in spectral norm: every reading of a weight divides it by its largest singular value."""
    for layer in list(net.modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            spectral_norm(layer)
    return net


def make_plain_nets(work: Work) -> tuple[nn.Module, nn.Module]:
    """Build G and D, not yet normalised."""
    return PlainGenerator(work.size, work.width), PlainDiscriminator(work.size, work.width)


def make_plain(work: Work) -> Peer:
    """Build a plain training loop: fp32, one pass for real and one for generated images, every gradient."""
    G, D = make_plain_nets(work)
    G, D = G.to(work.device), normalise(D).to(work.device)
    optimizer_g, optimizer_d = (torch.optim.Adam(net.parameters(), **ADAM) for net in (G, D))
    photos = work.photos().to(work.device)

    def draw() -> torch.Tensor:
        return G(torch.randn(work.batch, Z_DIM, device=work.device))

    def step() -> None:
        for _ in range(D_STEPS):
            real, fake = pick_batch(photos, work.batch), draw().detach()
            learn(optimizer_d, F.relu(1 - D(real)).mean() + F.relu(1 + D(fake)).mean())
        learn(optimizer_g, -D(draw()).mean())

    def learn(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Peer(step, count_flop(partial(make_plain_nets, work), work.batch), "fp32", count_parameters(G, D))


# --- ours


def make_ours(work: Work, *, precision: str = "auto", full: bool = False, **options) -> Peer:
    """Build the trainer; `full` adds DiffAugment and LeCam, which no other peer has; options are the trainer's."""
    regularisation = {"lecam_start": 0} if full else {"augment": None, "lecam_weight": 0.0}
    config = TrainConfig(
        size=work.size,
        width=work.width,
        z_dim=Z_DIM,
        batch=work.batch,
        d_steps=D_STEPS,
        precision=precision,
        **regularisation,
    )
    device = torch.device(work.device)
    trainer = Trainer(work.photos(), config, device, **options)

    def step() -> None:
        for _ in range(D_STEPS):
            trainer.step_discriminator()
        trainer.step_generator()

    flop = count_flop(partial(make_plain_nets, work), work.batch)
    return Peer(
        step, flop, pick_precision(device) if precision == "auto" else precision, count_parameters(trainer.G, trainer.D)
    )


# --- what the hardware can do


def make_matrix(work: Work) -> Peer:
    """Multiply large square matrices in the number format that ours takes."""
    side, device = 8192 if work.device.startswith("cuda") else 2048, torch.device(work.device)
    precision = pick_precision(device)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return Peer(partial(torch.matmul, a, b, out=torch.empty_like(a)), 2.0 * side**3, precision, None)


MATRIX = "matrix product"
PEERS = {
    "torch-mimicry": make_mimicry,
    "plain": make_plain,
    "ours fp32": partial(make_ours, precision="fp32"),
    "ours": make_ours,
    "ours, full recipe": partial(make_ours, full=True),
    "ours compiled": partial(make_ours, compile=True),
    MATRIX: make_matrix,
}
