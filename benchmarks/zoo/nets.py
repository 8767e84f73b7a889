"""Two small image networks, and their rescaled twins: the same functions with uneven channels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CLASSES = 34
SPREAD = 64.0
"""Greatest factor by which a twin multiplies a channel."""


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al., "Deep Residual Learning", 2016)."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide_out)
        self.act1: nn.Module = nn.ReLU()
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide_out)
        self.act2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or wide_in != wide_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(inner)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al., "MobileNetV2", 2018)."""

    def __init__(self, wide_in: int, wide_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = wide_in * expand
        self.conv1 = nn.Conv2d(wide_in, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act1: nn.Module = nn.ReLU6()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act2: nn.Module = nn.ReLU6()
        self.conv3 = nn.Conv2d(hidden, wide_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide_out)
        self.residual = stride == 1 and wide_in == wide_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.act1(self.bn1(self.conv1(x)))
        inner = self.act2(self.bn2(self.conv2(inner)))
        made = self.bn3(self.conv3(inner))
        return x + made if self.residual else made


class Net(nn.Module):
    """A stem, blocks, a head: float32 [N, 1, 32, 32] to logits [N, 34]."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


def resnet() -> Net:
    """Six basic blocks of 16, 32 and 64 channels."""
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    plan = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))
    return Net(stem, [BasicBlock(*p) for p in plan], head)


def mobilenet() -> Net:
    """Nine inverted residuals of 16 to 64 channels, expanded four times, with ReLU6."""
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    plan = (
        (16, 16, 1), (16, 24, 1), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 32, 1),
        (32, 64, 2), (64, 64, 1), (64, 64, 1),
    )  # fmt: skip
    head = nn.Sequential(
        nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, CLASSES),
    )  # fmt: skip
    return Net(stem, [InvertedResidual(*p, expand=4) for p in plan], head)


NETS: dict[str, Callable[[], Net]] = {"resnet": resnet, "mobilenet": mobilenet}


class Capped(nn.Module):
    """ReLU with an upper bound for each channel."""

    def __init__(self, caps: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("caps", caps.reshape(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.relu(x), self.caps)


def twin(net: Net, seed: int = 7) -> Net:
    """The same function with hidden channels of every block scaled up and down again.

    Batch normalisation is folded, then channel c of an activation that one convolution makes and
    one reads is multiplied by a factor in [1 / `SPREAD`, `SPREAD`], log-uniform, in the first and
    divided in the second; a ReLU6 between them gets a bound for each channel.
    """
    made = copy.deepcopy(net).eval()
    generator = torch.Generator().manual_seed(seed)
    for block in made.blocks:
        pairs = (("1", "2"), ("2", "3")) if isinstance(block, InvertedResidual) else (("1", "2"),)
        for index in sorted({i for pair in pairs for i in pair}):
            fused = fuse_conv_bn_eval(getattr(block, f"conv{index}"), getattr(block, f"bn{index}"))
            setattr(block, f"conv{index}", fused)
            setattr(block, f"bn{index}", nn.Identity())
        for first, second in pairs:
            _rescale(block, first, second, generator)
    return made


@torch.no_grad()
def _rescale(block: nn.Module, first: str, second: str, generator: torch.Generator) -> None:
    maker, reader = getattr(block, f"conv{first}"), getattr(block, f"conv{second}")
    exponents = 2 * torch.rand(maker.out_channels, generator=generator) - 1
    factors = SPREAD**exponents
    maker.weight *= factors.reshape(-1, 1, 1, 1)
    maker.bias *= factors
    if reader.groups > 1:
        reader.weight /= factors.reshape(-1, 1, 1, 1)
    else:
        reader.weight /= factors.reshape(1, -1, 1, 1)
    if isinstance(getattr(block, f"act{first}"), nn.ReLU6):
        setattr(block, f"act{first}", Capped(6 * factors))
