"""Real architectures at small sizes with seeded weights, for tests that go the whole way."""

from __future__ import annotations

import torch
from torch import nn


class First(nn.Module):
    """A transformers model whose result is its first output alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


def settled(module: nn.Module, x: torch.Tensor) -> nn.Module:
    """In eval mode, with batch-norm statistics taken from `x`."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            part.reset_running_stats()
    with torch.no_grad():
        module.train()(x)
    return module.eval()


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def resnet() -> tuple[nn.Module, torch.Tensor]:
    """ResNet-18 at a quarter of its width, 32×32 images."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[16, 32, 64, 128], embedding_size=16, num_labels=10,
        layer_type="basic",
    )  # fmt: skip
    return settled(First(ResNetForImageClassification(config)), images(8)), images(8)


def mobilenet() -> tuple[nn.Module, torch.Tensor]:
    """MobileNetV2 at a third of its width, 32×32 images."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.35, num_labels=10, image_size=32)
    return settled(First(MobileNetV2ForImageClassification(config)), images(8)), images(8)


def bert() -> tuple[nn.Module, torch.Tensor]:
    """A BERT of two layers and width 32, sequences of 12 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=5, attn_implementation="eager",
    )  # fmt: skip
    tokens = torch.randint(0, 100, (8, 12), generator=torch.Generator().manual_seed(1))
    return First(BertForSequenceClassification(config)).eval(), tokens


def digits_net() -> tuple[nn.Module, torch.Tensor]:
    """The architecture of examples/digits.py, untrained."""
    from examples.digits import DigitsNet

    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return settled(DigitsNet(), x), x


NETS = {"resnet": resnet, "mobilenet": mobilenet, "bert": bert, "digits": digits_net}
