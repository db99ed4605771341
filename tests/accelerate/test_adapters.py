"""peft's adapters and torchao's quantized weights, on our model and on an accelerated one, after it has run fused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
import torch.nn.functional as F
from fused_models import MODELS, accelerated, assert_rounding, image, own, plain
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import pvt_fast

LABELS = torch.tensor([1, 2])

kinds = pytest.mark.parametrize("kind", MODELS)


# what peft itself says of adapters that train biases, and of those that multiply
pytestmark = pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers", "ignore:Unmerge result can be")


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q", "kv"], "modules_to_save": ["head"]} | options)


CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lora,
    "lora of every layer": lambda: lora(target_modules=["q", "kv", "proj", "sr", "fc1", "fc2"]),
    "dora": lambda: lora(use_dora=True),
    "rslora with dropout": lambda: lora(use_rslora=True, lora_dropout=0.3),
    "trained biases": lambda: lora(bias="all"),
    "ia3": lambda: IA3Config(target_modules=["q", "kv", "fc2"], feedforward_modules=["fc2"], modules_to_save=["head"]),
}
configs = pytest.mark.parametrize("config", CONFIGS)


def warm(kind: str) -> nn.Module:
    """A model that has been called: its weights are packed."""
    model = MODELS[kind]()
    with torch.no_grad():
        for _ in range(3):
            model(image())
    return model


def train(model: nn.Module, steps: int = 3, **options) -> list[Tensor]:
    """The logits before each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **options)
    model.train()
    answers = []
    for _ in range(steps):
        torch.manual_seed(1)  # of dropout
        logits = model(image())
        answers.append(logits.detach())
        optimizer.zero_grad()
        F.cross_entropy(logits, LABELS).backward()
        optimizer.step()
    model.eval()
    return answers


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(image())


@kinds
@configs
def test_adapters_train_as_on_the_plain_model(kind, config):
    base = warm(kind)
    clone = copy.deepcopy(base)
    torch.manual_seed(0)
    model = get_peft_model(base, CONFIGS[config]())
    torch.manual_seed(0)
    expected = get_peft_model(clone, CONFIGS[config]())
    ours, theirs = train(model, fused=True), []
    plain(lambda: theirs.extend(train(expected)) or answer(expected))
    for actual, reference in zip(ours, theirs, strict=True):
        assert_rounding(actual, reference)
    assert not torch.allclose(ours[0], ours[-1], atol=1e-2)
    assert_rounding(answer(model), plain(lambda: answer(model)))


@kinds
@configs
def test_merged_unmerged_and_disabled_adapters(kind, config):
    base = warm(kind)
    before = answer(base)
    model = get_peft_model(base, CONFIGS[config]())
    train(model)
    adapted = answer(model)
    with model.disable_adapter():
        if config != "trained biases":  # which are the model's own
            torch.testing.assert_close(answer(model), before, rtol=1e-4, atol=1e-4)
        assert_rounding(answer(model), plain(lambda: answer(model)))
    assert torch.equal(answer(model), adapted)
    model.merge_adapter()
    torch.testing.assert_close(answer(model), adapted, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(answer(model), adapted, rtol=1e-3, atol=1e-3)
    merged = model.merge_and_unload()
    assert merged is base
    torch.testing.assert_close(answer(merged), adapted, rtol=1e-3, atol=1e-3)
    assert_rounding(answer(merged), plain(lambda: answer(merged)))
    assert not any(piece.reason for piece in pvt_fast.explain(merged).pieces)


@kinds
def test_what_is_adapted_is_named(kind):
    reasons = {piece.path: piece.reason for piece in pvt_fast.explain(get_peft_model(warm(kind), lora())).pieces}
    if kind == "own":
        assert reasons["base_model.model.block1.0"] == "attention: its attn.q is a peft.tuners.lora.layer.Linear"
        assert reasons["base_model.model.head"] == "its head is a ModulesToSaveWrapper"
    else:
        assert reasons["base_model.model.stages.0.blocks.0"] == "its q was replaced"


@kinds
def test_adapters_are_saved_and_loaded(kind, tmp_path):
    base = warm(kind)
    model = get_peft_model(copy.deepcopy(base), lora())
    train(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert_rounding(answer(again), answer(model))


QUANTIZED = {"weights": Int8WeightOnlyConfig, "weights and activations": Int8DynamicActivationInt8WeightConfig}


@pytest.mark.parametrize("config", QUANTIZED)
@pytest.mark.parametrize("make", [own, accelerated])
@torch.no_grad()
def test_quantized_weights_are_used(make, config):
    model = make()
    before = answer(model)
    answer(model)
    quantize_(model, QUANTIZED[config]())
    after = answer(model)
    torch.testing.assert_close(after, plain(lambda: answer(model)), rtol=2e-2, atol=2e-2)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0.2, atol=0.2)
