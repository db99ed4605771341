"""The cache of packed weights: built once, rebuilt when the weights change, invisible everywhere else."""

import copy
import io
import pickle
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from pvt_fast import PVT_V2, dispatch, prepack, reference
from pvt_fast.prepack import PackCache, packed


class Builder:
    """Packs by summing, and counts."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.builds = [tensor.detach() for tensor in tensors], 0

    def __call__(self) -> float:
        self.builds += 1
        return sum(float(tensor.sum()) for tensor in self.tensors)


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(3, 4)


def use(cache: PackCache, layer: nn.Linear, key: str = "layout") -> tuple[float, int]:
    build = Builder(layer.weight, layer.bias)
    return packed(cache, key, (layer.weight, layer.bias), build), build.builds


def test_builds_once(layer):
    cache = PackCache()
    first, builds = use(cache, layer)
    assert builds == 1
    for _ in range(3):
        assert use(cache, layer) == (first, 0)


def test_no_cache_builds_each_time(layer):
    assert [use(None, layer)[1] for _ in range(2)] == [1, 1]


def test_another_key_rebuilds(layer):
    cache = PackCache()
    use(cache, layer, "avx2")
    assert use(cache, layer, "avx512")[1] == 1
    assert use(cache, layer, "avx512")[1] == 0


def test_drop_forgets(layer):
    cache = PackCache()
    use(cache, layer)
    cache.drop()
    assert use(cache, layer)[1] == 1


def test_what_a_compiled_graph_packs_is_for_graphs(layer):
    cache = PackCache()
    for builds in (1, 0):
        with prepack.within_graph():
            assert use(cache, layer)[1] == builds
    assert use(cache, layer)[1] == 1
    with prepack.within_graph():
        assert use(cache, layer)[1] == 0
    assert use(cache, layer)[1] == 0


def in_place(layer):
    with torch.no_grad():
        layer.weight.add_(1)


def through_data(layer):
    layer.weight.data = layer.weight.data + 1


def replaced(layer):
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


def loaded(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def assigned(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)


def converted(layer):
    layer.to(torch.float64)


def stepped(layer):
    layer(torch.ones(2, 3)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()


def bias_only(layer):
    with torch.no_grad():
        layer.bias.mul_(2).add_(1)


@pytest.mark.parametrize(
    "change",
    [in_place, through_data, replaced, loaded, assigned, converted, stepped, bias_only],
    ids=lambda f: f.__name__,
)
def test_a_change_of_the_weights_rebuilds(layer, change):
    cache = PackCache()
    before, _ = use(cache, layer)
    change(layer)
    after, builds = use(cache, layer)
    assert builds == 1
    assert after == Builder(layer.weight, layer.bias)()
    assert change is converted or after != before
    assert use(cache, layer) == (after, 0)


def test_a_tensor_at_a_reused_address_rebuilds():
    """Address and version may both repeat for another tensor; the object does not."""
    memory = torch.zeros(8)
    first, second = memory[:4], memory[:4]
    cache = PackCache()
    assert packed(cache, "k", (first,), lambda: "first") == "first"
    assert packed(cache, "k", (second,), lambda: "second") == "second"


def test_inference_tensors_have_no_version_and_still_cache():
    with torch.inference_mode():
        layer = nn.Linear(3, 4)
    cache = PackCache()
    assert layer.weight.is_inference()
    assert [use(cache, layer)[1] for _ in range(3)] == [1, 0, 0]
    with torch.inference_mode():
        assert use(cache, layer)[1] == 0


def test_a_failed_build_leaves_no_trace(layer):
    cache = PackCache()
    with pytest.raises(ZeroDivisionError):
        packed(cache, "layout", (layer.weight, layer.bias), lambda: 1 / 0)
    assert use(cache, layer)[1] == 1


def test_copies_and_pickles_are_empty(layer):
    cache = PackCache()
    use(cache, layer)
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(other, PackCache)
        assert other is not cache
        assert other.packed is None
        assert use(other, layer)[1] == 1
    assert use(cache, layer)[1] == 0


# -- through the model, with a backend that packs --------------------------------------------------------------------

PACKING = "packing"


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Registers a backend that "packs" (clones) the weights of the fused ops; lists the ops that packed."""
    log: list[str] = []
    module = ModuleType("tests_packing_backend")

    def packing(name, gemm):
        def op(x, *arguments):
            weights = next(item for item in arguments if hasattr(item, "cache"))
            weight = getattr(weights, gemm).weight if gemm else weights.weight

            def build():
                log.append(name)
                return weight.detach().clone()

            form = packed(weights.cache, PACKING, (weight,), build)
            assert torch.equal(form, weight), f"{name}: stale packed weights"
            return getattr(reference, name)(x, *arguments)

        return op

    gemms = {"overlap_patch_embed": "proj", "sr_attention": "q", "dwconv_mlp": "fc1", "layer_norm": None, "head": None}
    for name, gemm in gemms.items():
        setattr(module, name, packing(name, gemm))
    module.unsupported = reference.unsupported
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(dispatch.ORDER, PACKING, module.__name__)
    yield log
    dispatch.load.cache_clear()


@pytest.fixture
def model(builds) -> PVT_V2:
    model = PVT_V2(embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), num_classes=2, img_size=32)
    model.backend = PACKING
    return model.eval()


IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
PER_FORWARD = [*4 * ["overlap_patch_embed", "sr_attention", "dwconv_mlp", "layer_norm"], "head"]


def forward(model: PVT_V2, builds: list[str]) -> list[str]:
    builds.clear()
    with torch.no_grad():
        model(IMAGE)
    return list(builds)


def test_a_model_packs_each_layer_once(model, builds):
    assert forward(model, builds) == PER_FORWARD
    assert forward(model, builds) == []
    with torch.no_grad():
        model.block2[0].mlp.fc1.weight.mul_(2)
    assert forward(model, builds) == ["dwconv_mlp"]


def test_training_and_inference_share_the_packed_weights(model, builds):
    forward(model, builds)
    builds.clear()
    model(IMAGE).sum().backward()
    assert builds == []


def test_conversion_and_loading_repack(model, builds):
    forward(model, builds)
    model.load_state_dict(model.state_dict())
    assert forward(model, builds) == PER_FORWARD
    model.to(torch.float64)
    builds.clear()
    with torch.no_grad():
        model(IMAGE.double())
    assert builds == PER_FORWARD


def test_packed_weights_stay_out_of_the_state_dict(model, builds):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward(model, builds)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not list(model.buffers())


def caches(model: PVT_V2) -> list[PackCache]:
    values = [value for layer in model.modules() for name, value in vars(layer).items() if name != "_program"]
    single = [value for value in values if isinstance(value, PackCache)]
    return single + [cache for value in values if isinstance(value, list) for cache in value]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_model_drop_the_packed_weights(model, builds, how):
    forward(model, builds)
    assert all(cache.packed is not None for cache in caches(model))
    assert len(caches(model)) == len(PER_FORWARD)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert [cache.packed for cache in caches(twin)] == [None] * len(PER_FORWARD)
    assert forward(twin, builds) == PER_FORWARD
    assert forward(model, builds) == []


def test_stamps_see_the_version_of_a_plain_tensor():
    tensor = torch.zeros(2)
    before = prepack.stamp(tensor)
    tensor.add_(1)
    assert prepack.stamp(tensor) != before
