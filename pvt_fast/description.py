"""What a saved model is described by, and a refusal of models that no description can keep.

A saved model is its state dict and what `PVT_V2(**config)` cannot know of it: the norms' epsilons, and where they are
not the usual ones `head_bias` (false for a head without bias) and `global_pool` ("" for none). A model with modules or
tensors that are not rebuilt from these is refused before anything is written: it would come back as another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .accelerate.guard import hidden_by, settings_of
from .layers import DropPath

if TYPE_CHECKING:
    from .model import PVT_V2

NORM_EPS = "norm_eps"
_HEAD_BIAS, _GLOBAL_POOL = "head_bias", "global_pool"
# Which one stands there changes no answer in evaluation mode.
_PASSIVE = (nn.Identity, nn.Dropout, DropPath)
# torch's wrapper for recomputation, which shows in no state dict.
_CHECKPOINTED = "_checkpoint_wrapped_module"


def describe(op: str, model: PVT_V2, kind: type[PVT_V2]) -> dict[str, Any]:
    """The arguments of `kind` under "config", and what `settle` brings a model made of them to.

    Raises ValueError, as `op`, where the model is not what comes back then.
    """
    require_rebuilt(op, model, kind)
    described: dict[str, Any] = {"config": asdict(model.config), NORM_EPS: model.norm_eps()}
    if isinstance(model.head, nn.Linear) and model.head.bias is None:
        described[_HEAD_BIAS] = False
    if model.global_pool != "avg":
        described[_GLOBAL_POOL] = model.global_pool
    return described


def settle(model: PVT_V2, described: Mapping[str, Any]) -> None:
    """Bring a new model to a description's head and pooling. The epsilons are set with the weights."""
    bias, pool = described.get(_HEAD_BIAS, True), described.get(_GLOBAL_POOL, "avg")
    if bias not in (True, False) or pool not in ("avg", ""):
        raise ValueError(
            f'PVT_V2: {_HEAD_BIAS} must be true or false and {_GLOBAL_POOL} "avg" or "", got {bias!r} and {pool!r}'
        )
    if not bias and isinstance(old := model.head, nn.Linear):
        model.head = nn.Linear(old.in_features, old.out_features, bias=False).to(old.weight)
    if isinstance(model.head, nn.Identity):
        model.global_pool = pool


def take_dtypes(model: PVT_V2, state: Mapping[str, Tensor]) -> None:
    """Give each of the model's parameters the dtype that it has in `state`, so that no value is rounded."""
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.data = parameter.data.to(state[name].dtype)


def tensors(model: PVT_V2) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: contiguous, each tensor with memory of its own."""
    seen: set[int] = set()
    state = {}
    for name, value in model.state_dict().items():
        own = value.contiguous()
        memory = own.untyped_storage().data_ptr()
        state[name] = own.clone() if memory in seen else own
        seen.add(memory)
    return state


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
            twin = kind(**asdict(model.config))
    except TypeError as error:
        raise ValueError(f"{op}: model must be of a class that takes PVT_V2's arguments, got {error}") from error
    lost = list(_differences(model, twin))
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
        plain = all(_is_plain(value) for value in state.values())
        if not state if kind is nn.Identity else plain and state.keys() <= {"weight", "bias"}:
            weight = state.get("weight")
            if weight is None or weight.shape[1:] == (channels,):
                return None
    return " ".join(repr(head).split())[:200]


def _differences(model: nn.Module, twin: nn.Module) -> Iterator[str]:
    """How the model, but for its head, differs from the one that its configuration makes."""
    own, made = (_without_head(module.state_dict()) for module in (model, twin))
    for name, value in own.items():
        if name not in made:
            yield f"an unknown {name}"
        elif not _is_plain(value):
            yield f"a {type(value).__name__} at {name}"
        elif value.shape != made[name].shape:
            yield f"{name} of shape {tuple(value.shape)} for {tuple(made[name].shape)}"
    yield from (f"no {name}" for name in made if name not in own)
    # what stands beside the trunk (a loss, say) is no part of a forward
    trunk = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name.partition(".")[0] in twin._modules
    }
    modules = {name.replace(f".{_CHECKPOINTED}", ""): module for name, module in trunk.items()}
    wanted = _without_head(dict(twin.named_modules(remove_duplicate=False)))
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


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter)
