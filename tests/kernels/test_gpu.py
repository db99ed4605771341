"""What only a CUDA device shows: graphs, streams, compiled graphs, what is compiled anew. Not collected without one."""

import copy
import sys
import threading

import pytest
import torch

import pvt_fast
from pvt_fast.kernels import workspace
from pvt_fast.testing import assert_parity

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make(name: str = "pvt_v2_b0", dtype: torch.dtype = BF16) -> pvt_fast.PVT_V2:
    model = pvt_fast.create_model(name, num_classes=10).eval().to("cuda", dtype)
    model.backend = "triton"
    return model


def images(batch: int, size: int = 64, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li"])
@pytest.mark.parametrize("batch", [1, 48])
@torch.no_grad()
def test_parity_of_whole_models(name, dtype, batch):
    """Batch 48 fills the chip in all stages, batch 1 in none."""
    model, image = make(name, dtype), images(batch, 224, dtype)
    actual = model(image)
    shown = [0, batch - 1]
    model.backend = "reference"
    plain = model(image[shown])
    truth = model.cpu().double()(image[shown].cpu().double())
    assert_parity(actual[shown], truth, plain.cpu(), f"{name} {dtype} batch {batch}")


@torch.no_grad()
def test_tf32_only_where_torch_allows_it(monkeypatch):
    model, image = make(dtype=FP32), images(4, 224, FP32)
    exact = model(image)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    fast = model(image)
    assert not torch.equal(fast, exact)
    torch.testing.assert_close(fast, exact, rtol=0, atol=2e-2 * float(exact.abs().max()))


@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_a_captured_model_answers_as_the_model(batch):
    model = make()
    captured = model.capture(images(batch))
    for seed in (1, 2, 3):
        image = images(batch, seed=seed)
        assert torch.equal(captured(image), model(image))
    assert torch.equal(captured(image.contiguous(memory_format=torch.channels_last)), model(image))
    with pytest.raises(ValueError, match="must have the captured shape"):
        captured(images(batch + 1))


@torch.no_grad()
def test_a_captured_model_outlives_the_model():
    model, image = make(), images(2)
    want = model(image)
    captured = model.capture(image)
    del model
    filled = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    assert torch.equal(captured(image), want)
    assert len(filled) == 64


@pytest.mark.parametrize("change", ["in place", "memory", "hook"])
@torch.no_grad()
def test_a_captured_model_refuses_to_answer_for_a_changed_one(change):
    model, image = make(), images(2)
    captured = model.capture(image)
    captured(image)
    if change == "in place":
        model.block1[0].mlp.fc1.weight.mul_(2)
    elif change == "memory":
        model.half().bfloat16()
    else:
        model.block1[0].register_forward_hook(lambda module, arguments, output: 2 * output)
    with pytest.raises(RuntimeError, match="captured model: the model must be as it was captured"):
        captured(image)
    assert torch.equal(model.capture(image)(image), model(image))


@torch.no_grad()
def test_pixels_are_captured_too():
    model = make()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device="cuda")
    assert torch.equal(model.capture(pixels)(pixels), model(pixels))


def test_training_is_not_captured():
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        make().train().capture(images(1))


@torch.no_grad()
def test_captured_models_run_side_by_side():
    """Their launches count the programs that are done in counters of their own."""
    model, rounds = make("pvt_v2_b2"), 20
    captured = [model.capture(images(1, 224, seed=seed)) for seed in range(3)]
    inputs = [images(1, 224, seed=seed) for seed in range(3)]
    expected = [model(image) for image in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in captured]
    for _ in range(rounds):
        for stream, run, image in zip(streams, captured, inputs, strict=True):
            with torch.cuda.stream(stream):
                result = run(image)
        torch.cuda.synchronize()
        for run, want, image in zip(captured, expected, inputs, strict=True):
            assert torch.equal(run(image), want)
    assert result.isfinite().all()


@torch.no_grad()
def test_threads_on_streams_of_their_own():
    model = make("pvt_v2_b2")
    inputs = [images(1, 224, seed=seed) for seed in range(4)]
    expected = [copy.deepcopy(model)(image) for image in inputs]  # so that the threads' first forwards pack the weights
    torch.cuda.synchronize()
    right = []

    def work(image, want):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            right.extend(torch.equal(model(image), want) for _ in range(10))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 40


@torch.no_grad()
def test_counters_are_zero_after_use():
    make("pvt_v2_b2")(images(1, 224))
    torch.cuda.synchronize()
    assert not any(block.any() for block in workspace.counters(torch.cuda.current_device()).blocks)


@torch.no_grad()
def test_runs_are_equal_to_the_bit():
    model, image = make("pvt_v2_b2"), images(1, 224)
    first = model(image)
    assert all(torch.equal(model(image), first) for _ in range(20))


@torch.no_grad()
def test_a_new_batch_or_size_compiles_nothing():
    model = make()
    model(images(1, 64))
    modules = [module for name, module in sys.modules.items() if name.startswith("pvt_fast.kernels.")]
    kinds = [item for module in modules for item in vars(module).values() if hasattr(item, "device_caches")]

    def compiled() -> int:
        return sum(len(cache[0]) for kind in kinds for cache in kind.device_caches.values())

    before = compiled()
    assert before > 0
    for batch, size in ((2, 64), (7, 64), (64, 64), (1, 224), (32, 224), (3, 250), (2, 512)):
        model(images(batch, size))
    assert compiled() == before


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compiled_models(mode):
    model = make()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for seed in (1, 2, 3, 4):
        image = images(2, seed=seed)
        assert torch.equal(compiled(image).clone(), model(image))


@torch.no_grad()
def test_offsets_beyond_2_to_the_31():
    """b2's stage-1 hidden map at batch 1400 has 2.4e9 elements: the last image is answered as alone."""
    model = make("pvt_v2_b2")
    image = images(1400, 224)
    many, one = model(image)[-1:], model(image[-1:])
    torch.testing.assert_close(many, one, rtol=0, atol=3e-2 * float(one.abs().max()))
