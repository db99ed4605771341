"""Small models of timm and transformers with random weights, and the same architecture here."""

from typing import Any

import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn
from transformers import PvtV2Config, PvtV2ForImageClassification

from pvt_fast import PVT_V2

# Four stages, as transformers' reduction ratios of 8 to 1 want them; every stage differs from the next.
SMALL: dict[str, Any] = {
    "embed_dims": (8, 16, 24, 32),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 3, 2, 1),
    "depths": (1, 2, 1, 1),
    "sr_ratios": (8, 4, 2, 1),
    "qkv_bias": True,
    "linear": False,
}
# What takes long for each block, such as compiling and exporting, is seen on two stages, too.
TWO_STAGES: dict[str, Any] = {
    "embed_dims": (8, 16),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 3),
    "depths": (1, 2),
    "sr_ratios": (2, 1),
}
LAYOUT_PEERS = ("timm", "transformers")


def ours(num_classes: int = 7, **overrides: Any) -> PVT_V2:
    arguments = {**SMALL, **overrides}
    arguments = {"img_size": 64, "num_stages": len(arguments["depths"]), **arguments}
    return PVT_V2(num_classes=num_classes, **arguments).eval()


def transformers_config(arguments: dict[str, Any], **more: Any) -> PvtV2Config:
    """transformers' configuration of the architecture that `PVT_V2`'s arguments describe."""
    return PvtV2Config(
        hidden_sizes=list(arguments["embed_dims"]),
        num_attention_heads=list(arguments["num_heads"]),
        depths=list(arguments["depths"]),
        mlp_ratios=list(arguments["mlp_ratios"]),
        sr_ratios=list(arguments["sr_ratios"]),
        qkv_bias=arguments["qkv_bias"],
        linear_attention=arguments["linear"],
        **more,
    )


def peer(layout: str, num_classes: int = 7, **overrides: Any) -> nn.Module:
    """The implementation's own model with no parameter at a trivial value, in evaluation mode."""
    arguments = {**SMALL, **overrides}
    if layout == "timm":
        model: nn.Module = PyramidVisionTransformerV2(num_classes=num_classes, **arguments)
    else:
        strides, kernels = [4, 2, 2, 2], [7, 3, 3, 3]
        stages = len(arguments["depths"])
        config = transformers_config(
            arguments,
            num_labels=num_classes,
            num_encoder_blocks=stages,
            patch_sizes=kernels[:stages],
            strides=strides[:stages],
        )
        model = PvtV2ForImageClassification(config)
    return randomised(model).eval()


def randomised(model: nn.Module) -> nn.Module:
    """Random parameters, small in the first convolution: what its norm sees has a variance near the epsilons."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 1e-4 if parameter.dim() == 4 and parameter.shape[2] == 7 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + ("norm" in name))
    return model


@torch.no_grad()
def logits_of(model: nn.Module, image: Tensor) -> Tensor:
    output = model(image)
    return output if isinstance(output, Tensor) else output.logits
