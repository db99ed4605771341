"""What tools of timm ask of a model: its classifier, its stages, groups of its parameters, its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.nn.parameter import is_lazy

from .arguments import entries, flag, integer, shown
from .images.preprocess import Preprocess

if TYPE_CHECKING:
    from .model import PVT_V2

# timm's word for "with the group before".
_WITH_THE_LAST = (99999,)


class TimmConventions:
    """Methods and attributes of timm's models, for PVT_V2."""

    global_pool: str
    num_features: int

    @property
    def num_classes(self) -> int:
        """Outputs of the module at `head`, 0 for nn.Identity; see `outputs_of` for a head that is no linear."""
        return cast("PVT_V2", self).config.num_classes

    @property
    def head_hidden_size(self) -> int:
        """Channels that reach the head: `num_features`."""
        return self.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Per stage: `num_chs`, `reduction` (pixels per token side), `module` (the norm that ends it).

        A forward hook on that module sees tokens (B, N, C); maps come from `forward_intermediates`.
        """
        return [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"norm{stage + 1}"}
            for stage, dim in enumerate(cast("PVT_V2", self).config.embed_dims)
        ]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """As timm describes weights and their data: for `timm.data.resolve_data_config(model=model)` and the like.

        `input_size` is (channels, height, width) in pixels; mean and std are those of the published weights, for RGB.
        """
        config, data = cast("PVT_V2", self).config, Preprocess()
        rgb = {"mean": data.mean, "std": data.std} if config.in_channels == data.in_channels else {}
        return {
            "architecture": "pvt_v2",
            "num_classes": config.num_classes,
            "input_size": (config.in_channels, *config.img_hw),
            "fixed_input_size": False,
            "pool_size": config.map_sizes(*config.img_hw)[-1],
            "interpolation": data.interpolation,
            "crop_pct": data.crop,
            "first_conv": "patch_embed1.proj",
            "classifier": "head",
            **rgb,
        }

    default_cfg = pretrained_cfg

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers in the order of depth, as regular expressions over parameter names for timm's `group_parameters`.

        The first patch embed, then per stage its patch embed, its blocks one by one, its norm with the last of them;
        the head, unmatched, comes last. coarse: the first patch embed, the stages, the head.
        """
        if flag("group_matcher: coarse", coarse):
            return {"stem": r"^patch_embed1\.", "blocks": r"^(?:patch_embed|block|norm)(\d+)\."}
        blocks = [
            (r"^patch_embed(\d+)\.", (-1,)),
            (r"^block(\d+)\.(\d+)\.", None),
            (r"^norm(\d+)\.", _WITH_THE_LAST),
        ]
        return {"stem": r"^patch_embed1\.", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone beyond norms and biases: none in PVT v2."""
        return set()

    def get_classifier(self) -> nn.Module:
        """The head: `nn.Linear`, `nn.Identity` where there are no classes, or what was put there."""
        return cast("PVT_V2", self).head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a newly initialised linear (or none, for 0) on the model's device and dtype.

        global_pool: "avg", the mean over the map, or "" for none, only without classes: the model then returns the
        map (B, C, H, W). None leaves it as it is. Raises ValueError or TypeError for other values.
        """
        num_classes = integer("reset_classifier: num_classes", num_classes, 0)
        pool = self.global_pool if global_pool is None else global_pool
        if not isinstance(pool, str) or pool not in ("avg", "") or (pool == "" and num_classes):
            raise ValueError(
                f'reset_classifier: global_pool must be "avg", or "" for 0 classes, got {shown(pool)} for {num_classes}'
            )
        model = cast("PVT_V2", self)
        replace(model.config, num_classes=num_classes)  # refuses more than memory is there for
        like = next(model.parameters())
        model.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        init_weights(model.head.train(model.training))
        self.global_pool = pool

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """The size in pixels, one int or (H, W), that `config` and `pretrained_cfg` tell: any is taken all the same.

        Raises ValueError where such an image does not survive the stages.
        """
        model = cast("PVT_V2", self)
        model._config = replace(model.config, img_size=img_size)  # type: ignore[arg-type]  # made a tuple there

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last that `indices` (of `forward_intermediates`) name; their numbers from 0.

        prune_head: drop the head and the pooling as well; both go in any case with the stage that they are made for.
        prune_norm has no effect: each stage's norm is a part of it, as in timm's PVT v2.
        """
        flag("prune_intermediate_layers: prune_norm", prune_norm)
        flag("prune_intermediate_layers: prune_head", prune_head)
        model = cast("PVT_V2", self)
        config = model.config
        chosen = stage_indices("prune_intermediate_layers", indices, config.num_stages)
        kept = max(chosen) + 1
        for stage in range(kept, config.num_stages):
            for name in ("patch_embed", "block", "norm"):
                delattr(model, f"{name}{stage + 1}")
        if kept < config.num_stages:
            per_stage = ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios")
            left = {name: getattr(config, name)[:kept] for name in per_stage}
            # stochastic depth's rates lie on a line: the blocks that stay keep theirs
            share = (sum(left["depths"]) - 1) / max(sum(config.depths) - 1, 1)
            model._config = replace(config, num_stages=kept, drop_path_rate=config.drop_path_rate * share, **left)
            self.num_features = left["embed_dims"][-1]
            model.read_stand_ins()
        if prune_head or kept < config.num_stages:
            self.reset_classifier(0, "")
        return chosen


def outputs_of(head: nn.Module | None) -> int | None:
    """Outputs of a head: rows of a linear's weight, 0 of nn.Identity, else what its last module with `out_features`
    tells; None where none does.
    """
    if isinstance(head, nn.Identity):
        return 0
    if isinstance(head, nn.Linear):
        weight = head._parameters.get("weight")
        return head.out_features if weight is None or is_lazy(weight) else weight.shape[0]
    told = (
        getattr(module, "out_features", None) for module in (reversed(list(head.modules())) if head is not None else ())
    )
    return next((outputs for outputs in told if isinstance(outputs, int)), None)


def inputs_of(embed: nn.Module | None) -> int | None:
    """Channels of the images that a patch embed takes: those of its `proj`; None where that is no convolution."""
    proj = None if embed is None else embed._modules.get("proj")
    return proj.in_channels if isinstance(proj, nn.Conv2d) else None


def stage_indices(op: str, indices: int | Sequence[int] | None, num_stages: int) -> list[int]:
    """Stage numbers from 0: None means all, an int n the last n, negative ones count from the end.

    Raises ValueError or TypeError.
    """
    where = f"{op}: indices"
    if indices is None:
        return list(range(num_stages))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= num_stages:
            raise ValueError(f"{where} must be 1 to {num_stages} stages, got {shown(indices)}")
        return list(range(num_stages - indices, num_stages))
    chosen = entries(where, indices, "an int or a sequence of stage numbers")
    for index in chosen:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{where} must be ints, got {shown(index)}")
        if not -num_stages <= index < num_stages:
            raise ValueError(f"{where} must lie in [0, {num_stages}), got {shown(index)}")
    if not chosen:
        raise ValueError(f"{where} must name at least one stage, got none")
    return [index % num_stages for index in chosen]


def init_weights(module: nn.Module) -> None:
    """As official: linears truncated normal of std 0.02, convolutions normal by fan-out, biases 0, norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
