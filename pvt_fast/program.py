"""A model's whole forward as one call into C++.

For a small model on one image, Python's part of running it op by op is a tenth of the time and more. A `Program` is
recorded after such a forward, from the packed weights that it left in the layers' caches. It stands while nothing that
the forward read has changed: modules, parameters (the object, its address, its version), settings, hooks; `stands`
looks at all of them, in a fraction of the time that the ops' Python takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import _C
from .layers import Block, DWConvMLP, OverlapPatchEmbed, SpatialReductionAttention
from .prepack import PackCache, stamp, unchanged, usable

if TYPE_CHECKING:
    from .model import PVT_V2

# Of the first stage's map. Above it Python's part is nothing, and the maps' memory better goes back after the call.
_MOST_BYTES = 32 << 20

_LAYERS = (OverlapPatchEmbed, Block, SpatialReductionAttention, DWConvMLP)
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


class Program:
    """What `record` saw: the packed ops, and all that must still be so for them to be the model's forward."""

    def __init__(self, model: PVT_V2, isa: str, image: Tensor, caches: list[PackCache], forward: Any) -> None:
        self.isa, self.dtype, self.layout = isa, image.dtype, _layout(image)
        self.classes = model.config.num_classes
        self.ops = [cache.packed for cache in caches]  # alive while `forward` is
        self.of_graph = any(cache.of_graph for cache in caches)
        self.forward = forward
        modules = list(model.modules())
        entries = [vars(module)[kind] for module in modules for kind in ("_modules", "_parameters")]
        facts = [(entry, name, value) for entry in entries for name, value in entry.items()]
        for module in modules:
            names = [name for name in ("eps", "spec", "training") if name in vars(module)]
            facts += [(vars(module), name, vars(module)[name]) for name in names]
        layers = [vars(module) for module in modules if isinstance(module, _LAYERS)]
        facts += [(layer, "forward", None) for layer in layers]  # no layer has one of its own
        hooks = [layer[kind] for layer in layers for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self.tensors = tuple(model.parameters())
        self.stamps = tuple(stamp(tensor) for tensor in self.tensors)
        self.storages = [tensor.detach() for tensor in self.tensors]  # see PackCache
        self.kept = (facts, hooks)  # alive while `self.facts` is
        self.facts = _C.Facts(facts, [*hooks, *_GLOBAL_HOOKS], _lines(self.tensors))

    def stands(self, isa: str, image: Tensor) -> bool:
        """Would running op by op do the same?"""
        if isa != self.isa or image.dtype != self.dtype or _layout(image) != self.layout:
            return False
        return usable(self.of_graph) and self.facts.hold() and unchanged(self.tensors, self.tensors, self.stamps)

    def run(self, image: Tensor) -> Tensor:
        """image (B, Cin, H, W) -> logits (B, num_classes)."""
        batch, _, height, width = image.shape
        out = torch.empty((batch, self.classes), dtype=image.dtype)
        self.forward.run(image.data_ptr(), (batch, height, width), image.stride(), out.data_ptr())
        return out


def fits(model: PVT_V2, image: Tensor) -> bool:
    """Is `image` of a kind and size that programs are for?"""
    tokens = image.shape[0] * (image.shape[2] // 4) * (image.shape[3] // 4)
    small = tokens * model.config.embed_dims[0] * image.element_size() <= _MOST_BYTES
    return small and image.dtype in (torch.float32, torch.bfloat16) and _layout(image) is not None


def record(model: PVT_V2, isa: str, image: Tensor) -> Program | None:
    """The forward that has just run op by op on `image`, or None where it is more than its packed ops."""
    if model.training or not isinstance(model.head, nn.Linear):
        return None
    layers = [layer for layer in model.modules() if isinstance(layer, _LAYERS)]
    if any(type(layer) not in _LAYERS or "forward" in vars(layer) for layer in layers):
        return None
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return None
    config, stages, caches = model.config, [], []
    for stage in range(config.num_stages):
        embed = getattr(model, f"patch_embed{stage + 1}")
        blocks = [cache for block in getattr(model, f"block{stage + 1}") for cache in _caches(block)]
        norm = model._norm_caches[stage]
        sizes = (*config.patch(stage), config.embed_dims[stage])
        caches += [embed._cache, *blocks, norm]
        stages.append((embed._cache.packed, sizes, [cache.packed for cache in blocks], norm.packed))
    caches.append(model._head_cache)
    # weights that are computed at each forward (parametrizations, say) are packed at each forward
    parameters = {id(parameter) for parameter in model.parameters()}
    tensors = [tensor for cache in caches for tensor in cache.tensors if tensor is not None]
    if any(id(tensor) not in parameters for tensor in tensors):
        return None
    if any(cache.packed is None or cache.key[:2] != ("cpp", isa) for cache in caches):
        return None
    forward = _C.Forward(stages, model._head_cache.packed, image.dtype == torch.bfloat16)
    program = Program(model, isa, image, caches, forward)
    return program if program.stands(isa, image) else None


def _lines(tensors: tuple[Tensor, ...]) -> list[int]:
    """Addresses of the cache lines that `unchanged` reads: of each tensor its object, its C++ part and its storage."""
    regions = [((id(t), 64), (t._cdata, 256), (t.untyped_storage()._cdata, 128)) for t in tensors]
    return [start + at for regions_of in regions for start, size in regions_of for at in range(0, size, 64)]


def _caches(block: Block) -> tuple:
    return block.attn._cache, block.mlp._cache


def _layout(image: Tensor) -> str | None:
    """How the first op's weights are packed for this image; None where it is copied first."""
    strides = image.stride()
    if strides[1] == 1 and strides[3] == image.shape[1]:
        return "channels_last"
    return "rows" if strides[3] == 1 else None
