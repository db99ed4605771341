"""The table of packed weights: built once, rebuilt when the weights change, invisible everywhere else.

Every route by which a weight can change is in test_stale_weights.py.
"""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pvt_fast import _C, PVT_V2
from pvt_fast.ops import Backend, Support, packing, reference
from pvt_fast.ops.packing import CALLS, packed


class Builder:
    """Packs by summing, and counts."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.builds = [tensor.detach() for tensor in tensors], 0

    def __call__(self, _: object = None) -> float:
        self.builds += 1
        return sum(float(tensor.sum()) for tensor in self.tensors)


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(3, 4)


def use(layer: nn.Linear, key: str = "layout") -> tuple[float, int]:
    build = Builder(layer.weight, layer.bias)
    return packed("sum", key, (layer.weight, None, layer.bias), build), build.builds


def test_builds_once(layer):
    first, builds = use(layer)
    assert builds == 1
    for _ in range(3):
        assert use(layer) == (first, 0)


def test_another_key_rebuilds(layer):
    assert [use(layer, isa)[1] for isa in ("avx2", "avx512", "avx512", "avx2")] == [1, 1, 0, 1]


def test_other_weights_and_kinds_have_records_of_their_own(layer):
    other = copy.deepcopy(layer)
    assert [use(each)[1] for each in (layer, other, layer, other)] == [1, 1, 0, 0]
    assert packed("other", "layout", (layer.weight, layer.bias), lambda _: "other") == "other"
    assert use(layer)[1] == 0


def test_forget_and_doubt(layer):
    use(layer)
    packing.doubt()
    assert use(layer)[1] == 0  # compared, and found the same
    packing.forget([layer.bias])
    assert use(layer)[1] == 1


def test_what_a_compiled_graph_packs_is_compared_as_a_whole_at_the_next_use():
    """A graph raises the version of what it changes before it runs, so that what it packs may be of values before."""
    layer = nn.Linear(1, 2 * 64 * 1024)
    with packing.within_graph():
        assert use(layer)[1] == 1
        layer.weight.data[-1] += 1  # not in the part that is compared first
    assert use(layer)[1] == 1
    assert use(layer)[1] == 0


def in_place(layer):
    with torch.no_grad():
        layer.weight.add_(1)


def through_data(layer):
    layer.weight.data = layer.weight.data + 1


def transposed_in_place(layer):
    layer.weight.data = layer.weight.data.view(3, 4).t()


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


def behind_torchs_back(layer):
    layer.weight.detach().numpy()[:] += 1


@pytest.mark.parametrize(
    "change",
    [in_place, through_data, transposed_in_place, replaced, loaded, assigned, converted, stepped, bias_only,
     behind_torchs_back],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_change_of_the_weights_rebuilds(layer, change):
    before, _ = use(layer)
    change(layer)
    after, builds = use(layer)
    assert builds == 1
    assert after == Builder(layer.weight, layer.bias)()
    assert change in (converted, transposed_in_place) or after != before
    assert use(layer) == (after, 0)


def test_a_tensor_at_a_reused_address_rebuilds():
    """Address, version and values may all repeat in other memory; the storage does not."""
    memory = np.zeros(4, np.float32)
    first = torch.from_numpy(memory)
    assert packed("k", None, (first,), lambda _: "first") == "first"
    del first
    second = torch.from_numpy(memory)
    assert packed("k", None, (second,), lambda _: "second") == "second"


def test_another_view_of_the_same_memory_is_the_same_weight():
    memory = torch.arange(8.0)
    assert packed("k", None, (memory[:4],), lambda _: "first") == "first"
    assert packed("k", None, (memory[:4].detach(),), lambda _: "second") == "first"
    assert packed("k", None, (memory[:2],), lambda _: "third") == "third"


def test_inference_tensors_have_no_version_and_still_cache():
    with torch.inference_mode():
        layer = nn.Linear(3, 4)
    assert layer.weight.is_inference()
    assert [use(layer)[1] for _ in range(3)] == [1, 0, 0]
    with torch.inference_mode():
        assert use(layer)[1] == 0
        layer.weight.add_(1)
        assert use(layer)[1] == 1


def test_a_failed_build_leaves_no_trace(layer):
    with pytest.raises(ZeroDivisionError):
        packed("sum", "layout", (layer.weight, None, layer.bias), lambda _: 1 / 0)
    assert use(layer)[1] == 1


def test_memory_of_another_address_leaves_no_record_of_the_old(layer):
    """As FSDP resizes storages around each forward. Weights that other ops share keep their other records."""
    before, storage = len(packing.records), layer.weight.untyped_storage()
    other = nn.Linear(3, 4)
    values = layer.weight.detach().clone()
    others = [torch.empty(0) for _ in range(4)]
    for index in range(4):
        packed("sum", "layout", (layer.weight, layer.bias), lambda _: None)
        packed("sum", "layout", (layer.weight, other.bias), lambda _: None)
        assert len(packing.records) == before + 2
        size = storage.nbytes()
        storage.resize_(0)
        others[index] = torch.empty(size, dtype=torch.uint8)  # takes the address
        storage.resize_(size)
        layer.weight.data.copy_(values)


def test_a_step_that_raised_mutes_no_check(layer):
    """torch tells of steps that succeed only."""

    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise ZeroDivisionError

    use(layer)
    with pytest.raises(ZeroDivisionError):
        Fails([layer.weight]).step()
    packing.doubt()  # as train() and eval() do
    use(layer)
    layer.weight.data[0, 0] += 1
    with packing.checked_weights(), pytest.raises(packing.UnannouncedChange):
        use(layer)


def test_what_was_dropped_leaves_nothing(layer):
    before = len(packing.places)
    for drop in (lambda: packing.forget([layer.weight]), torch.optim.SGD([layer.weight], lr=0.1).step):
        for _ in range(3):
            use(layer)
            assert len(packing.places) == before + 1
            drop()
            assert len(packing.places) == before
            layer.weight.data = layer.weight.data.clone()


def test_records_die_with_their_weights(layer):
    before = len(packing.records)
    use(layer)
    assert len(packing.records) == before + 1
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.zeros(4, 3)))  # refuses weak references to a tensor
    assert len(packing.records) == before


def test_steps_drop_what_trains_and_put_the_rest_in_doubt(layer):
    frozen = copy.deepcopy(layer).requires_grad_(False)
    use(layer)
    use(frozen)
    frozen.weight.data.view(-1)[5] += 1
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=1.0, fused=True).step()
    assert use(layer)[1] == 1
    assert use(frozen)[1] == 1


# -- the comparison of values ----------------------------------------------------------------------------------------


def watch(*arrays: np.ndarray) -> _C.Watch:
    return _C.Watch([(array.ctypes.data, array.nbytes) for array in arrays])


@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 63, 4095, 4096, 4097, 100_001])
def test_every_byte_counts(size):
    """Each byte of a region, changed by each single bit, is a change; and no change is none."""
    memory = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    watched = watch(memory)
    assert watched.first_changed() == -1
    for at in {0, 1, size // 2, size - 1} & set(range(size)):
        for bit in range(8):
            memory[at] ^= 1 << bit
            assert watched.first_changed() == 0
            assert not all(watched.next() for _ in range(CALLS))
            memory[at] ^= 1 << bit
    assert watched.first_changed() == -1
    assert all(watched.next() for _ in range(2 * CALLS))


@pytest.mark.parametrize(
    "change",
    [lambda w: -w, lambda w: w * 0.999, lambda w: w[::-1], lambda w: np.roll(w, 1), lambda w: w + 1, lambda w: 0 * w],
    ids=["negated", "decayed", "reversed", "rolled", "shifted", "zeroed"],
)
def test_a_change_all_over_is_seen_by_the_next_part(change):
    values = [np.random.default_rng(0).standard_normal(size).astype(np.float32) for size in (300_000, 64, 5000)]
    for index, array in enumerate(values):
        for part in range(CALLS):
            watched = watch(*values)
            assert all(watched.next() for _ in range(part))
            before = array.copy()
            array[:] = change(array)
            assert watched.first_changed() == index
            assert not watched.next()
            array[:] = before


def test_regions_may_be_empty_and_must_have_addresses():
    assert watch(np.zeros(0, np.float32)).next()
    assert _C.Watch([(0, 0)]).first_changed() == -1
    with pytest.raises(ValueError, match="region must have 4 bytes of memory, got 0"):
        _C.Watch([(0, 4)])


def test_other_devices_compare_all_values_now_and_then():
    """What a CPU cannot read is compared on its device: here by the same code on CPU tensors."""
    tensors = [torch.zeros(2), torch.tensor([1.0, torch.nan, 3.0]).bfloat16()]
    snapshot = packing.Snapshot(tensors)
    assert snapshot.first_changed(tensors) == -1
    assert all(snapshot.next(tensors) for _ in range(CALLS))
    tensors[1][2] = 4
    assert snapshot.first_changed(tensors) == 1
    assert [snapshot.next(tensors) for _ in range(CALLS)] == [True] * (CALLS - 1) + [False]


# -- through the model, with a backend that packs --------------------------------------------------------------------

PACKING = "packing"


@pytest.fixture
def builds(add_backend) -> list[str]:
    """Registers a backend that "packs" (clones) the weights of the fused ops; lists the ops that packed."""
    log: list[str] = []

    def packing_op(name, gemm):
        def op(x, *arguments):
            weights = next(item for item in arguments if hasattr(item, "_fields") and not hasattr(item, "num_heads"))
            weight = getattr(weights, gemm).weight if gemm else weights.weight

            def build(_):
                log.append(name)
                return weight.detach().clone()

            form = packed(name, PACKING, (weight,), build)
            assert torch.equal(form, weight), f"{name}: stale packed weights"
            return getattr(reference, name)(x, *arguments)

        return op

    gemms = {"patch_embed": "proj", "attention": "q", "mlp": "fc1", "layer_norm": None, "head": None}
    add_backend(Backend(Support(PACKING), **{name: packing_op(name, gemm) for name, gemm in gemms.items()}))
    return log


@pytest.fixture
def model(builds) -> PVT_V2:
    model = PVT_V2(embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), num_classes=2, img_size=32)
    model.backend = PACKING
    return model.eval()


IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
PER_FORWARD = [*4 * ["patch_embed", "attention", "mlp", "layer_norm"], "head"]


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
    assert forward(model, builds) == ["mlp"]


def test_training_and_inference_share_the_packed_weights(model, builds):
    forward(model, builds)
    builds.clear()
    model(IMAGE).sum().backward()
    assert builds == []


def test_nothing_is_packed_for_longer_than_a_step(model, builds):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.0)
    for _ in range(2):  # gradients of two batches add up
        model(IMAGE).sum().backward()
    assert builds == PER_FORWARD
    optimizer.step()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(own & set(record.addresses) for record in packing.records.values())


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


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_model_are_packed_apart(model, builds, how):
    forward(model, builds)
    if how == "deepcopy":
        clone = copy.deepcopy(model)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    assert forward(clone, builds) == PER_FORWARD
    assert forward(model, builds) == []


def test_what_is_packed_dies_with_the_model(model, builds):
    gc.collect()
    before = len(packing.records)
    clone = copy.deepcopy(model)
    forward(clone, builds)
    assert len(packing.records) == before + len(PER_FORWARD)
    del clone
    gc.collect()
    assert len(packing.records) == before


def test_of_mixtures_of_weights_the_newest_are_kept():
    """Modules mixed at random, as where architectures are searched: not a form for each mixture that ever was."""
    norm, others = torch.ones(3), [torch.randn(3) for _ in range(packing.MIXTURES + 5)]
    before = len(packing.records)
    for other in others:
        packed("mixture", "layout", (norm, other), lambda _: "form")
    assert len(packing.records) == len(packing.places) == before + packing.MIXTURES
    builds = [Builder(norm, other) for other in (others[0], others[-1])]
    for other, build in zip((others[0], others[-1]), builds, strict=True):
        packed("mixture", "layout", (norm, other), build)
    assert [build.builds for build in builds] == [1, 0]
