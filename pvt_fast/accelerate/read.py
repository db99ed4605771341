"""Reads a block by its layout: its halves as the contract's ops, or a `Refusal` that names what stands against it.

Only modules whose whole state is a weight and a bias are taken, in plain tensors: a parametrized, quantised or wrapped
linear (weight norm, LoRA) is refused. A module whose purpose is unknown is refused too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy

from ..config import LINEAR_POOL_SIZE
from ..ops import PLAIN
from .block_names import AttentionNames, MlpNames, Refusal, at, first
from .guard import Dropout, attention_configs, definitions, methods_of, own_attention, unseen_change
from .halves import AttentionHalf, MlpHalf, Part

# Packages whose modules are what they are called, beside those that the block is from: of others, and of users, a
# forward may do more than a trial shows.
_PACKAGES = ("torch", "timm", "transformers", "mmcv", "mmengine", "mmdet", "mmseg", "segmentation_models_pytorch")


def read_attention(block: nn.Module, names: AttentionNames) -> AttentionHalf:
    """Raises Refusal."""
    _require(block, names.required)
    if attention := own_attention(attention_configs(at(block, names.module).modules())):
        raise Refusal(f"{names.module} computes its attention by a function of its own, {attention!r}")
    norm = _norm(block, names.norm)
    channels = norm.shapes[0][0]
    if names.in_proj:
        qkv: tuple[Part, ...] = (_in_proj(block, names.in_proj, channels),)
    else:
        rows = 2 * channels // len(names.kv)
        qkv = (_linear(block, names.q, channels, channels), *(_linear(block, n, rows, channels) for n in names.kv))
        if len({part.tensors()[1] is None for part in qkv[1:]}) > 1:
            raise Refusal(f"{' and '.join(names.kv)} must both have a bias or both none")
    pool = at(block, names.pool)
    sr, sr_norm = _reduction(block, names, channels, linear=pool is not None)
    if pool is not None:
        if (
            sr is None
            or not isinstance(pool, nn.AdaptiveAvgPool2d)
            or _pair(pool.output_size) != (LINEAR_POOL_SIZE,) * 2
        ):
            raise Refusal(
                f"{names.pool} must average to {LINEAR_POOL_SIZE}x{LINEAR_POOL_SIZE} before {names.sr}, got {pool}"
            )
        _require_like(at(block, names.act), F.gelu, names.act, "the exact GELU")
    elif (act := at(block, names.act)) is not None:
        raise Refusal(f"{names.act} must be left out without {names.pool}, got {act}")
    heads = _attribute(block, names.heads, int)
    if channels % getattr(*heads):
        raise Refusal(f"{names.heads} must divide the {channels} channels, got {getattr(*heads)}")
    scale = _attribute(block, names.scale, float) if names.scale else None
    half = AttentionHalf(
        norm, qkv, _linear(block, names.proj, channels, channels), sr, sr_norm, heads, scale, pool is not None
    )
    _refuse_the_unknown(block, names, half.parts, [pool, at(block, names.act)])
    return half


def read_mlp(block: nn.Module, names: MlpNames) -> MlpHalf:
    """Raises Refusal."""
    _require(
        block, (*names.required, " or ".join(names.dwconv)) if first(block, names.dwconv) is None else names.required
    )
    norm = _norm(block, names.norm)
    channels = norm.shapes[0][0]
    kind = type(at(block, names.fc1))
    matrix = _pointwise if issubclass(kind, nn.Conv2d) else _linear
    fc1 = matrix(block, names.fc1, None, channels)
    hidden = fc1.shapes[0][0]
    fc2 = matrix(block, names.fc2, channels, hidden)
    conv = first(block, names.dwconv)
    where = names.dwconv[0]
    dwconv = _part(conv, where, (nn.Conv2d,), (hidden, 1, 3, 3))
    _require_conv(conv, where, stride=1, padding=1, groups=hidden)
    _require_like(at(block, names.act), F.gelu, names.act, "the exact GELU")
    relu = at(block, names.relu)
    if relu is not None:
        _require_like(relu, F.relu, names.relu, "ReLU or nothing")
    half = MlpHalf(norm, fc1, dwconv, fc2, relu is not None)
    _refuse_the_unknown(block, names, half.parts, [at(block, names.act), relu])
    return half


def read_embed(embed: nn.Module, proj: str, norm: str) -> tuple[Part, Part]:
    """The convolution and the norm of a patch embed. Raises Refusal."""
    conv, after = _part(at(embed, proj), proj, (nn.Conv2d,), (None,) * 4), read_norm(embed, norm)
    channels, _, *kernel = conv.shapes[0]
    if kernel[0] != kernel[1] or channels != after.shapes[0][0]:
        raise Refusal(f"{proj} must have a square kernel and {norm}'s channels, got {conv.module}")
    _require_conv(conv.module, proj, stride=_pair(conv.module.stride)[0], padding=kernel[0] // 2, groups=1)
    return conv, after


def read_norm(owner: nn.Module, path: str) -> Part:
    """A LayerNorm. Raises Refusal."""
    return _norm(owner, path)


def read_head(owner: nn.Module, path: str) -> Part:
    """A linear. Raises Refusal."""
    return _part(at(owner, path), path, (nn.Linear,), (None, None))


def dropouts(block: nn.Module, names: AttentionNames | MlpNames) -> list[tuple[nn.Module, str]]:
    """(module, name of its attribute) of every dropout rate in this half."""
    found = [(module, "p") for module in _leaves(block, names) if isinstance(module, Dropout)]
    return found + [_attribute(block, path, float) for path in getattr(names, "rates", ())]


def drop_path(block: nn.Module, names: AttentionNames | MlpNames) -> nn.Module | None:
    """The module of this half's stochastic depth, if it has one."""
    module = first(block, names.drop_path)
    if module is None or isinstance(module, Dropout):
        return None
    if not isinstance(getattr(module, "drop_prob", None), (int, float)):
        raise Refusal(f"{names.drop_path[-1]} must be stochastic depth with a drop_prob, got {type(module).__name__}")
    return module


def roots(block: nn.Module, names: AttentionNames | MlpNames) -> tuple[str, ...]:
    """Names of the block's children that this half is made of."""
    paths = (names.norm, names.module, *names.after, *names.drop_path)
    return tuple(dict.fromkeys(name for path in paths if block._modules.get(name := path.split(".")[0]) is not None))


def _leaves(block: nn.Module, names: AttentionNames | MlpNames) -> Iterator[nn.Module]:
    for root in roots(block, names):
        yield from (module for module in getattr(block, root).modules() if not module._modules)


def _refuse_the_unknown(block: nn.Module, names: AttentionNames | MlpNames, parts: Any, others: list[Any]) -> None:
    known = {id(module) for module in (*(part.module for part in parts), *others, drop_path(block, names))}
    found = {
        path: module for root in roots(block, names) for path, module in getattr(block, root).named_modules(prefix=root)
    }
    # what leads to the parts is tried out with the block
    above = {path.rpartition(".")[0] for path, module in found.items() if id(module) in known}
    above |= {path[:end] for path in above for end, letter in enumerate(path) if letter == "."}
    packages = {*_PACKAGES, *(kind.__module__.partition(".")[0] for kind in type(block).__mro__)}
    packages |= {package for path in above & found.keys() for package in _packages(found[path])}
    for path, module in found.items():
        own = any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))
        passive = bool(module._modules) or isinstance(module, (nn.Identity, Dropout))
        if id(module) not in known and (own or not passive):
            raise Refusal(f"{path} is of an unknown purpose, {type(module).__name__}")
        if path not in above and not _packages(module) <= packages:
            raise Refusal(f"{path} has methods of another package's, {type(module).__name__}")
        _require_seen(module, path)


def _packages(module: nn.Module) -> set[str]:
    """Where what runs in a call of the module is defined."""
    kind = type(module)
    methods = (method for name in methods_of(kind) for _, method in definitions(kind, name) if callable(method))
    return {str(getattr(method, "__module__", None) or "torch").partition(".")[0] for method in methods}


def require_nothing_else(block: nn.Module, *halves: AttentionNames | MlpNames) -> None:
    """The block itself must have nothing beside its halves that its forward may use. Raises Refusal."""
    if (what := unseen_change(block)) is not None:
        raise Refusal(f"it reads what may change unseen, {what}")
    known = {root for names in halves for root in roots(block, names)}
    for name, module in block._modules.items():
        if module is not None and name not in known:
            raise Refusal(f"{name} is of an unknown purpose, {type(module).__name__}")
    for name in (*block._parameters, *block._buffers):
        raise Refusal(f"{name} is of an unknown purpose, a tensor of the block's own")


def _require_seen(module: nn.Module, where: str) -> None:
    if (what := unseen_change(module)) is not None:
        raise Refusal(f"{where} reads what may change unseen, {what}")


def _require(block: nn.Module, paths: tuple[str, ...]) -> None:
    missing = [path for path in paths if at(block, path) is None]
    if missing:
        raise Refusal(f"it has no {', '.join(missing)}")


def _part(module: Any, where: str, kinds: tuple[type[nn.Module], ...], shape: tuple[int | None, ...]) -> Part:
    """The weights of `module`, one of `kinds` with a weight of that shape (None: any) and nothing else."""
    if (
        not isinstance(module, kinds)
        or set(module._parameters) != {"weight", "bias"}
        or module._modules
        or module._buffers
        or any(hasattr(type(module), name) for name in module._parameters)
    ):
        raise Refusal(f"{where} must be a plain {kinds[0].__name__}, got {type(module).__name__}")
    _require_seen(module, where)
    if is_lazy(module._parameters["weight"]):  # type: ignore[arg-type]
        raise Refusal(f"{where} has no shape yet")
    part = Part.of(module)
    weight = part.tensors()[0]
    if type(weight) not in PLAIN or not weight.is_floating_point():
        raise Refusal(f"{where} must have a floating-point parameter as weight, got {type(weight).__name__}")
    got = part.shapes[0]
    if len(got) != len(shape) or any(want not in (None, size) for want, size in zip(shape, got, strict=True)):
        raise Refusal(f"{where} must have a weight of shape {_shown(shape)}, got {_shown(got)}")
    return part


def _norm(block: nn.Module, path: str) -> Part:
    norm = at(block, path)
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise Refusal(f"{path} must be a LayerNorm with weight and bias, got {type(norm).__name__}")
    part = _part(norm, path, (nn.LayerNorm,), (None,))
    if tuple(norm.normalized_shape) != part.shapes[0]:
        raise Refusal(f"{path} must normalise its weight's shape {_shown(part.shapes[0])}, got {norm.normalized_shape}")
    return part


def _linear(block: nn.Module, path: str, rows: int | None, columns: int) -> Part:
    return _part(at(block, path), path, (nn.Linear,), (rows, columns))


def _pointwise(block: nn.Module, path: str, rows: int | None, columns: int) -> Part:
    part = _part(at(block, path), path, (nn.Conv2d,), (rows, columns, 1, 1))
    _require_conv(part.module, path, stride=1, padding=0, groups=1)
    return part


def _in_proj(block: nn.Module, path: str, channels: int) -> Part:
    attention = at(block, path)
    shapes = (3 * channels, channels)
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
        raise Refusal(f"{path} must be an nn.MultiheadAttention with in_proj_weight, got {type(attention).__name__}")
    if type(attention.in_proj_weight) not in PLAIN or tuple(attention.in_proj_weight.shape) != shapes:
        raise Refusal(f"{path} must have a parameter in_proj_weight of shape {_shown(shapes)}")
    if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
        raise Refusal(f"{path} must be without bias_k, bias_v and add_zero_attn")
    return Part.of(attention, ("in_proj_weight", "in_proj_bias"))


def _reduction(block: nn.Module, names: AttentionNames, channels: int, linear: bool) -> tuple[Part | None, Part | None]:
    conv = at(block, names.sr)
    if conv is None:
        return None, None
    sr = _part(conv, names.sr, (nn.Conv2d,), (channels, channels, None, None))
    ratio = sr.shapes[0][2]
    if sr.shapes[0][3] != ratio or (linear and ratio != 1):
        raise Refusal(f"{names.sr} must have a {'1x1' if linear else 'square'} kernel, got {conv.kernel_size}")
    _require_conv(conv, names.sr, stride=ratio, padding=0, groups=1)
    return sr, _norm(block, names.sr_norm)


def _require_conv(conv: Any, where: str, stride: int, padding: int, groups: int) -> None:
    got = (_pair(conv.stride), conv.padding if conv.padding == "same" else _pair(conv.padding))
    padded = got[1] == (padding, padding) or (got[1] == "same" and padding == 1)
    plain = conv.groups == groups and _pair(conv.dilation) == (1, 1) and conv.padding_mode == "zeros"
    if got[0] != (stride, stride) or not padded or not plain:
        raise Refusal(f"{where} must have stride {stride}, zero padding of {padding} and {groups} groups, got {conv}")


def _attribute(block: nn.Module, path: str, kind: type) -> tuple[nn.Module, str]:
    """Where the number at `path` is kept, to be read at every call."""
    owner, _, name = path.rpartition(".")
    module = at(block, owner)
    value = getattr(module, name, None)
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise Refusal(f"{path} must be a plain {kind.__name__}, got {type(value).__name__}")
    return module, name


def _require_like(act: Any, expected: Callable, where: str, what: str) -> None:
    """`act`, a module or a function, must do what `expected` does: tried out, as peers have classes of their own."""
    known = {F.gelu: nn.GELU, F.relu: nn.ReLU}[expected]  # nothing to try out
    if act is expected or (type(act) is known and getattr(act, "approximate", "none") == "none"):
        return
    grid = torch.linspace(-6, 6, 193, dtype=torch.float64, device="cpu")
    state = isinstance(act, nn.Module) and any(True for _ in (*act.parameters(), *act.buffers()))
    if not callable(act) or state:
        raise Refusal(f"{where} must be {what}, got {act!r}")
    forward = act.forward if isinstance(act, nn.Module) else act  # hooks are not to see this
    with torch.no_grad():
        same = torch.allclose(forward(grid.clone()), expected(grid), rtol=0, atol=1e-6)
    if not same:
        raise Refusal(f"{where} must be {what}, got {act!r}")


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _shown(shape: tuple[int | None, ...]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)
