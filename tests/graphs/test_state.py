"""What a CUDA graph and a compiled graph rely on: that a model which has changed is seen to be another."""

import pytest
import torch
from test_program import CHANGES, image, make, run

from pvt_fast.graphs.cuda_graph import CapturedModel
from pvt_fast.graphs.state import Recorded, State

# How `change` tells of those that are no modules' own settings or places.
WORDS = {
    "replace_module": "its block1 was replaced|its q was replaced",
    "hook": "there are hooks on its 0",
    "change_eps": "eps of its",
    "change_scale": "scale of its attn was changed",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen_and_has_its_words(change):
    model = make()
    run(model, image())
    recorded = Recorded(State(model), list(model.parameters()))
    assert recorded.holds(model)
    change(model)
    assert not recorded.holds(model)
    words = recorded.change(model)
    if change.__name__ in WORDS:
        assert any(each in words for each in WORDS[change.__name__].split("|"))
    captured = object.__new__(CapturedModel)  # which only a CUDA device makes
    captured._model, captured._recorded, captured._image, captured._products = model, recorded, image(), None
    with pytest.raises(RuntimeError, match="captured model: the model must be as it was captured, got a changed one: "):
        captured(image())
    other = pytest.raises(RuntimeError, match=r"autocast must be as at the capture, off, got on, to torch\.bfloat16")
    with torch.autocast("cpu", torch.bfloat16), other:
        captured(image())


def test_values_written_past_torch_are_seen_within_the_promised_calls():
    model = make()
    recorded = Recorded(State(model), list(model.parameters()))
    model.block2[0].mlp.fc1.weight.data[3, 5] += 1
    assert not all(recorded.holds(model) for _ in range(64))


def test_other_settings_make_another_model():
    model = make()
    recorded = Recorded(State(model), list(model.parameters()))
    model.global_pool = ""
    assert not recorded.holds(model)
    assert recorded.change(model) == "its settings or parameters have changed"
    model.global_pool = "avg"
    assert recorded.holds(model)
    with torch.no_grad():
        model.norm1.weight.add_(1)
    assert not recorded.holds(model)
