"""The compiled extension (csrc/bindings.cpp). Tensors are passed as addresses; the caller keeps them alive."""

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
        sizes: tuple[int, int, int],  # in_channels, channels, kernel
        channels_last: bool,
    ) -> None: ...
    def run(
        self,
        image: int,
        size: tuple[int, int, int],  # batch, height, width
        strides: tuple[int, ...],  # in elements: batch, channel, row, column
        stride: int,
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
        entries: list[tuple[dict, str, object]],
        empty: list[dict],
        soon: list[int],  # addresses of cache lines that will be read after `hold`
    ) -> None: ...
    def hold(self) -> bool: ...

class Forward:
    def __init__(
        self,
        stages: list[tuple[PatchEmbed, tuple[int, int, int], list[ResidualOp], LayerNorm]],  # kernel, stride, channels
        head: Head,
        bf16: bool,
    ) -> None: ...
    def run(self, image: int, size: tuple[int, int, int], strides: tuple[int, ...], out: int) -> None: ...
