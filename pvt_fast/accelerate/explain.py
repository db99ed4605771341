"""What of a model runs on the ops now, and what does not, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..arguments import instance
from ..backend.dispatch import BackendUnavailable
from ..ops import packing
from .api import STATE
from .fused import Fused, StandIn
from .guard import own_class


@dataclass(frozen=True)
class Piece:
    """A patch embed, block, stage norm or head: its path, what of it is fused, on which backend, and what is not.

    fused: of "patch_embed", "attention", "mlp", "layer_norm", "head"; empty where the module's own forward runs.
    backend: "triton", "cpp" or "reference"; None where nothing is fused.
    reason: why the module, or a half of a block, runs its own forward; empty where all is fused.
    """

    path: str
    fused: tuple[str, ...]
    backend: str | None
    reason: str

    def __str__(self) -> str:
        done = f"{' and '.join(self.fused)} on {self.backend}" if self.fused else "its own forward"
        return f"{self.path or 'the model'}: {done}{f' ({self.reason})' if self.reason else ''}"


@dataclass(frozen=True)
class Explanation:
    """The pieces of a model, in order; `str` of it is for reading."""

    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        if not self.pieces:
            return "nothing of it is known to pvt_fast; accelerate_(model) finds blocks in models of others"
        whole = sum(bool(piece.fused) and not piece.reason for piece in self.pieces)
        return "\n".join((f"{whole} of {len(self.pieces)} pieces fused", *(f"  {piece}" for piece in self.pieces)))


def explain(model: nn.Module) -> Explanation:
    """Of each patch embed, block, stage norm and head of `model`: is it fused, on which backend, and why not.

    For our own models, and what `accelerate_` found in models of others, as they are now, on the device and in the
    dtype of their parameters. What depends on a call (its input, torch.func, tracing) is told in the log of "pvt_fast".
    """
    instance("explain: model", model, nn.Module, "an nn.Module")
    paths = {module: path for path, module in model.named_modules()}
    # of transformers' models
    attentions = bool(getattr(getattr(model, "config", None), "output_attentions", False))
    pieces, seen = [], set()
    for path, module in model.named_modules():
        for owner, fused, root in _pieces_of(module):
            if (owner, root) not in seen:
                seen.add((owner, root))
                reason = "" if root else _own_forward(owner, fused, attentions)
                path_of_it = ".".join(filter(None, (paths.get(owner, path), root)))
                pieces.append(_explained(path_of_it, owner, reason or fused))
    return Explanation(tuple(pieces))


def refresh(model: nn.Module) -> None:
    """Forget what is packed of the model's weights: the next forward packs them as they are then.

    Only needed where the very next call must see a write that torch does not record and that changes few values: some
    calls later it is seen anyway (README, "Weights that change").
    """
    instance("refresh: model", model, nn.Module, "an nn.Module")
    packing.forget(
        [tensor for module in model.modules() for tensor in module._parameters.values() if tensor is not None]
    )


def _pieces_of(module: nn.Module) -> list[tuple[nn.Module, Fused | str, str]]:
    """(module, its fused form or why there is none, the child concerned) of what stands in for parts of `module`."""
    if hasattr(module, "stand_ins"):
        stand_ins = list(module.stand_ins())  # type: ignore[operator]
    elif isinstance(stand_in := vars(module).get("_fused"), StandIn):
        stand_ins = [(module, stand_in)]
    else:
        return [(module, vars(module)[STATE], "")] if STATE in vars(module) else []
    return [
        (owner, stand_in.current(owner) or stand_in.refusal, stand_in.roots[0] if stand_in.roots else "")
        for owner, stand_in in stand_ins
    ]


def _own_forward(owner: nn.Module, fused: Fused | str, attentions: bool) -> str:
    """Why a call of the owner does not reach its fused form; None if it does."""
    if "forward" in vars(owner):
        return "it has a forward of its own"
    if isinstance(fused, Fused) and own_class(owner).forward is not fused.forward:
        return f"the forward of {type(owner).__name__} was replaced"
    if attentions and STATE in vars(owner) and "attention" in fused.names:  # type: ignore[union-attr]
        return "its model's configuration asks for attentions"
    return ""


def _explained(path: str, owner: nn.Module, fused: Fused | str) -> Piece:
    if isinstance(fused, str):
        return Piece(path, (), None, fused)
    try:
        backend, reason = fused.backend(owner)
    except BackendUnavailable as error:
        backend, reason = None, str(error)
    if backend is None:
        return Piece(path, (), None, reason)
    return Piece(path, fused.names, backend, "; ".join(f"{half}: {why}" for half, why in fused.refusals.items()))
