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
from ..accelerate.guard import Guard, Moment, ambient, edges, facts
from ..backend import dispatch
from ..ops import WholeForward, is_plain, packing, tensors_in
from . import compiled

if TYPE_CHECKING:
    from ..model import PVT_V2

# Of the first stage's map. Above it Python's part is nothing, and the maps' memory better goes back after the call.
_MOST_BYTES = 32 << 20


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
        if _needs_gradients(model, image) or not fits(model, image):
            return None
        program, variant = self.program, backend.whole.variant()
        if program is not None and program.holds(model, image, variant):
            return program.run(image)
        state = State.of(model, image, variant)
        with packing.collected() as records:
            logits = model.forward_head(model.forward_features(image))
        self.program = None if state is None else record(model, image, state, records, backend.whole)
        return logits

    def __deepcopy__(self, memo: dict) -> Whole:
        return Whole()

    def __reduce__(self) -> tuple:
        return Whole, ()


class State:
    """All that a model's forward on an image reads but for the parameters' values, as it was at one moment."""

    def __init__(self, model: PVT_V2, image: Tensor, variant: str, guard: Guard, fused: list[Fused]) -> None:
        self.variant, self.dtype, self.layout, self.channels = variant, image.dtype, _layout(image), image.shape[1]
        _ = model.config  # which follows a replaced head when it is asked
        self.settings, self.guard = model.forward_settings(), guard
        soon = _lines(tuple(model.parameters()))
        self.facts, self.kept = facts(model, guard, parameters=True, soon=soon)
        # from what the facts compare with: read again, a value may be another for that once
        calls = [call for piece in fused for call in piece.calls(Moment(self.kept))]
        self.keys = [packing.key_of(variant, *call) for call in calls]
        self.pieces = [tensors_in(weights) for weights, *_ in calls]  # the parameters of each op of a forward, in order
        self.parameters = tuple({id(tensor): tensor for piece in self.pieces for tensor in piece}.values())

    @classmethod
    def of(cls, model: PVT_V2, image: Tensor, variant: str) -> State | None:
        """None where a forward is more than ops."""
        guard = Guard(edges(model._modules.items()))
        known = {id(module) for _, module in guard.modules}
        if not model.is_as_published():
            return None
        if not all(is_plain(parameter) for parameter in model.parameters()):
            return None
        fused = [stand_in.current(owner) for owner, stand_in in model.stand_ins()]
        if not all(
            piece is not None and piece.whole and all(id(module) in known for module, _, _ in piece.parameters)
            for piece in fused
        ):
            return None
        state = cls(model, image, variant, guard, fused)
        # asked last: it is one moment only if nothing was changed in between
        return state if guard.changed(model) is None and guard.disturbed(model) is None else None

    def holds(self, model: PVT_V2, image: Tensor, variant: str) -> bool:
        """Would a forward read the same now?"""
        if image.dtype != self.dtype or variant != self.variant or _layout(image) != self.layout:
            return False
        if image.shape[1] != self.channels or not model.calls_its_own() or model.forward_settings() != self.settings:
            return False
        return model._modules is self.kept[0] and self.guard.others_hold() and self.facts.hold(model)


class Program:
    """The packed ops of a forward, and all that must still be so for them to be the model's forward."""

    def __init__(self, state: State, records: list[packing.Record], whole: WholeForward) -> None:
        self.state, self.records = state, records
        self.forward = whole.link([used.form for used in records])
        self.parameters, self.head = state.parameters, state.pieces[-1][0]
        self.sources = packing.Sources(self.parameters, packing.aliases(self.parameters), keep=True)

    def holds(self, model: PVT_V2, image: Tensor, variant: str) -> bool:
        """Would running op by op do the same?"""
        if any(used.dropped for used in self.records) or not self.state.holds(model, image, variant):
            return False
        # asked at once, as another number of logits would be returned; other shapes are among the values
        if self.head.shape[0] != self.forward.classes:
            return False
        if self.sources.hold_values(self.parameters):
            return True
        packing.doubt()  # of which op's weights it is that have changed
        return False

    def run(self, image: Tensor) -> Tensor:
        """image (B, Cin, H, W) -> logits (B, num_classes)."""
        batch, _, height, width = image.shape
        out = torch.empty((batch, self.forward.classes), dtype=image.dtype, device=image.device)
        self.forward.run(packing.span(image), (batch, height, width), image.stride(), packing.span(out))
        return out


def fits(model: PVT_V2, image: Tensor) -> bool:
    """Is `image` of a kind and size that programs are for?"""
    tokens = image.shape[0] * (image.shape[2] // 4) * (image.shape[3] // 4)
    small = tokens * model.forward_settings()[0].embed_dims[0] * image.element_size() <= _MOST_BYTES
    return small and image.dtype in (torch.float32, torch.bfloat16) and _layout(image) is not None


def record(
    model: PVT_V2, image: Tensor, state: State, records: list[packing.Record], whole: WholeForward
) -> Program | None:
    """The forward that has just run op by op on `image`, in a model that was in `state` before it.

    None where it is more than its packed ops, or where another thread changed something meanwhile.
    """
    # weights that are computed at each forward (parametrizations, say) are packed at each forward
    if [used.key for used in records] != state.keys:
        return None
    program = Program(state, records, whole)
    # It compares with the values of now. What the ops were packed from may have changed since, unseen as yet.
    if not all(_is_packed_of(used, piece) for used, piece in zip(records, state.pieces, strict=True)):
        packing.doubt()
        return None
    return program if program.holds(model, image, state.variant) else None


def _is_packed_of(used: packing.Record, piece: list[Tensor]) -> bool:
    by_address = {parameter.data_ptr(): parameter for parameter in piece}
    if by_address.keys() != set(used.addresses):
        return False
    return used.sources.hold_all([by_address[address] for address in used.addresses])


def _needs_gradients(model: nn.Module, image: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return image.requires_grad or any(parameter.requires_grad for parameter in model.parameters())


def _lines(tensors: tuple[Tensor, ...]) -> list[int]:
    """Addresses of the cache lines that a check of `tensors` reads: of each its object, its C++ part and its storage.

    A forward leaves none of them in the inner caches, and one after another they take longer than all the rest.
    """
    dense = [t for t in tensors if t.layout is torch.strided]
    regions = [((id(t), 64), (t._cdata, 256), (t.untyped_storage()._cdata, 128)) for t in dense]
    return [start + at for regions_of in regions for start, size in regions_of for at in range(0, size, 64)]


def _layout(image: Tensor) -> str | None:
    """How the first op's weights are packed for this image; None where it is copied first."""
    strides = image.stride()
    if strides[1] == 1 and strides[3] == image.shape[1]:
        return "channels_last"
    return "rows" if strides[3] == 1 else None
