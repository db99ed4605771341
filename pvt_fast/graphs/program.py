"""A model's whole forward as one call into C++.

For a small model on one image, Python's part of running it op by op is a tenth of the time and more. A `Program` is
recorded from such a forward: what the forward reads is noted before it, and the packed weights that it used, in their
order, belong to that if all is still so after it. A program holds while nothing of it has changed: modules, their
classes, hooks and settings, parameters and their values; it looks at all of them in a fraction of the time that the
ops' Python takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..accelerate.fused import Fused
from ..accelerate.guard import Moment, ambient, products_now
from ..backend import dispatch
from ..ops import WholeForward, is_plain, packing, tensors_in
from . import compiled
from .state import Recorded, State

if TYPE_CHECKING:
    from ..model import PVT_V2

# Of the first stage's map. Above it Python's part is nothing, and the maps' memory better goes back after the call.
_MAX_BYTES = 32 << 20


class Whole:
    """A model's `Program`, recorded when it can be. Copies and pickles have none."""

    def __init__(self) -> None:
        self.program: Program | None = None

    def run(self, model: PVT_V2, image: Any) -> Tensor | None:
        """image (B, Cin, H, W) -> logits (B, num_classes); None where the model's own forward must run.

        Raises BackendUnavailable where the model asks for a backend that cannot run.
        """
        if torch.compiler.is_compiling():
            return compiled.run_whole(model, image)
        if type(image) is not Tensor or image.is_neg():
            return None
        if not torch.is_grad_enabled():
            image = image.detach()  # over the same memory to the end, whatever another thread does to the caller's
        if model.training:
            self.program = None  # nothing is packed for longer than a step
        backend = dispatch.select(model.facts(image), model.backend)
        if backend.whole is None or model.training or ambient() is not None:
            return None
        if _needs_gradients(model, image):
            return None
        products = products_now(image)
        if products is torch.bfloat16 and image.dtype is torch.float32:
            image = image.to(products)  # as autocast does for the first convolution: all maps then have this dtype
        if products not in (None, image.dtype) or not fits(model, image):
            return None
        program, variant = self.program, backend.whole.variant()
        if program is not None and program.holds(model, image, variant):
            return program.run(image)
        begun = Program.begun(model, image, variant)
        with packing.collected() as records:
            logits = model.forward_head(model.forward_features(image))
        kept = begun is not None and begun.end(model, image, records, backend.whole)
        self.program = begun if kept else None
        return logits

    def __deepcopy__(self, memo: dict) -> Whole:
        return Whole()

    def __reduce__(self) -> tuple:
        return Whole, ()


class Program:
    """A model's forward as packed ops in their order, for images of one dtype and layout on one instruction set."""

    def __init__(self, model: PVT_V2, image: Tensor, variant: str, fused: list[Fused]) -> None:
        """What a forward of the model on `image` would read now."""
        self.kind = _kind_of(image, variant)
        self.state = State(model)
        # from what the state compares with: read again, a value may be another for that once
        moment = Moment(self.state.kept)
        calls = [call for piece in fused for call in piece.calls(moment)]
        self.keys = [packing.key_of(variant, *call) for call in calls]
        self.pieces = [tensors_in(weights) for weights, *_ in calls]  # the parameters of each op of a forward, in order
        self.head = self.pieces[-1][0]

    @classmethod
    def begun(cls, model: PVT_V2, image: Tensor, variant: str) -> Program | None:
        """A program as it stands before the forward that packs its ops; None where a forward is more than ops."""
        fused = model.pieces(image)
        if fused is None or not all(is_plain(parameter) for parameter in model.parameters()):
            return None
        program = cls(model, image, variant, fused)
        guard = program.state.guard
        known = {id(module) for _, module in guard.modules}
        if not all(id(module) in known for piece in fused for module, _, _ in piece.parameters):
            return None
        # asked last: it is one moment only if nothing was changed in between
        return program if guard.changed(model) is None and guard.disturbed(model) is None else None

    def end(self, model: PVT_V2, image: Tensor, records: list[packing.Record], whole: WholeForward) -> bool:
        """Take the packed ops of the forward that has just run. False if it ran anything else, or if another thread
        changed something meanwhile.
        """
        # weights that are computed at each forward (parametrizations, say) are packed at each forward
        if [used.key for used in records] != self.keys:
            return False
        self.records = records
        self.forward = whole.link([used.form for used in records])
        parameters = {id(tensor): tensor for piece in self.pieces for tensor in piece}
        self.recorded = Recorded(self.state, tuple(parameters.values()))
        # it compares with the values of now; what the ops were packed from may have changed before, unseen as yet
        if not all(_is_packed_of(used, piece) for used, piece in zip(records, self.pieces, strict=True)):
            packing.doubt()
            return False
        return self.holds(model, image, whole.variant())

    def holds(self, model: PVT_V2, image: Tensor, variant: str) -> bool:
        """Would running op by op on `image` do the same?"""
        if _kind_of(image, variant) != self.kind or any(used.dropped for used in self.records):
            return False
        # at every call, as the result would have another shape; other shapes are compared with the values
        return self.head.shape[0] == self.forward.classes and self.recorded.holds(model)

    def run(self, image: Tensor) -> Tensor:
        """image (B, Cin, H, W) -> logits (B, num_classes)."""
        batch, _, height, width = image.shape
        out = torch.empty((batch, self.forward.classes), dtype=image.dtype, device=image.device)
        self.forward.run(packing.span(image), (batch, height, width), image.stride(), packing.span(out))
        return out


def _kind_of(image: Tensor, variant: str) -> tuple:
    """What of an image, of an instruction set and of autocast a program is for."""
    return variant, image.dtype, products_now(image), _layout(image), image.shape[1]


def fits(model: PVT_V2, image: Tensor) -> bool:
    """Is `image` of a kind and size that programs are for?"""
    tokens = image.shape[0] * (image.shape[2] // 4) * (image.shape[3] // 4)
    small = tokens * model.forward_settings()[0].embed_dims[0] * image.element_size() <= _MAX_BYTES
    return small and image.dtype in (torch.float32, torch.bfloat16) and _layout(image) is not None


def _is_packed_of(used: packing.Record, piece: list[Tensor]) -> bool:
    by_address = {parameter.data_ptr(): parameter for parameter in piece}
    if by_address.keys() != set(used.addresses):
        return False
    return used.sources.hold_all([by_address[address] for address in used.addresses])


def _needs_gradients(model: nn.Module, image: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return image.requires_grad or any(parameter.requires_grad for parameter in model.parameters())


def _layout(image: Tensor) -> str | None:
    """How the first op's weights are packed for this image; None where it is copied first."""
    strides = image.stride()
    if strides[1] == 1 and strides[3] == image.shape[1]:
        return "channels_last"
    return "rows" if strides[3] == 1 else None
