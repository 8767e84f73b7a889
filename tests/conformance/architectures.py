"""Architectures of `transformers`, made small from their configs, with seeded random weights.

    python -m tests.conformance.architectures [name ...]

compiles each for ONNX Runtime and prints how far its outputs are from eager's; `FAILING` lists what
is known to fail and why, `QUICK` what the test suite runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.utils import _pytree as pytree

import optcompiler as oc
from optcompiler.errors import OptcompilerError

TOLERANCE = 1e-4
"""Largest difference to eager, relative to the largest magnitude of an output."""


@dataclass(frozen=True)
class Architecture:
    """A model class, what its config is made with, and the inputs of one call."""

    kind: str
    model: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    backbone: tuple[str, Mapping[str, Any]] | None = None
    """The class and the settings of a config that another holds as `backbone_config`."""
    spread: float = 1.0
    """What matrices are multiplied by, where the scores of fresh weights are too near to each other
    to be ranked: float64 would rank them otherwise than float32."""

    def build(self) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        """The model in eval mode and its inputs, the same on every call."""
        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        settings = dict(self.config)
        if self.backbone is not None:
            name, inner = self.backbone
            settings["backbone_config"] = getattr(transformers, name)(**inner)
        model = model_class(model_class.config_class(**settings)).eval()
        # fresh statistics and scales are 0 and 1, which hides what is done with them
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point() and tensor.ndim == 1:
                    tensor += 0.05 * torch.rand_like(tensor)
                elif tensor.is_floating_point():
                    tensor *= self.spread
        return model, self.inputs()


# -- inputs ---------------------------------------------------------------------------------


def image(size: int = 32) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"pixel_values": torch.rand(1, 3, size, size)}


def tokens(**more: Callable[[], torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {
        "input_ids": torch.randint(5, 90, (2, 7)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        **{name: make() for name, make in more.items()},
    }


def prompt() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 90, (2, 7))}


def pair() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(5, 90, (2, 7)),
        "decoder_input_ids": torch.randint(5, 90, (2, 5)),
    }


def sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(1, 800)}


# -- the table ------------------------------------------------------------------------------

TEXT = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=37, max_position_embeddings=40,
)  # fmt: skip
DECODER = TEXT | dict(use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = DECODER | dict(num_key_value_heads=2)
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
    image_size=32, patch_size=8,
)  # fmt: skip
PAIR = dict(
    vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, max_position_embeddings=40,
    use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip
T5 = dict(
    vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, use_cache=False,
    decoder_start_token_id=0,
)  # fmt: skip
SPEECH = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, vocab_size=32,
    conv_dim=(16, 16, 16), conv_kernel=(8, 3, 3), conv_stride=(4, 2, 2), feat_extract_norm="layer",
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, apply_spec_augment=False,
)  # fmt: skip
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1])
DETR = dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, num_queries=6,
    use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=5,
)  # fmt: skip
BACKBONE = ("ResNetConfig", RESNET | dict(out_features=["stage4"]))
STAGES = ("ResNetConfig", RESNET | dict(out_features=["stage2", "stage3", "stage4"]))

ARCHITECTURES: dict[str, Architecture] = {
    "vit": Architecture("vision", "ViTForImageClassification", VISION, image()),
    "deit": Architecture("vision", "DeiTForImageClassification", VISION, image()),
    "beit": Architecture(
        "vision", "BeitForImageClassification",
        VISION | dict(use_relative_position_bias=True), image(),
    ),
    "dinov2": Architecture("vision", "Dinov2ForImageClassification", VISION, image()),
    "swin": Architecture(
        "vision", "SwinForImageClassification",
        dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
             window_size=4), image(),
    ),
    "swinv2": Architecture(
        "vision", "Swinv2ForImageClassification",
        dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
             window_size=4), image(),
    ),
    "convnext": Architecture(
        "vision", "ConvNextForImageClassification",
        dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), image(64),
    ),
    "convnextv2": Architecture(
        "vision", "ConvNextV2ForImageClassification",
        dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), image(64),
    ),
    "resnet": Architecture("vision", "ResNetForImageClassification", RESNET, image(64)),
    "regnet": Architecture(
        "vision", "RegNetForImageClassification", RESNET | dict(groups_width=4), image(64)
    ),
    "bit": Architecture("vision", "BitForImageClassification",
                        RESNET | dict(num_groups=4), image(64)),
    "mobilenet_v1": Architecture(
        "vision", "MobileNetV1ForImageClassification", dict(depth_multiplier=0.25), image(64)
    ),
    "mobilenet_v2": Architecture(
        "vision", "MobileNetV2ForImageClassification", dict(depth_multiplier=0.25), image(64)
    ),
    "mobilevit": Architecture(
        "vision", "MobileViTForImageClassification",
        dict(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 16, 24, 32],
             num_attention_heads=2, last_hidden_size=32, image_size=64), image(64),
    ),
    "efficientnet": Architecture(
        "vision", "EfficientNetForImageClassification",
        dict(image_size=64, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320),
        image(64),
    ),
    "levit": Architecture(
        "vision", "LevitForImageClassification",
        dict(image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2],
             depths=[1, 1, 1], key_dim=[8, 8, 8],
             down_ops=[["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 3, 2, 2, 2]]),
        image(64),
    ),
    "poolformer": Architecture(
        "vision", "PoolFormerForImageClassification",
        dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), image(64),
    ),
    "pvt": Architecture(
        "vision", "PvtForImageClassification",
        dict(image_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
             num_attention_heads=[1, 2, 2, 4]), image(64),
    ),
    "cvt": Architecture(
        "vision", "CvtForImageClassification",
        dict(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3]), image(64),
    ),
    "focalnet": Architecture(
        "vision", "FocalNetForImageClassification",
        dict(image_size=32, embed_dim=16, depths=[1, 1], focal_levels=[2, 2],
             focal_windows=[3, 3]), image(),
    ),
    "hiera": Architecture(
        "vision", "HieraForImageClassification",
        dict(image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
        image(64),
    ),
    "bert": Architecture("text encoder", "BertForSequenceClassification", TEXT, tokens()),
    "roberta": Architecture("text encoder", "RobertaForMaskedLM", TEXT, tokens()),
    "distilbert": Architecture(
        "text encoder", "DistilBertForSequenceClassification",
        dict(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37,
             max_position_embeddings=40), tokens(),
    ),
    "albert": Architecture(
        "text encoder", "AlbertModel", TEXT | dict(embedding_size=16), tokens()
    ),
    "electra": Architecture(
        "text encoder", "ElectraForTokenClassification", TEXT | dict(embedding_size=16), tokens()
    ),
    "deberta_v2": Architecture(
        "text encoder", "DebertaV2Model",
        TEXT | dict(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]),
        tokens(),
    ),
    "mpnet": Architecture("text encoder", "MPNetModel", TEXT, tokens()),
    "mobilebert": Architecture(
        "text encoder", "MobileBertModel",
        TEXT | dict(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16), tokens(),
    ),
    "squeezebert": Architecture(
        "text encoder", "SqueezeBertModel",
        TEXT | dict(embedding_size=32, intermediate_size=36), tokens(),
    ),
    "modernbert": Architecture(
        "text encoder", "ModernBertModel",
        TEXT | dict(pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1,
                    eos_token_id=2), tokens(),
    ),
    "fnet": Architecture("text encoder", "FNetModel", TEXT, prompt),
    "roformer": Architecture("text encoder", "RoFormerModel", TEXT, tokens()),
    "xlnet": Architecture(
        "text encoder", "XLNetModel",
        dict(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=37, use_mems_eval=False),
        tokens(),
    ),
    "longformer": Architecture(
        "text encoder", "LongformerModel",
        TEXT | dict(attention_window=[4, 4]), prompt,
    ),
    "gpt2": Architecture(
        "decoder", "GPT2LMHeadModel",
        dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40, use_cache=False,
             bos_token_id=1, eos_token_id=2),
        prompt,
    ),
    "llama": Architecture("decoder", "LlamaForCausalLM", GROUPED, prompt),
    "mistral": Architecture(
        "decoder", "MistralForCausalLM", GROUPED | dict(sliding_window=4), prompt
    ),
    "qwen2": Architecture("decoder", "Qwen2ForCausalLM", GROUPED, prompt),
    "qwen3": Architecture("decoder", "Qwen3ForCausalLM", GROUPED | dict(head_dim=8), prompt),
    "gemma2": Architecture("decoder", "Gemma2ForCausalLM", GROUPED | dict(head_dim=8), prompt),
    "phi": Architecture("decoder", "PhiForCausalLM", DECODER, prompt),
    "gpt_neox": Architecture("decoder", "GPTNeoXForCausalLM", DECODER, prompt),
    "opt": Architecture(
        "decoder", "OPTForCausalLM",
        dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=37,
             max_position_embeddings=40, word_embed_proj_dim=32, use_cache=False),
        tokens(),
    ),
    "bloom": Architecture(
        "decoder", "BloomForCausalLM",
        dict(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, use_cache=False), tokens(),
    ),
    "falcon": Architecture("decoder", "FalconForCausalLM", DECODER, prompt),
    "mixtral": Architecture(
        "decoder", "MixtralForCausalLM",
        GROUPED | dict(intermediate_size=36, num_local_experts=4, num_experts_per_tok=2,
                       experts_implementation="batched_mm"), prompt,
    ),
    "mamba": Architecture(
        "decoder", "MambaForCausalLM",
        dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8, use_cache=False),
        prompt,
    ),
    "t5": Architecture("encoder-decoder", "T5ForConditionalGeneration", T5, pair),
    "bart": Architecture("encoder-decoder", "BartForConditionalGeneration", PAIR, pair),
    "marian": Architecture("encoder-decoder", "MarianMTModel", PAIR, pair),
    "pegasus": Architecture("encoder-decoder", "PegasusForConditionalGeneration", PAIR, pair),
    "m2m_100": Architecture("encoder-decoder", "M2M100ForConditionalGeneration", PAIR, pair),
    "whisper": Architecture(
        "audio", "WhisperForConditionalGeneration",
        PAIR | dict(num_mel_bins=16, max_source_positions=20, max_target_positions=40),
        lambda: {
            "input_features": torch.randn(1, 16, 40),
            "decoder_input_ids": torch.randint(5, 90, (1, 5)),
        },
    ),
    "wav2vec2": Architecture("audio", "Wav2Vec2ForCTC", SPEECH, sound),
    "hubert": Architecture("audio", "HubertForCTC", SPEECH, sound),
    "wavlm": Architecture("audio", "WavLMForCTC", SPEECH, sound),
    "audio_spectrogram_transformer": Architecture(
        "audio", "ASTForAudioClassification",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
             patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16),
        lambda: {"input_values": torch.randn(1, 32, 16)},
    ),
    "speech_to_text": Architecture(
        "audio", "Speech2TextForConditionalGeneration",
        PAIR | dict(input_feat_per_channel=16, conv_channels=16, max_source_positions=40,
                    max_target_positions=40, num_conv_layers=2),
        lambda: {
            "input_features": torch.randn(1, 24, 16),
            "decoder_input_ids": torch.randint(5, 90, (1, 5)),
        },
    ),
    "encodec": Architecture(
        "audio", "EncodecModel",
        dict(num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=16,
             upsampling_ratios=[4, 2], target_bandwidths=[60.0], sampling_rate=24000),
        lambda: {"input_values": torch.randn(1, 1, 320)},
    ),
    "detr": Architecture("detection", "DetrForObjectDetection", DETR, image(64), BACKBONE),
    "conditional_detr": Architecture(
        "detection", "ConditionalDetrForObjectDetection", DETR, image(64), BACKBONE
    ),
    "table_transformer": Architecture(
        "detection", "TableTransformerForObjectDetection", DETR, image(64), BACKBONE
    ),
    "deformable_detr": Architecture(
        "detection", "DeformableDetrForObjectDetection",
        DETR | dict(decoder_layers=2), image(128), STAGES,
    ),
    "rt_detr": Architecture(
        "detection", "RTDetrForObjectDetection",
        dict(encoder_hidden_dim=32, encoder_in_channels=[16, 16, 32], encoder_ffn_dim=37,
             encoder_attention_heads=4, d_model=32, num_queries=6, decoder_in_channels=[32, 32, 32],
             decoder_ffn_dim=37, decoder_layers=1, decoder_attention_heads=4, num_labels=5,
             anchor_image_size=None, num_denoising=0),
        image(64),
        ("RTDetrResNetConfig", RESNET | dict(out_features=["stage2", "stage3", "stage4"])),
        spread=3.0,
    ),
    "yolos": Architecture(
        "detection", "YolosForObjectDetection",
        VISION | dict(image_size=[32, 32], num_detection_tokens=6), image(),
    ),
    "segformer": Architecture(
        "segmentation", "SegformerForSemanticSegmentation",
        dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
             decoder_hidden_size=16, num_labels=5), image(64),
    ),
    "upernet": Architecture(
        "segmentation", "UperNetForSemanticSegmentation",
        dict(hidden_size=16, auxiliary_in_channels=16, num_labels=5, auxiliary_channels=16,
             use_pretrained_backbone=False, backbone=None), image(64),
        ("ResNetConfig", RESNET | dict(out_features=["stage1", "stage2", "stage3", "stage4"])),
    ),
    "maskformer": Architecture(
        "segmentation", "MaskFormerForInstanceSegmentation",
        dict(fpn_feature_size=32, mask_feature_size=32, num_labels=5,
             use_pretrained_backbone=False, backbone=None,
             decoder_config=transformers.DetrConfig(**{k: v for k, v in DETR.items()
                                                       if "backbone" not in k})),
        image(64),
        ("ResNetConfig", RESNET | dict(out_features=["stage1", "stage2", "stage3", "stage4"])),
    ),
    "mask2former": Architecture(
        "segmentation", "Mask2FormerForUniversalSegmentation",
        dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=37,
             encoder_layers=1, decoder_layers=2, num_attention_heads=4, dim_feedforward=37,
             num_queries=6, num_labels=5, use_pretrained_backbone=False, backbone=None),
        image(64),
        ("ResNetConfig", RESNET | dict(out_features=["stage1", "stage2", "stage3", "stage4"])),
    ),
    "mobilevit_deeplab": Architecture(
        "segmentation", "MobileViTForSemanticSegmentation",
        dict(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 16, 24, 32],
             num_attention_heads=2, last_hidden_size=32, image_size=64, aspp_out_channels=16,
             num_labels=5), image(64),
    ),
    "dpt": Architecture(
        "segmentation", "DPTForSemanticSegmentation",
        VISION | dict(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
                      neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, num_labels=5),
        image(),
    ),
    "sam": Architecture(
        "segmentation", "SamModel",
        dict(vision_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                mlp_dim=37, image_size=64, patch_size=8, output_channels=16,
                                window_size=4, global_attn_indexes=[1], num_pos_feats=8),
             prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8,
                                        mask_input_channels=4),
             mask_decoder_config=dict(hidden_size=16, mlp_dim=37, num_attention_heads=2,
                                      iou_head_hidden_dim=16, num_hidden_layers=2)),
        lambda: {
            "pixel_values": torch.rand(1, 3, 64, 64),
            "input_points": torch.rand(1, 1, 2, 2) * 60,
        },
    ),
    "clip": Architecture(
        "vision and text", "CLIPModel",
        dict(text_config=TEXT | dict(eos_token_id=98, bos_token_id=1), vision_config=VISION,
             projection_dim=16),
        tokens(pixel_values=lambda: torch.rand(1, 3, 32, 32)),
    ),
    "siglip": Architecture(
        "vision and text", "SiglipModel",
        dict(text_config=TEXT, vision_config=VISION),
        tokens(pixel_values=lambda: torch.rand(1, 3, 32, 32)),
    ),
    "vilt": Architecture(
        "vision and text", "ViltModel", TEXT | VISION,
        lambda: {
            "input_ids": torch.randint(5, 90, (1, 7)), "pixel_values": torch.rand(1, 3, 32, 32),
        },
    ),
}  # fmt: skip

QUICK = (
    "vit", "deit", "dinov2", "convnext", "convnextv2", "resnet", "regnet", "poolformer",
    "bert", "roberta", "distilbert", "albert", "electra", "mpnet", "squeezebert", "fnet", "xlnet",
    "gpt2", "opt", "llama", "bloom", "falcon", "qwen2",
    "t5", "bart", "wav2vec2", "hubert", "audio_spectrogram_transformer",
    "yolos", "detr", "rt_detr", "segformer", "upernet",
)  # fmt: skip
"""Those that the test suite compiles: all kinds, the ones that take longest left out."""


@dataclass(frozen=True)
class Failure:
    """What the error says, and why it comes to that."""

    error: str
    reason: str


FAILING: dict[str, Failure] = {
    "longformer": Failure(
        "torch.export cannot trace it (GuardOnDataDependentSymNode",
        "forward branches on whether any token has global attention",
    ),
    "encodec": Failure(
        "torch.export cannot trace it (GuardOnDataDependentSymNode",
        "forward branches on the lengths of the padded sound, which depend on the data",
    ),
    "vilt": Failure(
        "torch.export cannot trace it (GuardOnDataDependentSymNode",
        "forward picks image patches at random, as many as the mask has",
    ),
}  # fmt: skip
"""Architectures that do not come all the way."""


def difference(got: Any, wanted: Any) -> float:
    """Largest difference of two results, relative to the largest magnitude of each output."""
    found, known = pytree.tree_leaves(got), pytree.tree_leaves(wanted)
    assert len(found) == len(known), f"{len(found)} results, {len(known)} expected"
    worst = 0.0
    for f, k in zip(found, known, strict=True):
        if not isinstance(k, torch.Tensor):
            assert f == k
            continue
        assert (f.dtype, f.shape) == (k.dtype, k.shape)
        assert torch.equal(f.isfinite(), k.isfinite())
        finite = k.isfinite()
        f, k = f[finite].double(), k[finite].double()
        if k.numel():
            scale = float(k.abs().max()) or 1.0
            worst = max(worst, float((f - k).abs().max()) / scale)
    return worst


def compile_and_compare(architecture: Architecture) -> float:
    """How far the compiled model is from eager; raises what the compile raises."""
    model, inputs = architecture.build()
    with torch.no_grad():
        wanted = model(**inputs)
    with oc.compile(model, inputs, target="onnxruntime", precision="fp32") as compiled:
        return difference(compiled(**inputs), wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; default: all")
    torch.set_num_threads(1)
    for name in parser.parse_args().names or ARCHITECTURES:
        start = time.process_time()
        try:
            outcome = f"{compile_and_compare(ARCHITECTURES[name]):.1e}"
        except (OptcompilerError, AssertionError) as error:
            outcome = f"{type(error).__name__}: {error}"
        print(f"{name:30} {time.process_time() - start:5.1f} s  {outcome}", flush=True)


if __name__ == "__main__":
    main()
