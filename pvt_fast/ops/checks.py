"""What must hold of the ops' arguments, derived from the shapes that the contract's tuples of weights declare.

Each `check_*` raises before anything is allocated or read: TypeError for a class or a dtype, ValueError for a shape, a
device or a number, as `op: argument must condition, got value`. A backend that reads memory asks for `plain` tensors
besides: strided ones of torch's own classes, whose memory holds all their values. Weights that it has `packed` were
checked then: of them only what tells the activations' sizes is looked at again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..arguments import MAX_INT, flag, integer
from ..config import conv_size
from .contract import (
    HW,
    PRODUCTS,
    AttentionSpec,
    AttentionWeights,
    Linear,
    MlpSpec,
    MlpWeights,
    Norm,
    PatchEmbedWeights,
    result_dtype,
    unfit_dtypes,
)
from .packing import available, extent, is_plain

Size = str | int  # the name of a size, or a number


class Operand(NamedTuple):
    """A tensor among an op's weights: field `field` of the norm or linear that is field `part`, or of the weights."""

    name: str
    part: int | None
    kind: type  # of the part
    field: int
    shape: tuple[Size, ...]
    optional: bool  # may the tensor be None?
    part_optional: bool = False  # may the whole part?


def _operands(name: str, part: int | None, shape: tuple[Size, ...], part_optional: bool = False) -> list[Operand]:
    """A norm's weight and bias, where there is one size, or a linear's, whose bias may be None."""
    kind, optional = (Norm, False) if len(shape) == 1 else (Linear, True)
    return [
        Operand(f"{name}.weight", part, kind, 0, shape, False, part_optional),
        Operand(f"{name}.bias", part, kind, 1, shape[:1], optional, part_optional),
    ]


def operands_of(weights: type) -> list[Operand]:
    """The operands a tuple of weights declares. TypeError for a field without a shape, which would go unchecked."""
    operands = []
    for part, (name, hint) in enumerate(get_type_hints(weights, include_extras=True).items()):
        kind, *shape = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not shape:
            raise TypeError(f"{weights.__name__}: {name} must be annotated with its shape, got {hint}")
        operands += _operands(f"w.{name}", part, tuple(shape), part_optional=NoneType in get_args(kind))
    return operands


OPERANDS: dict[str, list[Operand]] = {
    "patch_embed": operands_of(PatchEmbedWeights),
    "attention": operands_of(AttentionWeights),
    "mlp": operands_of(MlpWeights),
    "layer_norm": _operands("w", None, ("C",)),
    "head": _operands("w", None, ("classes", "C")),
}


# The norms and linears among an op's weights: (name, index or None, class, may it be None?).
PARTS = {
    op: list(dict.fromkeys((o.name.rpartition(".")[0], o.part, o.kind, o.part_optional) for o in operands))
    for op, operands in OPERANDS.items()
}


def forward_mode() -> bool:
    """Are forward-mode derivatives being taken, which only plain torch gives? It has no public name, so only here."""
    return forward_ad._current_level >= 0


def refuse_forward_mode(op: str) -> None:
    """NotImplementedError where the result would lack a derivative that is asked for."""
    if forward_mode():
        raise NotImplementedError(
            f"{op}: forward-mode derivatives must be taken of the reference's function or of a model, got a call of "
            "this op within them"
        )


def check_patch_embed(
    image: Tensor,
    w: PatchEmbedWeights,
    stride: int,
    products: torch.dtype | None = None,
    *,
    plain: bool = False,
    packed: bool = False,
) -> HW:
    """Check the arguments of `patch_embed`; return the size of the output map."""
    op = "patch_embed"
    _check_activations(op, "image", image, 4, "(B, Cin, H, W)", plain)
    _check_class(op, "w", w, PatchEmbedWeights)
    weight = _weight(op, "w.proj", w.proj, plain)
    _check_count(op, "stride", stride)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{op}: w.proj.weight must have shape (C, Cin, k, k), got {tuple(weight.shape)}")
    if image.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: image must have {weight.shape[1]} channels, got {image.shape[1]}")
    _check_dtypes(op, "image", image, weight, products)
    channels, in_channels, kernel, _ = weight.shape
    _check_weights(op, w, {"C": channels, "Cin": in_channels, "k": kernel}, "image", image, plain, packed, products)
    hw = (conv_size(image.shape[2], kernel, stride), conv_size(image.shape[3], kernel, stride))
    # not by min(), which a compiler takes for a comparison of sizes
    if any(size < 1 for size in (*image.shape[2:], *hw)):
        raise ValueError(
            f"{op}: image must give at least one token with a {kernel}x{kernel} kernel of stride {stride}, "
            f"got {image.shape[2]}x{image.shape[3]}"
        )
    return hw


def check_attention(
    x: Tensor,
    hw: HW,
    w: AttentionWeights,
    spec: AttentionSpec,
    scale: Tensor | None,
    products: torch.dtype | None = None,
    *,
    plain: bool = False,
    packed: bool = False,
) -> None:
    """Check the arguments of `attention`; scale: its `residual_scale`."""
    op = "attention"
    _check_class(op, "w", w, AttentionWeights)
    _check_class(op, "spec", spec, AttentionSpec)
    _check_tokens(op, x, hw, _weight(op, "w.q", w.q, plain), scale, products, plain)
    channels = x.shape[2]
    _check_count(op, "spec.num_heads", spec.num_heads)
    if channels % spec.num_heads:
        raise ValueError(f"{op}: channels must be divisible by num_heads = {spec.num_heads}, got {channels}")
    _check_number(op, "spec.scale", spec.scale)
    _check_flag(op, "spec.linear", spec.linear)
    _check_rate(op, "spec.attn_drop", spec.attn_drop)
    _check_rate(op, "spec.proj_drop", spec.proj_drop)
    if spec.linear and w.sr is None:
        raise ValueError(f"{op}: w.sr must be a 1x1 convolution in the linear form, got None")
    if (w.sr is None) != (w.sr_norm is None):
        raise ValueError(f"{op}: w.sr and w.sr_norm must be given together, got one of them")
    ratio = 1
    if w.sr is not None and not spec.linear:
        kernel = _weight(op, "w.sr", w.sr, plain)
        if kernel.dim() != 4:
            raise ValueError(f"{op}: w.sr.weight must have shape (C, C, R, R), got {tuple(kernel.shape)}")
        ratio = kernel.shape[2]
    _check_weights(op, w, {"C": channels, "2C": 2 * channels, "R": ratio}, "x", x, plain, packed, products)
    if min(hw) < ratio:
        raise ValueError(f"{op}: hw must be at least sr_ratio = {ratio} each way, got {hw}")


def check_mlp(
    x: Tensor,
    hw: HW,
    w: MlpWeights,
    spec: MlpSpec,
    scale: Tensor | None,
    products: torch.dtype | None = None,
    *,
    plain: bool = False,
    packed: bool = False,
) -> None:
    """Check the arguments of `mlp`; scale: its `residual_scale`."""
    op = "mlp"
    _check_class(op, "w", w, MlpWeights)
    _check_class(op, "spec", spec, MlpSpec)
    _check_flag(op, "spec.relu", spec.relu)
    _check_rate(op, "spec.drop", spec.drop)
    weight = _weight(op, "w.fc1", w.fc1, plain)
    _check_tokens(op, x, hw, weight, scale, products, plain)
    _check_weights(op, w, {"C": x.shape[2], "hidden": weight.shape[0]}, "x", x, plain, packed, products)


def check_layer_norm(x: Tensor, w: Norm, *, plain: bool = False, packed: bool = False) -> None:
    """Check the arguments of `layer_norm`. On CPUs, as torch's own does, it takes float32 weights with any x."""
    op = "layer_norm"
    _check_floating(op, "x", x, plain)
    _check_class(op, "w", w, Norm)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have a last dimension of channels, got a scalar")
    like = x
    if x.dtype in PRODUCTS and x.device.type == "cpu" and isinstance(w.weight, Tensor):
        like = w.weight if w.weight.dtype is torch.float32 and w.weight.device == x.device else x
    packed = packed and is_plain(w.weight) and _is_like(w.weight, like) and w.weight.shape == x.shape[-1:]
    _check_weights(op, w, {"C": x.shape[-1]}, "x", like, plain, packed)


def check_head(
    x: Tensor,
    w: Linear | None,
    products: torch.dtype | None = None,
    *,
    plain: bool = False,
    packed: bool = False,
) -> None:
    """Check the arguments of `head`."""
    op = "head"
    _check_activations(op, "x", x, 3, "(B, N, C)", plain)
    if w is None:
        if products is not None:
            _check_dtypes(op, "x", x, x, products)
        _check_sizes(op, "x", {"C": x.shape[2]})
        return
    weight = _weight(op, "w", w, plain)
    if weight.dim() != 2:
        raise ValueError(f"{op}: w.weight must have shape (classes, C), got {tuple(weight.shape)}")
    if products is not None:
        _check_dtypes(op, "x", x, weight, products)
    packed = packed and (products is not None or _is_like(weight, x)) and weight.shape[1] == x.shape[2]
    _check_weights(op, w, {"classes": weight.shape[0], "C": x.shape[2]}, "x", x, plain, packed, products)


def output_like(op: str, *arguments: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of an op's result, after a check of its arguments; of tensors without values, too."""
    x, w = arguments[0], arguments[1]
    shape, products = x.shape, None if op == "layer_norm" else arguments[-1]
    if op == "patch_embed":
        height, width = check_patch_embed(*arguments)
        shape = (x.shape[0], height * width, w.proj.weight.shape[0])
    elif op == "head":
        check_head(*arguments)
        shape = (x.shape[0], x.shape[2] if w is None else w.weight.shape[0])
    else:
        checks: dict[str, Callable] = {"attention": check_attention, "mlp": check_mlp, "layer_norm": check_layer_norm}
        checks[op](*arguments)
    return shape, result_dtype(op, x.device.type, x.dtype, products, classifies=w is not None)


def _check_weights(
    op: str,
    w: Any,
    sizes: dict[str, int],
    name: str,
    x: Tensor,
    plain: bool,
    packed: bool,
    products: torch.dtype | None = None,
) -> None:
    """Every operand must have its declared shape, and the dtype and device of the activations x, called `name`; with
    products the dtype of the first operand.

    packed: check only what the packed form depends on beside the weights' tensors, which were checked when they were
    packed.
    """
    _check_sizes(op, f"{name} and weights", sizes)
    for part_name, index, kind, optional in PARTS[op]:
        part = w if index is None else w[index]
        if part is None and optional:
            continue
        _check_class(op, part_name, part, kind)
        if kind is Norm:
            _check_number(op, f"{part_name}.eps", part.eps)
    if packed:
        return
    like, whose = x, f"{name}'s"
    for operand, index, _, field, shape, optional, part_optional in OPERANDS[op]:
        part = w if index is None else w[index]
        if part is None and part_optional:
            continue
        tensor = part[field]
        if tensor is None and optional:
            continue
        _check_tensor(op, operand, tensor, plain)
        if plain:
            _check_memory(op, operand, tensor)
        expected = tuple([size if isinstance(size, int) else sizes[size] for size in shape])
        if tensor.shape != expected:
            raise ValueError(f"{op}: {operand} must have shape {expected}, got {tuple(tensor.shape)}")
        if products is not None and like is x:
            like, whose = tensor, "the other weights'"
        if not _is_like(tensor, like):
            _check_like(op, operand, tensor, like, whose)


def _check_sizes(op: str, what: str, sizes: dict[str, int]) -> None:
    if any(size < 1 for size in sizes.values()):
        raise ValueError(f"{op}: {what} must have at least one element each way, got {sizes}")


def _check_tokens(
    op: str, x: Tensor, hw: HW, weight: Tensor, scale: Tensor | None, products: torch.dtype | None, plain: bool
) -> None:
    _check_activations(op, "x", x, 3, "(B, N, C)", plain)
    _check_dtypes(op, "x", x, weight, products)
    if not isinstance(hw, (tuple, list)) or len(hw) != 2:
        raise TypeError(f"{op}: hw must be two ints (H, W), got {hw!r}")
    for side in hw:
        _check_count(op, "hw", side)
    if x.shape[1] != hw[0] * hw[1]:
        raise ValueError(f"{op}: x must have H * W = {hw[0]} * {hw[1]} tokens, got {x.shape[1]}")
    if weight.dim() != 2 or x.shape[2] != weight.shape[1]:
        raise ValueError(f"{op}: x must have {weight.shape[-1]} channels, got {x.shape[2]}")
    if scale is not None:
        _check_floating(op, "residual_scale", scale, plain)
        if scale.shape != (x.shape[0],):
            raise ValueError(f"{op}: residual_scale must have shape (B,) = ({x.shape[0]},), got {tuple(scale.shape)}")
        _check_device(op, "residual_scale", scale, x, "x's")


def _check_activations(op: str, name: str, x: Tensor, rank: int, shape: str, plain: bool) -> None:
    _check_floating(op, name, x, plain)
    if x.dim() != rank:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(x.shape)}")


def _weight(op: str, name: str, linear: Any, plain: bool) -> Tensor:
    """The weight of a linear that tells an op's sizes."""
    _check_class(op, name, linear, Linear)
    _check_tensor(op, f"{name}.weight", linear.weight, plain)
    if linear.weight.dim() < 1:
        raise ValueError(f"{op}: {name}.weight must have dimensions, got a scalar")
    return linear.weight


def _check_class(op: str, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{op}: {name} must be a {kind.__name__}, got {_describe(value)}")


def _check_tensor(op: str, name: str, value: Any, plain: bool) -> None:
    _check_class(op, name, value, Tensor)
    if plain and not is_plain(value):
        raise TypeError(f"{op}: {name} must be a strided torch.Tensor, got {_describe(value)}")


def _check_memory(op: str, name: str, tensor: Tensor) -> None:
    """A storage may have been resized below its tensors."""
    if (needed := extent(tensor)) > (there := available(tensor)):
        raise ValueError(f"{op}: {name} must have {needed} bytes of memory, got {there}")


def _check_floating(op: str, name: str, x: Tensor, plain: bool) -> None:
    _check_tensor(op, name, x, plain)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must have a floating-point dtype, got {x.dtype}")
    if plain:
        refuse_forward_mode(op)
        _check_memory(op, name, x)


def _check_dtypes(op: str, name: str, x: Tensor, weight: Tensor, products: torch.dtype | None) -> None:
    """Activations x, called `name`, must go together with the weights."""
    if products is None:
        _check_like(op, name, x, weight, "the weights'")
        return
    if (reason := unfit_dtypes(op, x.device.type, x.dtype, weight.dtype, products)) is not None:
        raise TypeError(f"{op}: {reason}")
    _check_device(op, name, x, weight, "the weights'")


def _check_like(op: str, name: str, tensor: Tensor, other: Tensor, whose: str) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must have {whose} dtype {other.dtype}, got {tensor.dtype}")
    _check_device(op, name, tensor, other, whose)


def _is_like(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype is other.dtype and tensor.device == other.device


def _check_device(op: str, name: str, tensor: Tensor, other: Tensor, whose: str) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} must be on {whose} device {other.device}, got {tensor.device}")


def _check_count(op: str, name: str, value: Any) -> None:
    if isinstance(value, torch.SymInt):
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    elif type(value) is not int or not 1 <= value <= MAX_INT:  # without the words, at each call
        integer(f"{op}: {name}", value, minimum=1)


def _check_number(op: str, name: str, value: Any) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if isinstance(value, int) and value.bit_length() > 63:  # torch takes no longer ones
        raise ValueError(f"{op}: {name} must be a float or an int of 64 bits, got one of {value.bit_length()} bits")


def _check_flag(op: str, name: str, value: Any) -> None:
    if value is not True and value is not False:
        flag(f"{op}: {name}", value)


def _check_rate(op: str, name: str, value: Any) -> None:
    _check_number(op, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {value}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {'nested ' * value.is_nested}{type(value).__name__} of layout {value.layout}"
    return f"a {type(value).__name__}" if value is not None else "None"
