"""A model again from its description and its weights."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import PVTConfig
from .description import GLOBAL_POOL, HEAD_BIAS, NORM_EPS
from .files import reason
from .fitting import assign, fit

if TYPE_CHECKING:
    from ..model import PVT_V2

_Model = TypeVar("_Model", bound="PVT_V2")


def split(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The description in a config.json: what of it is the class's arguments goes under "config"."""
    names = {field.name for field in fields(PVTConfig)}
    config = {name: value for name, value in flat.items() if name in names}
    return {"config": config, **{name: value for name, value in flat.items() if name not in names}}


def rebuilt(
    op: str,
    kind: type[_Model],
    described: Mapping[str, Any],
    state: Mapping[str, Tensor],
    arguments: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> _Model:
    """The model on the CPU, in evaluation mode, each parameter in the dtype that it has in `state`.

    described: what `describe` gives, of a file. arguments: of `kind`, instead of the described ones. Strictly the
    description and the weights must fit each other; that is found out before memory is taken for either. ValueError
    else, and for a description of none.
    """
    try:
        config = PVTConfig(**described["config"])
        if sum(config.depths) > len(state):
            raise ValueError(f"{sum(config.depths)} blocks for {len(state)} tensors")
        with torch.device("meta"):
            report = fit(_made(kind, described, {}), state, described[NORM_EPS], strict)[1]
        if strict and report.dropped + report.adapted:
            raise ValueError(f"another shape for {', '.join(report.dropped + report.adapted)}")
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else reason(error)
        raise ValueError(
            f"{op}: the weights' description must be that of a PVT_V2 of their shapes, got {what}"
        ) from error
    with torch.device("cpu"):
        model = _made(kind, described, arguments or {})
    take_dtypes(model, state)
    assign(model, state, described[NORM_EPS], strict)
    return model.eval()


def _made(kind: type[_Model], described: Mapping[str, Any], arguments: Mapping[str, Any]) -> _Model:
    """A new model with the description's head and pooling. The epsilons are set with the weights."""
    model = kind(**{**described["config"], **arguments})
    bias, pool = described.get(HEAD_BIAS, True), described.get(GLOBAL_POOL, "avg")
    if bias not in (True, False) or pool not in ("avg", ""):
        raise ValueError(
            f'PVT_V2: {HEAD_BIAS} must be true or false and {GLOBAL_POOL} "avg" or "", '
            f"got {reprlib.repr(bias)} and {reprlib.repr(pool)}"
        )
    if not bias and isinstance(old := model.head, nn.Linear):
        model.head = nn.Linear(old.in_features, old.out_features, bias=False)
    if isinstance(model.head, nn.Identity):
        model.global_pool = pool
    return model


def take_dtypes(model: PVT_V2, state: Mapping[str, Tensor]) -> None:
    """Give each of the model's parameters the dtype that it has in `state`, so that no value is rounded; those that
    `state` lacks take the dtype of the first that it has.
    """
    dtypes = {name: state[name].dtype for name, _ in model.named_parameters() if name in state}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name) or next(iter(dtypes.values()), parameter.dtype))
