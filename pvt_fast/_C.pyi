"""The compiled extension (csrc/bindings.cpp). Tensors are passed as addresses; the caller keeps them alive."""

from collections.abc import Sequence

_Linear = tuple[int, int]  # addresses of weight and bias, 0 for none
_Norm = tuple[int, int, float]  # addresses of weight and bias, eps

def built_isas() -> list[str]: ...
def runnable_isas() -> list[str]: ...
def threads() -> int: ...

class PatchEmbed:
    def __init__(
        self,
        isa: str,
        bf16: bool,
        proj: _Linear,
        norm: _Norm,
        sizes: tuple[int, int, int, int],  # in_channels, channels, kernel, stride
        channels_last: bool,
    ) -> None: ...
    def run(
        self,
        image: int,
        size: tuple[int, int, int],  # batch, height, width
        strides: tuple[int, ...],  # in elements: batch, channel, row, column
        out: int,
    ) -> None: ...

class ResidualOp:
    def run(self, x: int, batch: int, height: int, width: int, residual_scale: int, out: int) -> None: ...

class LayerNorm:
    def __init__(self, isa: str, bf16: bool, weights: _Norm, channels: int) -> None: ...
    def run(self, x: int, rows: int, out: int) -> None: ...

class Head:
    def __init__(self, isa: str, bf16: bool, classifier: _Linear, channels: int, classes: int) -> None: ...
    def run(self, x: int, batch: int, tokens: int, out: int) -> None: ...

def attention(isa: str, bf16: bool, weights: dict) -> ResidualOp: ...
def mlp(isa: str, bf16: bool, weights: dict) -> ResidualOp: ...

class Facts:
    def __init__(
        self,
        objects: Sequence[tuple[object, type, Sequence[tuple[str, object]]]],
        dicts: Sequence[tuple[dict, Sequence[tuple[str, object]]]],
        soon: Sequence[int],  # addresses of cache lines that are read after `hold`
    ) -> None: ...
    def hold(self, given: object = None) -> bool: ...

class Watch:
    PARTS: int
    def __init__(self, regions: list[tuple[int, int]]) -> None: ...  # addresses and bytes
    def next(self) -> bool: ...
    def first_changed(self) -> int: ...

class Forward:
    in_channels: int
    classes: int
    def __init__(self, ops: list[PatchEmbed | ResidualOp | LayerNorm | Head], bf16: bool) -> None: ...
    def run(self, image: int, size: tuple[int, int, int], strides: tuple[int, ...], out: int) -> None: ...
