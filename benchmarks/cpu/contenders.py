"""The contenders of a CPU comparison: each builds the same network with the same weights, ready to be called.

`contend` is its process's work (see `..comparison`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pvt_fast
from pvt_fast.cli.timing import burst

from ..case import Case
from ..comparison import Ready
from ..models import make_images, make_model, timm_model

Call = Callable[[], Tensor]


class Built(NamedTuple):
    """A contender that can be called, and a note to be told of it."""

    call: Call
    note: str = ""


Build = Callable[[Any], Built]


def contend(build: Build, case: Any, threads: int) -> Generator[Any, Any, None]:
    """A contender's process."""
    torch.set_num_threads(threads)
    yield None
    with torch.inference_mode():
        call, note = build(case)
        for _ in range(3):
            logits = call()
        seconds = yield Ready(logits.clone(), {"note": note})  # a copy, as some lie in a library's own memory
        while True:
            seconds = yield burst(call, seconds)


def on_cpp(case: Case) -> tuple[pvt_fast.PVT_V2, Tensor]:
    model, images = make_model(case).to(case.torch_dtype), make_images(case).to(case.torch_dtype)
    model.backend = "cpp"
    return model, images


def pvt_fast_cpp(case: Case) -> Built:
    model, images = on_cpp(case)
    return Built(lambda: model(images))


def pvt_fast_compiled(case: Case) -> Built:
    """Ours under torch.compile: its call is one op (see `pvt_fast.backend.registered`)."""
    model, images = on_cpp(case)
    compiled = torch.compile(model, fullgraph=True)
    return Built(lambda: compiled(images))


def timm_eager(case: Case) -> Built:
    model = timm_model(case).to(case.torch_dtype).to(memory_format=torch.channels_last)
    images = make_images(case).to(case.torch_dtype).to(memory_format=torch.channels_last)
    return Built(lambda: model(images))


def torch_compile(case: Case) -> Built:
    return compile_frozen(timm_model(case), case)


def compile_frozen(model: nn.Module, case: Case) -> Built:
    """The model under torch.compile with its weights as constants, in the case's dtype."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    compiled, images = torch.compile(model.to(case.torch_dtype)), make_images(case).to(case.torch_dtype)
    return Built(lambda: compiled(images))


def onnxruntime(case: Case) -> Built:
    if case.dtype != "fp32":
        raise NotImplementedError("its CPU provider computes in float32")
    import onnxruntime as ort

    images = make_images(case)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(timm_model(case), (images,), path, dynamo=True, verbose=False, input_names=["images"])
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return Built(lambda: torch.from_numpy(session.run(None, feed)[0]))


def openvino(case: Case) -> Built:
    """Asked for latency; of a larger batch also for throughput, and what is faster in a short trial counts."""
    calls = {"latency": _openvino_latency(case)}
    if case.batch > 1:
        calls["throughput"] = _openvino_throughput(case)
    hint = min(calls, key=lambda hint: min(burst(calls[hint], 0)))
    return Built(calls[hint], f"asked for {hint}")


def _openvino_latency(case: Case) -> Call:
    """The batch as one request."""
    import openvino as ov

    images = make_images(case)
    request = _openvino_model(case, images, "LATENCY").create_infer_request()
    request.set_input_tensor(ov.Tensor(images.numpy()))

    def call() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return call


def _openvino_throughput(case: Case) -> Call:
    """The batch as requests of one image, as many at once as OpenVINO wants: one request would fill one stream only."""
    import openvino as ov

    images = make_images(case)
    queue = ov.AsyncInferQueue(_openvino_model(case, images[:1], "THROUGHPUT"))
    inputs = [ov.Tensor(image[None].numpy()) for image in images]
    logits: list[Tensor] = [torch.empty(0)] * case.batch

    def keep(request, index: int) -> None:
        logits[index] = torch.from_numpy(request.get_output_tensor().data[0].copy())

    queue.set_callback(keep)

    def call() -> Tensor:
        for index, image in enumerate(inputs):
            queue.start_async({0: image}, index)
        queue.wait_all()
        return torch.stack(logits)

    return call


def _openvino_model(case: Case, images: Tensor, hint: str):
    import openvino as ov

    config = {
        "PERFORMANCE_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[case.dtype],
    }
    model = ov.convert_model(timm_model(case), example_input=images, input=[images.shape])
    return ov.Core().compile_model(model, "CPU", config)


CONTENDERS: dict[str, Build] = {
    "pvt_fast": pvt_fast_cpp,
    "pvt_fast_compiled": pvt_fast_compiled,
    "timm": timm_eager,
    "compile": torch_compile,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
