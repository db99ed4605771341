"""The contract between the model and its backends: weight tuples, op signatures, and what a backend is.

What must hold of arguments is in `checks`; `reference` is the specification of each op. Activations are channels-last
tokens `x (B, N, C)` of a map `hw = (H, W)`, `N = H * W`, row-major. Every op returns new tensors and changes no
argument.

    patch_embed(image, w, stride, products=None) -> (x, hw)
    attention(x, hw, w, spec, residual_scale=None, products=None) -> x'
    mlp(x, hw, w, spec, residual_scale=None, products=None) -> x'
    layer_norm(x, w) -> x'
    head(x, w, products=None) -> logits

Without `products` all tensors of a call but residual_scale have one dtype. With it they are what torch.autocast to that
dtype would find: "mixed precision" below. It is an argument and no state of the thread, as neither an opaque op of a
compiled graph nor a backward runs under the autocast of the call.

The grain is coarse on purpose: the gain of a fused backend is that the hidden map of the MLP (4-8 C wide), the
queries and the attention scores never reach memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

HW = tuple[int, int]

# The ops, in the order of a forward.
NAMES = ("patch_embed", "attention", "mlp", "layer_norm", "head")


class Norm(NamedTuple):
    """LayerNorm over the last dimension: `weight (C,)`, `bias (C,)`, `eps`."""

    weight: Tensor
    bias: Tensor
    eps: float


class Linear(NamedTuple):
    """A matrix or convolution kernel with its bias: `weight (Cout, Cin[, k, k])`, `bias (Cout,)` or None."""

    weight: Tensor
    bias: Tensor | None


# The weights of the ops. A field says which shape its `weight` has, by names of sizes that are the same within an op
# (of a norm, and of a bias, it is the first alone); `checks` holds every call to that.


class PatchEmbedWeights(NamedTuple):
    """`proj`: its padding is k // 2."""

    proj: Annotated[Linear, "C", "Cin", "k", "k"]
    norm: Annotated[Norm, "C"]


class AttentionWeights(NamedTuple):
    """`kv`: the C rows of K first. `sr` and `sr_norm` reduce the map that gives K and V: both None where R is 1; in the
    linear form R is 1 and both are present.
    """

    norm: Annotated[Norm, "C"]
    q: Annotated[Linear, "C", "C"]
    kv: Annotated[Linear, "2C", "C"]
    sr: Annotated[Linear | None, "C", "C", "R", "R"]
    sr_norm: Annotated[Norm | None, "C"]
    proj: Annotated[Linear, "C", "C"]


class MlpWeights(NamedTuple):
    """`fc1` and `fc2` are linear, with the depthwise 3x3 convolution `dwconv` between them."""

    norm: Annotated[Norm, "C"]
    fc1: Annotated[Linear, "hidden", "C"]
    dwconv: Annotated[Linear, "hidden", 1, 3, 3]
    fc2: Annotated[Linear, "C", "hidden"]


class AttentionSpec(NamedTuple):
    """`scale` multiplies the scores; `linear` pools the map to 7x7 and applies GELU before kv.

    The dropout rates are those in force now: 0 outside training.
    """

    num_heads: int
    scale: float
    linear: bool
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    @property
    def drops(self) -> bool:
        """Is a rate of dropout above 0?"""
        return self.attn_drop > 0 or self.proj_drop > 0


class MlpSpec(NamedTuple):
    """`relu` puts a ReLU between fc1 and the depthwise convolution (the linear variants)."""

    relu: bool
    drop: float = 0.0

    @property
    def drops(self) -> bool:
        """Is a rate of dropout above 0?"""
        return self.drop > 0


# -- mixed precision ---------------------------------------------------------------------------------------------------
#
# With `products`, bfloat16 or float16: activations are float32 or of that dtype; parameters have one dtype among
# themselves, any of these three (float32 where an optimizer has them). Operands of matrix products and
# convolutions are rounded to `products`, or kept more precise; sums are float32, and so are norms. The result has
# `result_dtype`: what torch's own modules give under torch.autocast, whose rules depend on the type of device.

PRODUCTS = (torch.bfloat16, torch.float16)


def norms_give_float32(device: str) -> bool:
    """Does autocast let LayerNorm read and write float32? On CPUs it writes what it reads, with float32 parameters."""
    return device != "cpu"


def result_dtype(op: str, device: str, x: torch.dtype, products: torch.dtype | None, classifies: bool = True) -> Any:
    """The dtype of what an op returns for activations of dtype x. classifies: of `head`, whether it has weights."""
    if products is None or op == "layer_norm" or not classifies:
        return x
    if op == "head":
        return products
    if op == "patch_embed":
        return torch.float32 if norms_give_float32(device) else products
    return torch.promote_types(x, products)


def unfit_dtypes(op: str, device: str, x: torch.dtype, weights: torch.dtype, products: torch.dtype) -> str | None:
    """Why an op cannot run on activations x and parameters of these dtypes, as its argument, what that must be and what
    it is; None where it can. For `layer_norm`, which takes no products: whether torch's own could under this autocast.
    """
    if products not in PRODUCTS:
        return f"products must be torch.bfloat16 or torch.float16, got {products}"
    name = "image" if op == "patch_embed" else "x"
    if x not in (torch.float32, products):
        return f"{name} must be torch.float32 or {products} as the products, got {x}"
    if weights not in (torch.float32, *PRODUCTS):
        return f"w must be torch.float32, torch.bfloat16 or torch.float16 beside products, got {weights}"
    if op == "head" or (norms_give_float32(device) and op != "layer_norm"):
        return None
    normed = torch.float32 if norms_give_float32(device) else products if op == "patch_embed" else x
    if weights not in (torch.float32, normed):
        return f"w must be torch.float32, or of the dtype {normed} that its norms read, got {weights}"
    return None


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here, or not on this input; the message says why."""


class BackendMisconfigured(BackendUnavailable):
    """A setting asks of a backend what this machine cannot do: "auto" does not pass over it."""


class Facts(NamedTuple):
    """All that a choice of backend may look at."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype
    dropout: bool = False  # a dropout rate above 0 is in force
    products: torch.dtype | None = None  # under autocast: to which


class WholeForward(NamedTuple):
    """How a backend runs a model's ops in one call.

    variant(): what packed ops depend on beside their weights (an instruction set); link(packed ops in the order of a
    forward) -> an object with their `run` and number of `classes`, see `_C.Forward`.
    """

    variant: Callable[[], str]
    link: Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Support:
    """Where a backend's ops run: `Backend.unsupported` answers by it, and so does each op that is called by itself.

    dtypes: those of activations and weights; None: any, and with dropout and under autocast, too.
    products: those of mixed precision.
    device(type): why they do not run on a type of device ("cpu", "cuda"), or None where they do.
    """

    name: str  # of the backend
    dtypes: tuple[torch.dtype, ...] | None = None
    device: Callable[[str], str | None] = lambda device: None
    products: tuple[torch.dtype, ...] = ()

    def refusal(self, facts: Facts) -> str | None:
        """Why these facts cannot run, or None."""
        if (reason := self.device(facts.device)) is not None or self.dtypes is None:
            return reason
        if facts.dtype not in self.dtypes:
            return f"it takes {_listed(self.dtypes)}, got {facts.dtype}"
        if facts.dropout:
            return "it has no dropout; training with drop_rate or attn_drop_rate above 0 runs on the reference"
        if facts.products is not None and facts.products not in self.products:
            if not self.products:
                return "autocast is on; cast the model instead, with model.to(torch.bfloat16)"
            return f"under autocast it takes {_listed(self.products)}, got {facts.products}"
        return None

    def require(
        self,
        op: str,
        device: str,
        dtype: torch.dtype,
        spec: AttentionSpec | MlpSpec | None = None,
        products: torch.dtype | None = None,
    ) -> None:
        """BackendUnavailable, as `op`, unless that runs on activations of this kind with this spec and products."""
        reason = self.refusal(Facts(device, dtype, spec is not None and spec.drops, products))
        if reason is not None:
            raise BackendUnavailable(f"{op}: {cannot_run(self.name, reason)}")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} and {last}" if others else last


# gradients(grad_output, needed, *arguments of the op, with its products) -> one for each of `tensors_in(arguments)`,
# None where not needed, with its strides and dtype. It is not asked for that of a residual_scale.
Backward = Callable[..., Sequence[Tensor | None]]


@dataclass(frozen=True)
class Backend:
    """A backend: where it runs, and its ops.

    backward: gradients (`Backward`) by the name of an op; those of other ops are the reference's.
    whole: how it runs all ops of a model in one call, if it can.
    """

    support: Support
    patch_embed: Callable[..., tuple[Tensor, HW]]
    attention: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    layer_norm: Callable[[Tensor, Norm], Tensor]
    head: Callable[..., Tensor]
    backward: Mapping[str, Backward] = field(default_factory=dict)
    whole: WholeForward | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a backward of what is no op, which would never be called."""
        for name in self.backward:
            if name not in NAMES:
                raise ValueError(f"Backend: backward must name ops ({', '.join(NAMES)}), got {name!r}")

    @property
    def name(self) -> str:
        return self.support.name

    def unsupported(self, facts: Facts) -> str | None:
        """Why these facts cannot run here, or None."""
        return self.support.refusal(facts)


def cannot_run(name: str, reason: object) -> BackendUnavailable:
    """The error of a backend that was asked for by name."""
    return BackendUnavailable(f"backend {name!r} cannot run: {reason}")


def map_tensors(arguments: Any, transform: Callable[[Tensor], Any]) -> Any:
    """The same nested tuples with `transform(tensor)` for every tensor in them."""
    if isinstance(arguments, Tensor):
        return transform(arguments)
    if isinstance(arguments, tuple):
        items = [map_tensors(item, transform) for item in arguments]
        return type(arguments)(*items) if hasattr(arguments, "_fields") else tuple(items)
    return arguments


def tensors_in(arguments: Any) -> list[Tensor]:
    """All tensors in nested tuples, in order."""
    found: list[Tensor] = []
    map_tensors(arguments, found.append)
    return found


def to_map(x: Tensor, hw: HW) -> Tensor:
    """Tokens (B, N, C) seen as a map (B, C, H, W) with channels-last strides; no copy."""
    return x.unflatten(1, hw).permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Tensor:
    """A map (B, C, H, W) seen as tokens (B, N, C); no copy when its strides are channels-last."""
    return image.flatten(2).transpose(1, 2)
