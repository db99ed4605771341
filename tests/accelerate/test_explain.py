"""`explain`: what of a model runs on the ops now, on which backend, and why not the rest."""

from __future__ import annotations

import pytest
import timm
import torch
from fused_models import accelerated, blocks, own
from inside import program_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pvt_fast
from pvt_fast import Piece, explain
from pvt_fast.accelerate import fused
from pvt_fast.layers import Block


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


OWN = [
    ("patch_embed1", ("patch_embed",)),
    ("block1.0", ("attention", "mlp")),
    ("block1.1", ("attention", "mlp")),
    ("norm1", ("layer_norm",)),
    ("patch_embed2", ("patch_embed",)),
    ("block2.0", ("attention", "mlp")),
    ("block2.1", ("attention", "mlp")),
    ("norm2", ("layer_norm",)),
    ("head", ("head",)),
]


def piece(model: nn.Module, path: str) -> Piece:
    (found,) = [piece for piece in explain(model).pieces if piece.path == path]
    return found


def others(model: nn.Module, path: str) -> list[Piece]:
    """All pieces but one, which must be fused."""
    pieces = [piece for piece in explain(model).pieces if piece.path != path]
    assert all(piece.fused and piece.backend == "cpp" and not piece.reason for piece in pieces)
    return pieces


@pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
def test_a_model_of_ours_is_fused_in_all_its_pieces(linear):
    explanation = explain(own(linear=linear))
    assert [(piece.path, piece.fused) for piece in explanation.pieces] == OWN
    assert {(piece.backend, piece.reason) for piece in explanation.pieces} == {("cpp", "")}
    lines = str(explanation).splitlines()
    assert lines[0] == "9 of 9 pieces fused"
    assert lines[2] == "  block1.0: attention and mlp on cpp"
    assert len(lines) == 10


def test_it_follows_the_backend():
    model = own()
    model.backend = "reference"
    assert {piece.backend for piece in explain(model).pieces} == {"reference"}
    model.backend = "auto"  # the tests' default is the reference
    assert {piece.backend for piece in explain(model).pieces} == {"reference"}
    with pvt_fast.use_backend("cpp"):
        assert {piece.backend for piece in explain(model).pieces} == {"cpp"}


def test_auto_without_a_faster_backend_is_said_to_be_plain():
    model = own().double()
    model.backend = "auto"
    with pvt_fast.use_backend("auto"):
        for piece in explain(model).pieces:
            assert (piece.fused, piece.backend) == ((), None)
            assert piece.reason == "no backend is faster than plain torch here"


def test_a_backend_that_cannot_run_is_told_and_not_raised():
    model = own().double()
    for piece in explain(model).pieces:
        assert piece.backend is None
        assert "float64" in piece.reason
    assert str(explain(model)).startswith("0 of 9 pieces fused")


@pytest.mark.parametrize("make", [own, accelerated])
@pytest.mark.parametrize("whose", ["instance", "class"])
def test_a_forward_of_the_blocks_own_is_told(make, whose, monkeypatch):
    model = make()
    block, kind = blocks(model)[0], {own: Block, accelerated: timm.models.pvt_v2.Block}[make]
    monkeypatch.setattr(block if whose == "instance" else kind, "forward", lambda *args: args[-2])
    found = [piece for piece in explain(model).pieces if "own forward" in str(piece)]
    assert len(found) == (1 if whose == "instance" else len(blocks(model)))
    expected = "it has a forward of its own" if whose == "instance" else "the forward of Block was replaced"
    assert {piece.reason for piece in found} == {expected}


def test_lora_on_the_queries_leaves_the_mlp_fused():
    model = own()
    block = blocks(model)[1]
    block.attn.q = LoRA(block.attn.q)
    found = piece(model, "block1.1")
    assert (found.fused, found.backend) == (("mlp",), "cpp")
    assert found.reason == "attention: its attn.q is a LoRA"
    assert "block1.1: mlp on cpp (attention: its attn.q is a LoRA)" in str(explain(model))
    assert len(others(model, "block1.1")) == 8
    block.attn.q = block.attn.q.base
    assert piece(model, "block1.1").fused == ("attention", "mlp")


def test_an_activation_of_ones_own_leaves_the_attention_fused():
    model = own()
    blocks(model)[0].mlp.act = nn.SiLU()
    found = piece(model, "block1.0")
    assert found.fused == ("attention",)
    assert found.reason == "mlp: its mlp.act is a SiLU"


def test_lora_in_both_halves_leaves_a_block_to_itself():
    model = own()
    block = blocks(model)[2]
    block.attn.kv, block.mlp.fc1 = LoRA(block.attn.kv), LoRA(block.mlp.fc1)
    found = piece(model, "block2.0")
    assert (found.fused, found.backend) == ((), None)
    assert found.reason == "attention: its attn.kv is a LoRA; mlp: its mlp.fc1 is a LoRA"
    assert "block2.0: its own forward (attention: " in str(explain(model))
    others(model, "block2.0")


def test_parametrized_weights_are_named():
    model = own()
    parametrize.register_parametrization(blocks(model)[0].mlp.fc2, "weight", Half())
    assert piece(model, "block1.0").fused == ("attention",)
    assert "mlp.fc2" in piece(model, "block1.0").reason


def test_a_replaced_head():
    model = own()
    model.reset_classifier(3)
    assert piece(model, "head").fused == ("head",)
    model.head = nn.Sequential(nn.Linear(16, 4), nn.Tanh())
    found = piece(model, "head")
    assert (found.fused, found.backend) == ((), None)
    assert found.reason == "its head is a Sequential"
    others(model, "head")
    model.reset_classifier(0)
    assert piece(model, "head").fused == ()
    assert piece(model, "head").reason


def test_a_replaced_block_is_no_piece_of_ours():
    model = own()
    model.block1[1] = nn.Identity()
    assert "block1.1" not in [piece.path for piece in explain(model).pieces]
    assert len(explain(model).pieces) == 8


@pytest.mark.parametrize(
    ("path", "piece_of"),
    [
        ("block1.1.attn.q", "block1.1"),
        ("block1.1.norm1", "block1.1"),
        ("patch_embed2.proj", "patch_embed2"),
        ("norm1", "norm1"),
        ("head", "head"),
    ],
)
def test_hooks_are_told_of_while_they_are_there(path, piece_of):
    model = own()
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: None)
    found = piece(model, piece_of)
    assert (found.fused, found.backend) == ((), None)
    assert found.reason == f"there are hooks on its {path.rpartition('.')[2]}"
    others(model, piece_of)
    handle.remove()
    assert piece(model, piece_of).fused


def test_hooks_on_all_modules_are_told_of():
    model = own()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert {piece.reason for piece in explain(model).pieces} == {"there are hooks on all modules"}
    finally:
        handle.remove()
    assert all(piece.fused for piece in explain(model).pieces)


def test_dropout_in_training_is_told_of():
    model = own(drop_rate=0.1)
    assert all(not piece.reason for piece in explain(model).pieces)
    model.train()
    assert piece(model, "block1.0").reason == "dropout is in force"
    assert piece(model, "patch_embed1").fused


def test_explaining_changes_nothing():
    model, x = own(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = [model(x) for _ in range(3)]
        program = program_of(model)
        explain(model)
        assert torch.equal(model(x), expected[-1])
    assert program_of(model) is program


def test_an_accelerated_model():
    model = accelerated()
    explanation = explain(model)
    assert [piece.path for piece in explanation.pieces] == [f"stages.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]
    assert {(piece.fused, piece.backend, piece.reason) for piece in explanation.pieces} == {
        (("attention", "mlp"), "cpp", "")
    }
    assert str(explanation).startswith("4 of 4 pieces fused\n  stages.0.blocks.0: attention and mlp on cpp")
    blocks(model)[1].mlp.act = nn.SiLU()
    found = piece(model, "stages.0.blocks.1")
    assert (found.fused, found.backend) == ((), None)
    assert found.reason.startswith("its ")
    pvt_fast.accelerate_(model, backend="reference", mlp=False)
    assert piece(model, "stages.0.blocks.0").fused == ("attention",)
    assert piece(model, "stages.0.blocks.0").backend == "reference"
    pvt_fast.restore_(model)
    assert explain(model).pieces == ()


def test_a_half_that_was_refused_is_told_of():
    model = accelerated()
    pvt_fast.restore_(model)
    blocks(model)[1].mlp.act = nn.SiLU()
    pvt_fast.accelerate_(model, backend="cpp")
    found = piece(model, "stages.0.blocks.1")
    assert found.fused == ("attention",)
    assert found.reason == "mlp: mlp.act must be the exact GELU, got SiLU()"


def test_a_model_within_another():
    outer = nn.Sequential(nn.Identity(), own(), accelerated())
    paths = [piece.path for piece in explain(outer).pieces]
    assert paths == [f"1.{path}" for path, _ in OWN] + [f"2.stages.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]


def test_a_block_by_itself():
    (found,) = explain(blocks(own())[0]).pieces
    assert (found.path, found.fused) == ("", ("attention", "mlp"))
    assert str(found) == "the model: attention and mlp on cpp"


def test_nothing_that_is_known():
    explanation = explain(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert explanation.pieces == ()
    assert str(explanation) == "nothing of it is known to pvt_fast; accelerate_(model) finds blocks in models of others"


@torch.no_grad()
def test_what_was_logged_once_is_not_kept_for_every_image_size():
    """A hook makes a block say why it runs its own forward: once, whatever the images."""
    model = pvt_fast.PVT_V2(
        embed_dims=(8, 16, 24, 32), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), num_classes=3
    ).eval()
    model.backend = "cpp"
    model.block1[0].attn.register_forward_hook(lambda *_: None)
    model(torch.randn(1, 3, 64, 64))
    kept = fused.log.cache_info().currsize
    for size in range(65, 80):
        model(torch.randn(1, 3, size, 2 * size))
    assert fused.log.cache_info().currsize == kept
