"""What a saved model is described by, and a refusal of models that no description can keep.

A saved model is its state dict and what `PVT_V2(**config)` cannot know of it: the norms' epsilons, and where they are
not the usual ones `head_bias` (false for a head without bias) and `global_pool` ("" for none). A model with modules or
tensors that are not rebuilt from these is refused before anything is written: it would come back as another.

`save_pretrained` writes two files, which no file system can put into place at once. So model.safetensors alone makes
the model: it carries the text of config.json in its metadata, and its renaming is the moment at which the old model
becomes the new one. config.json is put into place after it. Both have the digest of the weights (`weights_id`): where
the one beside the weights has another, or none, it belongs to other weights, those before a save that was cut short or
those after one that overtook a reader, and what the weights carry holds. With the same digest config.json holds, so
that it can be edited. A folder without the metadata, of an earlier version or another tool, is read by its config.json,
and never meets a newer one: the renamed weights are on the disk before config.json is renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..accelerate.guard import hidden_by, settings_of
from ..layers import DropPath
from ..ops import PLAIN
from .files import reason, require_values
from .hub import CONFIG_FILE

if TYPE_CHECKING:
    from ..model import PVT_V2

logger = logging.getLogger("pvt_fast")

NORM_EPS, HEAD_BIAS, GLOBAL_POOL = "norm_eps", "head_bias", "global_pool"
TRANSFORMERS_EPS = "layer_norm_eps"  # of its config.json
_WEIGHTS_ID = "weights_id"
EPS_KINDS = ("block", "patch_embed", "reduction")
_LONGEST = 1 << 20  # bytes of a description, which has some hundred
# In evaluation mode each of them is the identity.
_PASSIVE = (nn.Identity, nn.Dropout, DropPath)
# torch's wrapper for recomputation, which shows in no state dict.
_CHECKPOINTED = "_checkpoint_wrapped_module"


# -- writing ---------------------------------------------------------------------------------------------------------


def describe(op: str, model: PVT_V2, kind: type[PVT_V2]) -> dict[str, Any]:
    """The arguments of `kind` under "config", and what `rebuild` must set beside them to bring the model back.

    Raises ValueError, as `op`, for a model that would come back as another.
    """
    require_rebuilt(op, model, kind)
    for name, value in model.state_dict().items():
        require_values(op, name, value)
    described: dict[str, Any] = {"config": asdict(model.config), NORM_EPS: valid_eps(op, model.norm_eps())}
    if isinstance(model.head, nn.Linear) and model.head.bias is None:
        described[HEAD_BIAS] = False
    if model.global_pool != "avg":
        described[GLOBAL_POOL] = model.global_pool
    return described


def to_text(op: str, described: Mapping[str, Any], indent: int | None = None) -> str:
    """A description as JSON; equal ones give equal texts. ValueError for numbers that are none of Python's."""
    try:
        return json.dumps(described, sort_keys=True, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{op}: the description must consist of finite numbers, got {reason(error)}") from error


def config_text(op: str, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """config.json of `save_pretrained`: the arguments of the class beside the rest, and the weights' digest."""
    flat = {**described["config"], **{name: value for name, value in described.items() if name != "config"}}
    digest = hashlib.sha256(to_text(op, flat).encode())
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return to_text(op, {**flat, _WEIGHTS_ID: digest.hexdigest()[:32]}, indent=2)


def tensors(model: PVT_V2) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: on the CPU, contiguous, each tensor with memory of its own."""
    seen: set[int] = set()
    state = {}
    for name, value in model.state_dict().items():
        own = value.detach().cpu().resolve_neg().contiguous()
        memory = own.untyped_storage().data_ptr()
        state[name] = own.clone() if memory in seen else own
        seen.add(memory)
    return state


def write_tensors(op: str, state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file. One entry of metadata only: the order of several is not fixed. OSError if it cannot be."""
    try:
        save_file(dict(state), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{op}: weights must be written to their end, got {reason(error)}") from error


# -- reading ---------------------------------------------------------------------------------------------------------


def from_text(op: str, text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object, of a description or of another library's configuration; ValueError for anything else."""
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"more than {_LONGEST} bytes")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {where} must be a JSON object, got {reason(error)}") from error
    if NORM_EPS in found:
        found[NORM_EPS] = valid_eps(op, found[NORM_EPS])
    if TRANSFORMERS_EPS in found:
        found[TRANSFORMERS_EPS] = _valid_epsilon(op, TRANSFORMERS_EPS, found[TRANSFORMERS_EPS])
    return found


def in_folder(op: str, metadata: Mapping[str, str], config: Path | None) -> dict[str, Any] | None:
    """The content of config.json for weights with these metadata (see above); None where there is none."""
    beside = inside = None
    if config is not None and config.is_file():
        with open(config, "rb") as file:
            beside = from_text(op, file.read(_LONGEST + 1), str(config))
    if CONFIG_FILE in metadata:
        inside = from_text(op, metadata[CONFIG_FILE], f"{CONFIG_FILE} in the weights' metadata")
    if inside is None or (beside is not None and beside.get(_WEIGHTS_ID) == inside.get(_WEIGHTS_ID)):
        return beside
    if beside is not None:
        logger.warning("%s: %s belongs to other weights; those beside it carry their own, which holds", op, config)
    return inside


def valid_eps(op: str, stated: Any) -> dict[str, float]:
    """The epsilons that a file states, as arguments of `PVT_V2.set_norm_eps`; ValueError for anything else."""
    if not isinstance(stated, Mapping) or not stated or any(kind not in EPS_KINDS for kind in stated):
        raise ValueError(
            f"{op}: {NORM_EPS} must state the epsilons of norms of the kinds {', '.join(EPS_KINDS)}; "
            f"got {reprlib.repr(list(stated) if isinstance(stated, Mapping) else stated)}"
        )
    return {kind: _valid_epsilon(op, f"{NORM_EPS} of {kind}", eps) for kind, eps in stated.items()}


def _valid_epsilon(op: str, name: str, stated: Any) -> float:
    try:
        eps = math.nan if isinstance(stated, bool) or not isinstance(stated, Real) else float(stated)
    except OverflowError:
        eps = math.inf
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: {name} must be a finite number above 0, got {reprlib.repr(stated)}")
    return eps


# -- what can be kept -------------------------------------------------------------------------------------------------


def require_rebuilt(op: str, model: PVT_V2, kind: type[PVT_V2], head: bool = True) -> None:
    """Raise ValueError where `kind`, called with the model's configuration, makes another model; heads on request."""
    if head and (got := _special_head(model)) is not None:
        raise ValueError(
            f"{op}: model.head must be an nn.Linear of {model.config.embed_dims[-1]} channels in plain tensors, or "
            f"nn.Identity, for it to be kept; got {got}. torch.save(model.state_dict(), path) keeps its weights: load "
            "them into a model with the same module at head"
        )
    try:
        with torch.device("meta"):
            clone = kind(**asdict(model.config))
    except TypeError as error:
        raise ValueError(f"{op}: model must be of a class that takes PVT_V2's arguments, got {error}") from error
    lost = list(_differences(model, clone))
    if lost:
        raise ValueError(
            f"{op}: model must consist of what {kind.__name__}(**config) makes, for it to be kept; got "
            f"{'; '.join(lost[:3])}{f' and {len(lost) - 3} more' if len(lost) > 3 else ''}. Merge adapters and remove "
            "parametrizations first, or torch.save(model.state_dict(), path) and load that into a model changed alike"
        )


def _special_head(model: PVT_V2) -> str | None:
    """A head that is no plain linear of the features, in words."""
    head, channels = model.head, model.config.embed_dims[-1]
    kind = next((known for known in (nn.Linear, nn.Identity) if isinstance(head, known)), None)
    if kind is not None and type(head).forward is kind.forward and "forward" not in vars(head):
        state = head.state_dict(keep_vars=True)
        plain = all(type(value) in PLAIN for value in state.values())
        if not state if kind is nn.Identity else plain and state.keys() <= {"weight", "bias"}:
            weight = state.get("weight")
            if weight is None or weight.shape[1:] == (channels,):
                return None
    return " ".join(repr(head).split())[:200]


def _differences(model: nn.Module, clone: nn.Module) -> Iterator[str]:
    """How the model, but for its head, differs from the one that its configuration makes."""
    own, made = (_without_head(module.state_dict()) for module in (model, clone))
    for name, value in own.items():
        if name not in made:
            yield f"an unknown {name}"
        elif type(value) not in PLAIN:
            yield f"a {type(value).__name__} at {name}"
        elif value.shape != made[name].shape:
            yield f"{name} of shape {tuple(value.shape)} for {tuple(made[name].shape)}"
    yield from (f"no {name}" for name in made if name not in own)
    # what stands beside the trunk (a loss, say) is no part of a forward
    trunk = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name.partition(".")[0] in clone._modules
    }
    modules = {name.replace(f".{_CHECKPOINTED}", ""): module for name, module in trunk.items()}
    wanted = _without_head(dict(clone.named_modules(remove_duplicate=False)))
    yield from (f"a {hidden} of its own" for hidden in sorted(hidden_by(model) & vars(model).keys()))
    for name, module in _without_head(modules).items():
        if name not in wanted and not isinstance(module, _PASSIVE):
            yield f"a {type(module).__name__} added at {name}"
    for name, module in wanted.items():
        other = modules.get(name)
        if not name or (isinstance(other, (_PASSIVE, type(None))) and isinstance(module, _PASSIVE)):
            continue
        if other is None:
            yield f"no {type(module).__name__} at {name}"
            continue
        if isinstance(module, nn.ModuleList):
            if type(other) is not nn.ModuleList or [*other._modules] != [*module._modules]:
                yield f"other modules, or another order, in {name}"
            continue
        if type(other).forward is not type(module).forward:
            yield f"{name} as a {type(other).__name__} for a {type(module).__name__}"
            continue
        for hidden in sorted(hidden_by(other) & vars(other).keys()):
            yield f"a {hidden} of its own in {name}"
        made = settings_of(module)
        for setting, now in settings_of(other).items():
            if setting in made and setting != "eps" and now != made[setting]:  # epsilons are kept
                yield f"a {setting} of {now} for {made[setting]} in {name}"


def _without_head(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if name.partition(".")[0] != "head"}
