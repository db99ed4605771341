"""The compiled extension (csrc/bindings.cpp). Tensors are passed as spans of memory, which the caller keeps alive.

Raises ValueError where a span is shorter than what would be read or written.
"""

from collections.abc import Iterable, Sequence

_Span = tuple[int, int]  # address, and the bytes from there to the end of the memory
_Linear = tuple[_Span, _Span | None]  # weight, bias
_Norm = tuple[_Span, _Span, float]  # weight, bias, eps

def built_isas() -> list[str]: ...
def runnable_isas() -> list[str]: ...
def threads() -> int: ...

class DType:
    """The element type of an op's activations and weights."""

    f32: DType
    bf16: DType
    mixed: DType  # activations f32, the operands of products bf16

class PatchEmbed:
    def __init__(
        self,
        isa: str,
        dtype: DType,
        proj: _Linear,
        norm: _Norm,
        sizes: tuple[int, int, int, int],  # in_channels, channels, kernel, stride
        channels_last: bool,
    ) -> None: ...
    def run(
        self,
        image: _Span,
        size: tuple[int, int, int],  # batch, height, width
        strides: tuple[int, ...],  # in elements: batch, channel, row, column
        out: _Span,
    ) -> None: ...

class ResidualOp:
    def run(self, x: _Span, batch: int, height: int, width: int, residual_scale: _Span | None, out: _Span) -> None: ...

class LayerNorm:
    def __init__(self, isa: str, dtype: DType, weights: _Norm, channels: int) -> None: ...
    def run(self, x: _Span, rows: int, out: _Span) -> None: ...

class Head:
    def __init__(self, isa: str, dtype: DType, classifier: _Linear | None, channels: int, classes: int) -> None: ...
    def run(self, x: _Span, batch: int, tokens: int, out: _Span) -> None: ...

def attention(isa: str, dtype: DType, weights: dict) -> ResidualOp: ...
def mlp(isa: str, dtype: DType, weights: dict) -> ResidualOp: ...

# Of gradients that go nowhere the span is None. Those of weights are floats: a weight's, then its bias's, for each norm
# and linear of the op's weights.

class PatchEmbedGradients:
    def __init__(
        self,
        isa: str,
        dtype: DType,
        proj: _Linear,
        norm: _Norm,
        sizes: tuple[int, int, int, int],  # in_channels, channels, kernel, stride
        channels_last: bool,
    ) -> None: ...
    def run(
        self,
        image: _Span,
        size: tuple[int, int, int],
        strides: tuple[int, ...],
        grad_out: _Span,
        grad_image: _Span | None,  # dense, channels last where the image is packed so
        grads: Sequence[_Span | None],
    ) -> None: ...

class ResidualGradients:
    def run(
        self,
        x: _Span,
        batch: int,
        height: int,
        width: int,
        residual_scale: _Span | None,
        grad_out: _Span,
        grad_x: _Span | None,
        grads: Sequence[_Span | None],
    ) -> None: ...

class LayerNormGradients:
    def __init__(self, isa: str, dtype: DType, weights: _Norm, channels: int) -> None: ...
    def run(
        self, x: _Span, rows: int, grad_out: _Span, grad_x: _Span | None, grads: Sequence[_Span | None]
    ) -> None: ...

class HeadGradients:
    def __init__(self, isa: str, dtype: DType, classifier: _Linear | None, channels: int, classes: int) -> None: ...
    def run(
        self,
        x: _Span,
        batch: int,
        tokens: int,
        grad_out: _Span,
        grad_x: _Span | None,
        grads: Sequence[_Span | None],
    ) -> None: ...

def attention_gradients(isa: str, dtype: DType, weights: dict) -> ResidualGradients: ...
def mlp_gradients(isa: str, dtype: DType, weights: dict) -> ResidualGradients: ...

class AttributeSnapshot:
    def __init__(
        self,
        objects: Sequence[tuple[object, type, Sequence[tuple[str, object]]]],
        dicts: Sequence[tuple[dict, Sequence[tuple[str, object]]]],
        soon: Sequence[int],  # addresses of cache lines that are read after `holds`
    ) -> None: ...
    def holds(self, owner: object = None) -> bool: ...

class Watch:
    PARTS: int
    def __init__(self, regions: list[_Span]) -> None: ...
    def next(self) -> bool: ...
    def first_changed(self) -> int: ...

class Forward:
    in_channels: int
    classes: int
    def __init__(self, ops: Iterable[PatchEmbed | ResidualOp | LayerNorm | Head]) -> None: ...
    def run(self, image: _Span, size: tuple[int, int, int], strides: tuple[int, ...], out: _Span) -> None: ...
