"""PVT_V2: overlap patch embeds, stages of blocks, a norm per stage, a linear head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .accelerate.fused import Fused, Settings, StandIn
from .accelerate.guard import Kinds, products_now
from .arguments import flag, function, instance, number, shown
from .backend import dispatch
from .checkpoints.pretrained import HubMixin
from .config import PVTConfig
from .conventions import TimmConventions, init_weights, inputs_of, outputs_of, stage_indices
from .graphs import compiled
from .graphs.cuda_graph import CapturedModel
from .graphs.program import Whole
from .images.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise
from .layers import Block, DWConvMLP, OverlapPatchEmbed, SpatialReductionAttention, classifier, map_of, stage_norm
from .ops import packing, to_tokens

logger = logging.getLogger("pvt_fast")


class PVT_V2(nn.Module, HubMixin, TimmConventions):
    """Pyramid Vision Transformer v2: images (B, in_channels, H, W) -> logits (B, num_classes).

    Any H and W that survive the stages: a stage's map must be at least sr_ratio each way. Maps have
    ceil(H / 4), ceil(H / 8), ceil(H / 16), ceil(H / 32) rows for odd kernels. The class defaults are no published
    variant; `pvt_v2_b0` ... `pvt_v2_b5`, `pvt_v2_b2_li` are.

    img_size: advisory, in pixels, one int or (H, W): checked to survive the stages, not required of the input.
    patch_size: kernel of the first patch embed (stride 4, padding patch_size // 2), an int above 4; later ones are 3.
    in_channels: channels of the image.
    num_classes: outputs of the head; 0 makes the model return the pooled features (B, embed_dims[-1]).
    embed_dims, num_heads, depths: per stage, channels C, attention heads (must divide C), blocks.
    mlp_ratios: per stage, hidden width of the MLP as a multiple of C.
    qkv_bias: bias on the q and kv linears.
    qk_scale: factor on the scores; None or 0 means head_dim ** -0.5.
    drop_rate, attn_drop_rate: dropout in training, in [0, 1): after GELU, fc2 and proj; on attention probabilities.
    drop_path_rate: stochastic depth in training, rising linearly from 0 in the first block to this in the last.
    norm_layer: makes the block and stage norms from C; must give an affine `nn.LayerNorm` over C channels with torch's
        forward, its eps is respected.
        (Patch-embed and spatial-reduction norms have eps 1e-5 as official; `set_norm_eps` changes any of them.)
    sr_ratios: per stage, side and stride of the convolution that reduces keys and values; ignored when linear.
    num_stages: number of stages; every per-stage sequence has this length.
    linear: the "-li" form: keys and values from a 7x7 average pooling, ReLU before the depthwise convolution.

    An image is normalised values in the weights' dtype, or 8-bit RGB pixels (torch.uint8): those are normalised as for
    the published weights, (pixel / 255 - mean) / std with ImageNet's mean and deviation. Any memory layout.

    `backend` ("auto", "reference", "cpp", "triton") may be set on the instance; "auto" follows `use_backend`, then
    the environment variable PVT_FAST_BACKEND, then takes the fastest that can run.

    Ints are Python's (no bool, no NumPy or torch number), numbers are ints or finite floats (of NumPy's only
    np.float64, which is a Python float), bools are True or False, sequences are lists, tuples and their like.
    Raises ValueError or TypeError, naming the argument, for other values, and for what fits no model: no stage may have
    more than 1,000 blocks, no model more than 32 stages or 2**34 parameters.
    Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", CVMJ 2022, arXiv 2106.13797.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 7,
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        depths: Sequence[int] = (3, 4, 6, 3),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        num_stages: int = 4,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self._config = config = PVTConfig(
            img_size,
            patch_size,
            in_channels,
            num_classes,
            embed_dims,  # type: ignore[arg-type]  # the config turns sequences into tuples
            num_heads,  # type: ignore[arg-type]
            mlp_ratios,  # type: ignore[arg-type]
            qkv_bias,
            qk_scale,
            drop_rate,
            attn_drop_rate,
            drop_path_rate,
            depths,  # type: ignore[arg-type]
            sr_ratios,  # type: ignore[arg-type]
            num_stages,
            linear,
        )
        self._settings = Settings()
        self._checkpointing = False
        self.graph_number = compiled.number(self)
        function("PVT_V2: norm_layer", norm_layer, "callable with a number of channels")
        total = sum(config.depths)
        rates = [config.drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        channels = config.in_channels
        for stage in range(config.num_stages):
            first = sum(config.depths[:stage])
            self._add_stage(stage, channels, rates[first : first + config.depths[stage]], norm_layer)
            channels = config.embed_dims[stage]
        self.num_features = channels
        self.global_pool = "avg"
        self.head = nn.Linear(channels, config.num_classes) if config.num_classes else nn.Identity()
        self.apply(init_weights)
        self.read_stand_ins()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.graph_number = compiled.number(self)  # a copy is a model of its own
        self.read_stand_ins()

    def read_stand_ins(self) -> None:
        """Let the ops stand in for what can be read now; what is changed later is read again when it is called."""
        self._fused_norms = [stage_norm(f"norm{n + 1}", self._settings) for n in range(self.config.num_stages)]
        self._fused_head = classifier("head", self._settings)
        self._whole = Whole()
        for owner, fused in self.stand_ins():
            fused.current(owner)

    def stand_ins(self) -> Iterator[tuple[nn.Module, StandIn]]:
        """What stands in for this model's modules, in order, each with the module that it is called with."""
        for stage, norm in enumerate(self._fused_norms):
            embed, blocks = (self._modules.get(f"{name}{stage + 1}") for name in ("patch_embed", "block"))
            for module in (embed, *(() if blocks is None else blocks.children())):
                if module is not None and isinstance(fused := vars(module).get("_fused"), StandIn):
                    yield module, fused
            yield self, norm
        yield self, self._fused_head

    def _add_stage(self, stage: int, in_channels: int, drop_path_rates: Sequence[float], norm_layer: Callable) -> None:
        config = self.config
        dim, heads = config.embed_dims[stage], config.num_heads[stage]
        scale = float(config.qk_scale or (dim // heads) ** -0.5)

        def block(drop_path_rate: float) -> Block:
            attn = SpatialReductionAttention(
                dim,
                heads,
                config.sr_ratios[stage],
                config.linear,
                config.qkv_bias,
                scale,
                (config.attn_drop_rate, config.drop_rate),
            )
            mlp = DWConvMLP(dim, config.hidden_dims[stage], config.linear, config.drop_rate)
            norms = (_layer_norm(norm_layer, dim), _layer_norm(norm_layer, dim))
            return Block(attn, mlp, norms, drop_path_rate, self._settings)

        kernel, stride = config.patch(stage)
        setattr(self, f"patch_embed{stage + 1}", OverlapPatchEmbed(in_channels, dim, kernel, stride, self._settings))
        setattr(self, f"block{stage + 1}", nn.ModuleList(block(rate) for rate in drop_path_rates))
        setattr(self, f"norm{stage + 1}", _layer_norm(norm_layer, dim))

    @property
    def config(self) -> PVTConfig:
        """The architecture as it is now: `in_channels` and `num_classes` are those of the first convolution and of the
        module at `head`, whoever put them there.
        """
        # of no matter to a forward; a size is no number while it is traced
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            ends = {
                "in_channels": inputs_of(self._modules.get("patch_embed1")),
                "num_classes": outputs_of(self._modules.get("head")),
            }
            now = {name: value for name, value in ends.items() if value is not None}
            if any(getattr(self._config, name) != value for name, value in now.items()):
                self._config = replace(self._config, **now)  # type: ignore[arg-type]  # two ints
        return self._config

    # -- backend ---------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """The backend this model asks for: "auto", "reference", "cpp" or "triton"."""
        return self._settings.backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._settings.backend = dispatch.check_name(name, "PVT_V2: backend")
        for _, stand_in in self.stand_ins():  # of blocks that were another model's, or copied, too
            stand_in.follow(self._settings)

    def facts(self, x: Tensor) -> dispatch.Facts:
        """What a backend has to support to run this model on x."""
        config = self._config
        return dispatch.Facts(
            x.device.type,
            x.dtype,
            dropout=self.training and (config.drop_rate > 0 or config.attn_drop_rate > 0),
            products=products_now(x),
        )

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """image (B, in_channels, H, W) -> logits (B, num_classes)."""
        image = self._prepare(image)
        logits = self._whole.run(self, image)
        return self.forward_head(self.forward_features(image)) if logits is None else logits

    published_forward = forward  # whatever a subclass has

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for first."""
        raise TypeError(
            "PVT_V2: torch.jit.script cannot compile it; use torch.jit.trace, torch.export or torch.compile"
        )

    def forward_features(self, image: Tensor) -> Tensor:
        """image (B, in_channels, H, W) -> the last stage's map after its norm, (B, C, H / 32, W / 32)."""
        x = self._prepare(image)
        for stage in range(self._config.num_stages):
            _, x = self._stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map (B, C, H, W) of `forward_features` -> logits, or with `pre_logits` the pooled features (B, C).

        Where `global_pool` is "" nothing is pooled: the map itself comes back, or what the head makes of it.
        """
        flag("forward_head: pre_logits", pre_logits)
        instance("forward_head: x", x, _TENSORS, "a torch.Tensor")
        if self.global_pool != "avg":
            return self._on_map(x, pre_logits)
        if isinstance(x, Tensor) and x.dim() != 4:
            raise ValueError(f"forward_head: x must have shape (B, C, H, W), got {tuple(x.shape)}")
        x = to_tokens(x)
        if not pre_logits and (logits := self._fused_head.run(self, x)) is not None:
            return logits
        x = x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def _on_map(self, x: Tensor, pre_logits: bool) -> Tensor:
        if self.global_pool:
            raise ValueError(f'forward_head: global_pool must be "avg" or "", got {self.global_pool!r}')
        if isinstance(self.head, nn.Linear):
            raise ValueError(
                f'forward_head: global_pool must be "avg" before a linear head, got "" and {self.head}; '
                'reset_classifier(..., global_pool="avg") sets both'
            )
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        image: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = True,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """Maps (B, C, H, W) of the chosen stages, and unless `intermediates_only` the final map before them.

        indices: stage numbers from 0, negative from the end; an int n means the last n; None means all.
        norm: maps after their stage's norm, as detection and segmentation heads take them; else before it. (timm's
            default is False, and without effect on its PVT v2, whose maps are always after their norm.)
        stop_early: run no stage after the last chosen one, whose map then is the final one.
        output_fmt: "NCHW", or "NLC" for the chosen stages as tokens (B, H * W, C); the final map stays a map.
        """
        if not isinstance(output_fmt, str) or output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'forward_intermediates: output_fmt must be "NCHW" or "NLC", got {shown(output_fmt)}')
        for name, value in (("norm", norm), ("stop_early", stop_early), ("intermediates_only", intermediates_only)):
            flag(f"forward_intermediates: {name}", value)
        chosen = stage_indices("forward_intermediates", indices, self._config.num_stages)
        x, intermediates = self._prepare(image), []
        for stage in range(max(chosen) + 1 if stop_early or intermediates_only else self._config.num_stages):
            before, x = self._stage(stage, x)
            if stage in chosen:  # in stage order, each once, as timm
                kept = x if norm else before
                intermediates.append(to_tokens(kept) if output_fmt == "NLC" else kept)
        return intermediates if intermediates_only else (x, intermediates)

    def _stage(self, stage: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A map (B, C, H, W) -> the stage's map before its norm and after it."""
        if stage == 0 and isinstance(x, Tensor):
            self._check_dtype(x)
        x, height, width = getattr(self, f"patch_embed{stage + 1}")(x)
        checkpointing = self._checkpointing and torch.is_grad_enabled()
        for block in getattr(self, f"block{stage + 1}"):
            call = (x, height, width)
            x = checkpoint(block, *call, use_reentrant=False) if checkpointing else block(*call)
        normed = self._fused_norms[stage].run(self, x)
        if normed is None:
            normed = getattr(self, f"norm{stage + 1}")(x)
        return map_of(x, height, width), map_of(normed, height, width)

    def _prepare(self, image: Tensor) -> Tensor:
        """The image checked, and normalised if it is pixels."""
        if not isinstance(image, Tensor):  # a stand-in of torch.fx
            return instance("PVT_V2: image", image, _TENSORS, "a torch.Tensor")
        if not torch.jit.is_tracing():  # there sizes are recorded as they are computed, not compared
            self._check_size(image)
        if image.dtype == torch.uint8:
            if image.shape[1] != len(IMAGENET_MEAN):
                raise TypeError(
                    f"PVT_V2: image must be floating-point unless in_channels is {len(IMAGENET_MEAN)} (RGB), "
                    f"got {image.dtype} with in_channels {image.shape[1]}"
                )
            image = normalise(image, IMAGENET_MEAN, IMAGENET_STD).to(next(self.parameters()).dtype)
        return image

    def _check_dtype(self, image: Tensor) -> None:
        first = getattr(self.patch_embed1, "proj", None)
        weight = first._parameters.get("weight") if type(first) is nn.Conv2d else None
        if weight is not None and weight.dtype != image.dtype and products_now(image) is None:
            raise TypeError(
                f"PVT_V2: image must have the dtype of patch_embed1.proj.weight, {weight.dtype}, got {image.dtype}"
            )

    def _check_size(self, image: Tensor) -> None:
        channels = inputs_of(self._modules.get("patch_embed1"))
        if image.dim() != 4 or (channels is not None and image.shape[1] != channels):
            raise ValueError(
                f"PVT_V2: image must have shape (B, {'Cin' if channels is None else channels}, H, W), "
                f"got {tuple(image.shape)}"
            )
        try:
            self._config.map_sizes(image.shape[2], image.shape[3])
        except ValueError:
            if self._reduces_as_configured():
                raise

    def _reduces_as_configured(self) -> bool:
        """Are the convolutions that make a map smaller those of the configuration, in kernel, stride and padding?"""
        for stage in range(self._config.num_stages):
            embed, blocks = getattr(self, f"patch_embed{stage + 1}"), getattr(self, f"block{stage + 1}")
            (kernel, stride), ratio = self._config.patch(stage), self._config.sr_ratios[stage]
            found = [(embed, "proj", (kernel, stride, kernel // 2))]
            if not self._config.linear and ratio > 1:
                found += [(getattr(block, "attn", None), "sr", (ratio, ratio, 0)) for block in blocks]
            for owner, name, sides in found:
                convolution = getattr(owner, name, None)
                if not isinstance(convolution, nn.Conv2d):
                    return False
                now = (convolution.kernel_size, convolution.stride, convolution.padding)
                if now != tuple((side, side) for side in sides):
                    return False
        return True

    # -- the whole forward at once: what `graphs` asks ---------------------------------------------------------

    def forward_settings(self) -> tuple:
        """What the forward reads that is no module."""
        return (self._config, self.global_pool)

    def calls_its_own(self) -> bool:
        """Are the methods that `PVT_V2.forward` calls those of this class, not a subclass's or the instance's?"""
        kind, own = type(self), vars(self)
        return all(getattr(kind, name) is method and name not in own for name, method in _METHODS)

    def is_as_published(self) -> bool:
        """Is all that `PVT_V2.forward` calls of this class, and of the classes that it is made of?"""
        return self.calls_its_own() and all(
            _KNOWN.include(module) and "forward" not in vars(module)
            for child in self.children()
            for module in (child.children() if type(child) is nn.ModuleList else (child,))
        )

    def pieces(self, like: Tensor) -> list[Fused] | None:
        """What stands in for this model's modules now on an image like `like`, in the order of a forward; None unless
        that is every module.
        """
        if not self.global_pool or not self.is_as_published():
            return None
        count = 1 + sum(2 + len(getattr(self, f"block{n + 1}")) for n in range(self._config.num_stages))
        found = [(owner, stand_in.current(owner)) for owner, stand_in in self.stand_ins()]
        stands = all(fused is not None and fused.whole and not fused.obstacle(owner, like) for owner, fused in found)
        return [fused for _, fused in found] if stands and len(found) == count else None

    # -- what users expect; of timm more in `conventions` ------------------------------------------------------------

    def capture(self, example: Tensor) -> CapturedModel:
        """This model's forward as a CUDA graph, for images of the example's shape (B, in_channels, H, W) and dtype.

        The graph launches all kernels at once, which at small batches is most of the time: see `CapturedModel` for
        what it shares. Raises ValueError for an example that is not on a CUDA device, or a model in training mode.
        """
        return CapturedModel(self, example)

    def train(self, mode: bool = True) -> PVT_V2:
        """As `nn.Module.train`; packed weights are compared with the parameters at their next use."""
        packing.doubt()
        return super().train(mode)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep only each block's input, and recompute the block in the backward.

        Where a block runs on ops whose backward is fused, those keep no more than their two inputs anyway: the log says
        so, once.
        """
        self._checkpointing = flag("set_grad_checkpointing: enable", enable)
        if enable and (backend := self._fused_backward()) is not None:
            log_little_to_save(backend)

    def _fused_backward(self) -> str | None:
        """The backend on which the first block's gradients are fused, if they are."""
        block = next((module for module in self.modules() if isinstance(module, Block)), None)
        fused = None if block is None else block._fused.current(block)
        name = None if block is None or fused is None or not fused.whole else fused.backend(block)[0]
        return name if name is not None and {"attention", "mlp"} <= dispatch.load(name).backward.keys() else None

    def set_norm_eps(
        self, *, block: float | None = None, patch_embed: float | None = None, reduction: float | None = None
    ) -> None:
        """Change the epsilon of block and stage norms, of patch-embed norms, of spatial-reduction norms.

        Published implementations differ: official and timm have (1e-6, 1e-5, 1e-5), transformers 1e-6 throughout.
        None leaves a kind as it is. Raises ValueError or TypeError, and changes nothing, for what is no finite number
        of at least 0.
        """
        given = {"block": block, "patch_embed": patch_embed, "reduction": reduction}
        chosen = {
            kind: float(number(f"set_norm_eps: {kind}", eps, minimum=0))
            for kind, eps in given.items()
            if eps is not None
        }
        for kind, norm in self.named_norms():
            norm.eps = chosen.get(kind, norm.eps)

    def norm_eps(self) -> dict[str, float]:
        """The arguments of `set_norm_eps` that restore the epsilons; ValueError where norms of one kind differ."""
        found: dict[str, set[float]] = {}
        for kind, norm in self.named_norms():
            found.setdefault(kind, set()).add(norm.eps)
        for kind, values in found.items():
            if len(values) > 1:
                raise ValueError(f"norm_eps: model must have one epsilon for its {kind} norms, got {sorted(values)}")
        return {kind: values.pop() for kind, values in found.items()}

    def named_norms(self) -> Iterator[tuple[str, nn.LayerNorm]]:
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                kind = "patch_embed" if name.startswith("patch_embed") else "block"
                yield "reduction" if name.endswith("attn.norm") else kind, module

    def extra_repr(self) -> str:
        """The configuration."""
        fields = {name: getattr(self.config, name) for name in self.config.__dataclass_fields__}
        return ", ".join(f"{name}={value}" for name, value in fields.items()) + f", backend={self.backend!r}"


@cache
def log_little_to_save(backend: str) -> None:
    logger.info(
        "gradient checkpointing saves one map of two in each block on backend %r, and computes the block once more",
        backend,
    )


_METHODS = [
    (name, vars(PVT_V2)[name]) for name in ("forward_features", "forward_head", "_stage", "_prepare", "_on_map")
]
_KNOWN = Kinds((OverlapPatchEmbed, Block, nn.LayerNorm, nn.Linear))


# What torch.fx traces with stands for a tensor.
_TENSORS = (Tensor, torch.fx.Proxy)


def _layer_norm(norm_layer: Callable, dim: int) -> nn.LayerNorm:
    must = "PVT_V2: norm_layer must make an nn.LayerNorm with weight and bias"
    try:
        norm = norm_layer(dim)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{must} of a number of channels, got {shown(norm_layer)}, which raises: {error}") from error
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise TypeError(f"{must} (the kernels fuse it), got {shown(norm)}")
    if norm.normalized_shape != (dim,) or norm.weight.shape != (dim,) or norm.bias.shape != (dim,):
        raise ValueError(f"{must} of the {dim} channels that it is called with, got {shown(norm)}")
    if type(norm).forward is not nn.LayerNorm.forward or "forward" in vars(norm):
        raise TypeError(f"{must} and torch's forward, got {shown(norm)} with a forward of its own")
    number("PVT_V2: norm_layer's eps", norm.eps, minimum=0)
    return norm
