"""The parameter names of the published PVT v2 implementations, and the way between them.

Every layout holds the same numbers. They differ in names, and in three places in shape: transformers keeps keys and
values apart, mmdet stacks queries, keys and values, and writes the linears of the MLP as 1x1 convolutions.

Sources: the official repository, timm 1.0.31, transformers 5.23, mmdet 3.3 (mmseg has the same).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import INNER_NORM_EPS, VARIANT_NORM_EPS
from .files import is_expanded, printable, require_values

# Official name of a module: its name in the layout. {s} counts stages from 1, {i} from 0, {j} blocks from 0.
# "attn.k", "attn.v" and "attn.qkv" are not official: they are rows of "attn.q" and "attn.kv" (see `_split`, `_join`).
_TIMM = {
    "patch_embed{s}.proj": "stages.{i}.downsample.proj",  # of the first stage: patch_embed.proj, see `_TIMM_STEM`
    "patch_embed{s}.norm": "stages.{i}.downsample.norm",
    "block{s}.{j}.norm1": "stages.{i}.blocks.{j}.norm1",
    "block{s}.{j}.norm2": "stages.{i}.blocks.{j}.norm2",
    "block{s}.{j}.attn.q": "stages.{i}.blocks.{j}.attn.q",
    "block{s}.{j}.attn.kv": "stages.{i}.blocks.{j}.attn.kv",
    "block{s}.{j}.attn.proj": "stages.{i}.blocks.{j}.attn.proj",
    "block{s}.{j}.attn.sr": "stages.{i}.blocks.{j}.attn.sr",
    "block{s}.{j}.attn.norm": "stages.{i}.blocks.{j}.attn.norm",
    "block{s}.{j}.mlp.fc1": "stages.{i}.blocks.{j}.mlp.fc1",
    "block{s}.{j}.mlp.dwconv.dwconv": "stages.{i}.blocks.{j}.mlp.dwconv",
    "block{s}.{j}.mlp.fc2": "stages.{i}.blocks.{j}.mlp.fc2",
    "norm{s}": "stages.{i}.norm",
    "head": "head",
}
_TRANSFORMERS = {
    "patch_embed{s}.proj": "encoder.layers.{i}.patch_embedding.proj",
    "patch_embed{s}.norm": "encoder.layers.{i}.patch_embedding.layer_norm",
    "block{s}.{j}.norm1": "encoder.layers.{i}.blocks.{j}.layer_norm_1",
    "block{s}.{j}.norm2": "encoder.layers.{i}.blocks.{j}.layer_norm_2",
    "block{s}.{j}.attn.q": "encoder.layers.{i}.blocks.{j}.attention.query",
    "block{s}.{j}.attn.k": "encoder.layers.{i}.blocks.{j}.attention.key",
    "block{s}.{j}.attn.v": "encoder.layers.{i}.blocks.{j}.attention.value",
    "block{s}.{j}.attn.proj": "encoder.layers.{i}.blocks.{j}.attention.proj",
    "block{s}.{j}.attn.sr": "encoder.layers.{i}.blocks.{j}.attention.spatial_reduction",
    "block{s}.{j}.attn.norm": "encoder.layers.{i}.blocks.{j}.attention.layer_norm",
    "block{s}.{j}.mlp.fc1": "encoder.layers.{i}.blocks.{j}.mlp.dense1",
    "block{s}.{j}.mlp.dwconv.dwconv": "encoder.layers.{i}.blocks.{j}.mlp.dwconv.dwconv",
    "block{s}.{j}.mlp.fc2": "encoder.layers.{i}.blocks.{j}.mlp.dense2",
    "norm{s}": "encoder.layers.{i}.layer_norm",
    "head": "classifier",
}
_MMDET = {
    "patch_embed{s}.proj": "layers.{i}.0.projection",
    "patch_embed{s}.norm": "layers.{i}.0.norm",
    "block{s}.{j}.norm1": "layers.{i}.1.{j}.norm1",
    "block{s}.{j}.norm2": "layers.{i}.1.{j}.norm2",
    "block{s}.{j}.attn.qkv": "layers.{i}.1.{j}.attn.attn.in_proj_{leaf}",
    "block{s}.{j}.attn.proj": "layers.{i}.1.{j}.attn.attn.out_proj",
    "block{s}.{j}.attn.sr": "layers.{i}.1.{j}.attn.sr",
    "block{s}.{j}.attn.norm": "layers.{i}.1.{j}.attn.norm",
    "block{s}.{j}.mlp.fc1": "layers.{i}.1.{j}.ffn.layers.0",
    "block{s}.{j}.mlp.dwconv.dwconv": "layers.{i}.1.{j}.ffn.layers.1",
    "block{s}.{j}.mlp.fc2": "layers.{i}.1.{j}.ffn.layers.4",
    "norm{s}": "layers.{i}.2",
}
_TIMM_STEM = ("stages.0.downsample.", "patch_embed.")

_MIXED_EPS = {"block": VARIANT_NORM_EPS, "patch_embed": INNER_NORM_EPS, "reduction": INNER_NORM_EPS}


class Layout(NamedTuple):
    """One implementation's parameters.

    `names`: official module names to its own; None for the official ones. `sentinel`: a parameter that tells the
    layout. `root`: the submodule that holds all but the head. `norm_eps`: the arguments of `PVT_V2.set_norm_eps`
    that give the implementation's epsilons.
    """

    name: str
    names: Mapping[str, str] | None
    sentinel: str
    root: str
    norm_eps: Mapping[str, float]


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("official", None, "patch_embed1.proj.weight", "", _MIXED_EPS),
        Layout("timm", _TIMM, "stages.0.blocks.0.attn.q.weight", "", _MIXED_EPS),
        Layout(
            "transformers",
            _TRANSFORMERS,
            "encoder.layers.0.patch_embedding.proj.weight",
            "pvt_v2.",
            dict.fromkeys(_MIXED_EPS, 1e-6),
        ),
        Layout("mmdet", _MMDET, "layers.0.0.projection.weight", "", dict.fromkeys(_MIXED_EPS, 1e-6)),
    )
}

# What torch.compile and the wrappers of distributed training put into names, at any depth.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Official(NamedTuple):
    """A checkpoint under official names.

    `state`: the tensors; `sources`: for each the names it had. `unexpected`: names that belong to no PVT v2.
    `outside`: names not under the prefix where the PVT v2 lies, such as those of a detector's neck and heads.
    """

    layout: Layout
    state: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    unexpected: tuple[str, ...]
    outside: tuple[str, ...]


def to_official(source: Mapping[str, Tensor]) -> Official:
    """A state dict of any layout, under any prefix, by official names; tensors are views where they can be.

    Raises ValueError where no PVT v2 is recognised, or more than one.
    """
    originals = {_WRAPPERS.sub("", name): name for name in source}
    if len(originals) != len(source):
        raise ValueError(
            f"load_weights: source must name each parameter once, got {len(source) - len(originals)} of "
            f"{len(source)} names that differ only by a wrapper such as _orig_mod"
        )
    layout, prefix = _recognise(originals)
    found: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
    unexpected: list[str] = []
    outside: list[str] = []
    for name, original in originals.items():
        own = _inside(name, prefix, layout)
        official = None if own is None else _rename(own, layout, to_official=True)
        if official is not None:
            if official in found:
                raise ValueError(
                    f"load_weights: source must name each parameter once, got {printable(found[official][1][0])} and "
                    f"{printable(original)}"
                )
            if layout.names is not None or _is_parameter(official):
                require_values("load_weights", original, source[original])
            found[official] = (source[original], (original,))
        else:
            (outside if own is None else unexpected).append(original)
    if layout.names is not None:  # the official one keeps them joined
        _join(found)
    state = {name: tensor for name, (tensor, _) in found.items()}
    sources = {name: originals for name, (_, originals) in found.items()}
    return Official(layout, state, sources, tuple(unexpected), tuple(outside))


def from_official(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A state dict of official names by the layout's; mmdet has no head. Tensors are views where they can be."""
    if layout.names is None:
        return dict(state)
    renamed = {}
    for name, tensor in _split(state, layout.names):
        own = _rename(name, layout, to_official=False)
        if own is not None:
            renamed[own if name.startswith("head.") else layout.root + own] = tensor
    return renamed


# -- names -----------------------------------------------------------------------------------------------------------


def _recognise(names: Iterable[str]) -> tuple[Layout, str]:
    """The layout, and the prefix of the names that belong to the PVT v2."""
    names = list(names)
    found = [
        (layout, name.removesuffix(layout.sentinel))
        for name in names
        for layout in LAYOUTS.values()
        if name.endswith(layout.sentinel) and name.removesuffix(layout.sentinel)[-1:] in ("", ".")
    ]
    if len(found) > 1:
        places = ", ".join(reprlib.repr(prefix) for _, prefix in found[:3]) + (", ..." if len(found) > 3 else "")
        raise ValueError(f"load_weights: source must hold one PVT v2, got {len(found)}, under {places}")
    if not found:
        known = ", ".join(LAYOUTS)
        raise ValueError(
            f"load_weights: source must hold a PVT v2 in one of the layouts {known}; "
            f"got {len(names)} tensors: {', '.join(map(printable, names[:3]))}{', ...' if len(names) > 3 else ''}"
        )
    return found[0]


def _inside(name: str, prefix: str, layout: Layout) -> str | None:
    """The name within the PVT v2, or None. The head lies beside the root, not in it."""
    if name.startswith(prefix):
        return name.removeprefix(prefix)
    beside = prefix.removesuffix(layout.root)
    return name.removeprefix(beside) if beside != prefix and name.startswith(beside + "classifier.") else None


def _rename(name: str, layout: Layout, to_official: bool) -> str | None:
    """The name in the other layout; None for one that the layout does not have."""
    if layout.names is None:
        return name
    stem, stem_name = _TIMM_STEM if layout.name == "timm" else ("", "")
    if to_official and stem and name.startswith(stem_name):
        name = stem + name.removeprefix(stem_name)
    for pattern, template in _patterns(layout.name, to_official):
        match = pattern.fullmatch(name)
        if match is not None:
            fields = match.groupdict()
            stage = int(fields["i"]) if "i" in fields else int(fields.get("s", 1)) - 1
            new = template.format(i=stage, s=stage + 1, j=fields.get("j"), leaf=fields["leaf"])
            return stem_name + new.removeprefix(stem) if stem and new.startswith(stem) else new
    return None


def _is_parameter(name: str) -> bool:
    """Is an official name that of a PVT v2's parameter?"""
    return any(pattern.fullmatch(name) for pattern, _ in _patterns("timm", to_official=False))


@cache
def _patterns(layout: str, to_official: bool) -> list[tuple[re.Pattern, str]]:
    """(what matches a name, the template of the other layout's name)."""
    pairs = []
    for official, own in (LAYOUTS[layout].names or {}).items():
        templates = [name if "{leaf}" in name else name + ".{leaf}" for name in (official, own)]
        known, other = reversed(templates) if to_official else templates
        pattern = re.escape(known).replace(r"\{leaf\}", "(?P<leaf>weight|bias)")
        pairs.append((re.compile(re.sub(r"\\{([sij])\\}", r"(?P<\1>0|[1-9][0-9]{0,5})", pattern)), other))
    return pairs


# -- shapes ----------------------------------------------------------------------------------------------------------


def _join(found: dict[str, tuple[Tensor, tuple[str, ...]]]) -> None:
    """Put what `_split` makes together again, in place; parts without their counterpart stay as they are."""
    for name, (tensor, sources) in list(found.items()):
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(".attn.k"):
            value_name = f"{stem[:-1]}v.{leaf}"
            if value_name in found and _stack(tensor, found[value_name][0]):
                value, value_sources = found.pop(value_name)
                del found[name]
                found[f"{stem[:-1]}kv.{leaf}"] = (torch.cat([tensor, value]), sources + value_sources)
        elif stem.endswith(".attn.qkv") and tensor.dim() and tensor.shape[0] % 3 == 0:
            channels = tensor.shape[0] // 3
            del found[name]
            found[f"{stem[:-3]}q.{leaf}"] = (tensor[:channels], sources)
            found[f"{stem[:-3]}kv.{leaf}"] = (tensor[channels:], sources)
        elif stem.endswith((".fc1", ".fc2")) and leaf == "weight" and tensor.shape[2:] == (1, 1):
            found[name] = (tensor.flatten(1), sources)


def _stack(first: Tensor, second: Tensor) -> bool:
    """Are these two halves of one parameter, as large as their memory?"""
    alike = first.dim() and first.shape == second.shape and first.dtype == second.dtype
    return bool(alike and first.device == second.device and not is_expanded(first) and not is_expanded(second))


def _split(state: Mapping[str, Tensor], names: Mapping[str, str]) -> Iterable[tuple[str, Tensor]]:
    """The tensors in the shapes of the layout with these names."""
    separate, stacked = "block{s}.{j}.attn.k" in names, "block{s}.{j}.attn.qkv" in names
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if separate and stem.endswith(".attn.kv"):
            key, value = tensor.chunk(2)
            yield f"{stem[:-2]}k.{leaf}", key
            yield f"{stem[:-2]}v.{leaf}", value
        elif stacked and stem.endswith(".attn.q"):
            yield f"{stem[:-1]}qkv.{leaf}", torch.cat([tensor, state[f"{stem[:-1]}kv.{leaf}"]])
        elif stacked and stem.endswith((".fc1", ".fc2")) and leaf == "weight":
            yield name, tensor[:, :, None, None]
        elif not (stacked and stem.endswith(".attn.kv")):
            yield name, tensor
