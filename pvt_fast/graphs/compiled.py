"""A model's whole forward as one op of a compiled graph.

Compiled without gradients, a model on a backend that knows whole models is called once for all of its ops, by
`pvt_fast::run_model`: the call that it would make in eager mode, of which the compiler sees nothing.
"""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import ops
from ..accelerate.guard import ambient, products_now
from ..backend import dispatch
from ..backend.registered import requested
from ..ops.packing import within_graph
from ..ops.traceable import constant_while_traced
from .state import State

if TYPE_CHECKING:
    from ..model import PVT_V2

# A compiled graph holds a model by its number, which its guards compare, and which no copy of the model shares.
models: WeakValueDictionary[int, PVT_V2] = WeakValueDictionary()
_numbers = itertools.count()


def number(model: PVT_V2) -> int:
    """A number under which `run_model` finds this model, new at each call."""
    models[given := next(_numbers)] = model
    return given


def _run_model(
    image: Tensor, parameters: list[Tensor], model: int, classes: int, products: torch.dtype | None = None
) -> Tensor:
    ops.refuse_forward_mode("pvt_fast::run_model")
    whole = models[model]
    with _autocast(image, products):
        return _logits(whole, image, parameters)


def _autocast(image: Tensor, products: torch.dtype | None) -> AbstractContextManager:
    """What was on where the graph was traced: it runs without, or under another that began within it."""
    if products == products_now(image):
        return nullcontext()
    return torch.autocast(image.device.type, products, enabled=products is not None)


def _logits(whole: PVT_V2, image: Tensor, parameters: list[Tensor]) -> Tensor:
    if not parameters:  # the model's own, whatever they are by now
        return whole.published_forward(image)
    with within_graph():
        if all(own is given for own, given in zip(whole.parameters(), parameters, strict=True)):
            return whole.published_forward(image)
        clone = _clones.of(whole, image)
        return functional_call(clone, dict(zip(dict(clone.named_parameters()), parameters, strict=True)), (image,))


class _Published(nn.Module):
    """A model without hooks and a forward of its own, which the graph has traced around `run_model`."""

    def __init__(self, model: PVT_V2) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """image (B, Cin, H, W) -> logits (B, num_classes)."""
        return self.model.published_forward(image)


class _Clones(threading.local):
    """This thread's copies of models, in which parameters that are not a model's own can take the place of those."""

    def __init__(self) -> None:
        self.known: WeakKeyDictionary[PVT_V2, tuple[State, _Published]] = WeakKeyDictionary()

    def of(self, model: PVT_V2, image: Tensor) -> _Published:
        """A copy of the model as it is now, over the same parameters."""
        state, clone = self.known.get(model, (None, None))
        if state is None or clone is None or not state.holds(model) or clone.model.backend != model.backend:
            state = State(model)
            clone = _Published(copy.deepcopy(model, {id(own): own for own in model.parameters()}))
            # the state does not know all that hooks and unknown modules read
            if model.pieces(image) is not None and state.guard.disturbed(model) is None and state.holds(model):
                self.known[model] = state, clone
        return clone


_clones = _Clones()

_library = torch.library.Library("pvt_fast", "FRAGMENT")
_library.define(
    "run_model(Tensor image, Tensor[] parameters, int model, int classes, ScalarType? products=None) -> Tensor"
)
_library.impl("run_model", _run_model, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pvt_fast::run_model",
    lambda image, parameters, model, classes, products=None: image.new_empty(
        (image.shape[0], classes), dtype=products or image.dtype
    ),
    lib=_library,
)


@constant_while_traced
def _is_all_that_is_traced(model: int) -> bool:
    """Is the graph being traced the forward of this model and nothing else, as in `torch.compile(model)`?

    Then nothing in it can change the model's parameters or put others in their place, and the graph need not hold
    them: to guard and to check some hundreds of inputs takes longer than the Python of a small model in eager mode.
    The names are the compiler's own and may change; "no" is always right, only slower.
    """
    symbolic_convert = sys.modules.get("torch._dynamo.symbolic_convert")
    try:
        root = symbolic_convert.InstructionTranslator.current_tx().output.root_tx  # type: ignore[union-attr]
        whole = models[model]
        return root.f_code is whole.published_forward.__code__ and root.f_locals["self"] is whole
    except (AttributeError, KeyError):
        return False


@constant_while_traced
def _is_fused_throughout(model: int) -> bool:
    """Do the ops stand in for all of this model now, on a backend that knows whole models?"""
    whole = models[model]
    like = next(whole.parameters())
    return dispatch.select(whole.facts(like), whole.backend).whole is not None and whole.pieces(like) is not None


def run_whole(model: PVT_V2, image: Tensor) -> Tensor | None:
    """A traced model's logits by one op; None where gradients, training, export or the model's state forbid it."""
    if torch.is_grad_enabled() or model.training or torch.compiler.is_exporting() or ambient() is not None:
        return None
    if requested(model.backend) == "reference" or not _is_fused_throughout(model.graph_number):
        return None
    parameters = [] if _is_all_that_is_traced(model.graph_number) else list(model.parameters())
    classes = model.head.weight.shape[0]  # type: ignore[index]
    return torch.ops.pvt_fast.run_model(image, parameters, model.graph_number, classes, products_now(image))
