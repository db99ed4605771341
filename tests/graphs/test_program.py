"""A model's forward as one call: the same bits as op by op, and never a stale one."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from inside import program_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pvt_fast import PVT_V2
from pvt_fast.backend import cpp
from pvt_fast.graphs import program

SIZES = {"embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8), "depths": (1, 2, 1, 1), "num_classes": 7}


def make(linear: bool = False, dtype: torch.dtype = torch.float32) -> PVT_V2:
    torch.manual_seed(0)
    model = PVT_V2(**SIZES, linear=linear, qkv_bias=True).eval().to(dtype)
    model.backend = "cpp"
    return model


def image(batch: int = 1, height: int = 64, width: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.inference_mode()
def run(model: PVT_V2, x: Tensor) -> Tensor:
    return model(x)


def op_by_op(model: PVT_V2, x: Tensor) -> Tensor:
    """A copy's first forward: copies have no program."""
    clone = copy.deepcopy(model)
    assert program_of(clone) is None
    return run(clone, x)


@pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_same_bits_at_every_size(linear, dtype):
    model = make(linear, dtype)
    run(model, image(dtype=dtype))
    program = program_of(model)
    for size in ((1, 64, 96), (3, 64, 64), (2, 83, 71), (0, 64, 64)):
        x = image(*size, dtype=dtype)
        assert torch.equal(run(model, x), op_by_op(model, x)), size
        assert program_of(model) is program


def test_both_layouts_of_an_image():
    model, x = make(), image(2)
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        laid_out = x.to(memory_format=layout)
        for _ in range(2):
            assert torch.equal(run(model, laid_out), op_by_op(model, laid_out))
    transposed = image(2).mT  # neither: it is copied
    for _ in range(2):
        assert torch.equal(run(model, transposed), op_by_op(model, transposed))


def scale_in_place(model: PVT_V2) -> None:
    with torch.no_grad():
        model.block2[1].mlp.fc1.weight.mul_(2)


def load(model: PVT_V2) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def replace_module(model: PVT_V2) -> None:
    model.block1[0].attn.q = nn.Linear(16, 16)


def replace_parameter(model: PVT_V2) -> None:
    model.norm3.bias = nn.Parameter(torch.ones(40))


def swap_data(model: PVT_V2) -> None:
    model.head.weight.data = torch.ones_like(model.head.weight)


def change_eps(model: PVT_V2) -> None:
    model.set_norm_eps(block=0.5)


def change_scale(model: PVT_V2) -> None:
    model.block3[0].attn.scale = 3.0


def drop_a_block(model: PVT_V2) -> None:
    model.block2 = nn.ModuleList([model.block2[0]])


def hook(model: PVT_V2) -> None:
    model.block4[0].register_forward_hook(lambda module, arguments, output: output * 2)


def patch_forward(model: PVT_V2) -> None:
    attention = model.block4[0].attn
    attention.forward = lambda x, *size: 2 * x


def parametrize_weight(model: PVT_V2) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(model.block1[0].mlp.fc2, "weight", Double())


def new_head(model: PVT_V2) -> None:
    model.reset_classifier(4)


CHANGES = [
    scale_in_place,
    load,
    replace_module,
    replace_parameter,
    swap_data,
    change_eps,
    change_scale,
    drop_a_block,
    hook,
    patch_forward,
    parametrize_weight,
    new_head,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_goes_unseen(change):
    model, x = make(), image()
    before = run(model, x)
    assert program_of(model) is not None
    change(model)
    for _ in range(2):
        after = run(model, x)
        assert not torch.equal(after, before)
        assert torch.equal(after, op_by_op(model, x))


def test_a_hook_on_all_modules_is_called():
    model, x, seen = make(), image(), []
    run(model, x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        run(model, x)
    finally:
        handle.remove()
    assert seen.count("Block") == 5


def test_conversion_and_instruction_set():
    model, x = make(), image()
    for isa in (*cpp.isas(), cpp.isas()[0]):
        with cpp.use_isa(isa):
            for _ in range(2):
                assert torch.equal(run(model, x), op_by_op(model, x))
    model.to(torch.bfloat16)
    for _ in range(2):
        assert torch.equal(run(model, x.bfloat16()), op_by_op(model, x.bfloat16()))


def test_training_and_gradients_go_op_by_op():
    model, x = make(), image()
    run(model, x)
    assert model(x).requires_grad
    model.train()
    run(model, x)
    assert program_of(model) is None


def test_a_model_with_a_program_is_collected():
    """What a program refers to leads back to the model: Python's collector has to see the whole cycle."""
    model = make()
    for _ in range(2):
        run(model, image())
    assert program_of(model) is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_large_maps_go_op_by_op(monkeypatch):
    monkeypatch.setattr(program, "_MAX_BYTES", 2 * 16 * 24 * 16 * 4)
    model = make()
    run(model, image(2))
    assert program_of(model) is not None
    monkeypatch.setattr(program.Program, "run", None)
    run(model, image(3))
    other = make()
    run(other, image(3))
    assert program_of(other) is None


def test_a_new_head_is_recorded_though_it_says_that_it_trains():
    model, x = make(), image()
    model.head = nn.Linear(64, 9)
    assert model.head.training
    run(model, x)
    assert program_of(model) is not None
    assert torch.equal(run(model, x), op_by_op(model, x))


@torch.no_grad()
def test_a_sliced_head_is_seen_at_once():
    """Through `.data`, which no version tells: as pruning and trimming do."""
    model, x = make(), image()
    for _ in range(3):
        run(model, x)
    assert program_of(model) is not None
    model.head.weight.data, model.head.bias.data = model.head.weight.data[:2], model.head.bias.data[:2]
    assert run(model, x).shape == (len(x), 2)
