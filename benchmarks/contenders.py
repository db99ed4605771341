"""The contenders of a CPU comparison: each builds the same network with the same weights, ready to be called.

A contender lives in a process of its own (see `cpu.py`): OpenMP and TBB threads that spin while they wait would
disturb each other in one process.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import source_tree  # noqa: F401
import torch
from case import Case
from torch import Tensor, nn
from torchvision_ops import let_torchvision_be_imported

import pvt_fast
from pvt_fast.cli.timing import burst
from pvt_fast.testing import model_truth

Call = Callable[[], Tensor]


class Ready(NamedTuple):
    """A contender that can be called, and what is to be told beside its time."""

    call: Call
    note: str = ""


def make_model(case: Case) -> pvt_fast.PVT_V2:
    """The case's model with weights drawn from a fixed seed, rounded to the case's dtype, in float32."""
    torch.manual_seed(0)
    model = pvt_fast.create_model(case.model).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if parameter.eq(1).all() else 0.0, 0.1)
    return model.to(case.torch_dtype).float()


def make_images(case: Any) -> Tensor:
    """Random images, rounded to the case's dtype, in float32."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
    return images.to(case.torch_dtype).float()


def truth(case: Case, rows: slice | list[int] = slice(None)) -> tuple[Tensor, Tensor]:
    """(logits in float64, logits of plain torch in the case's dtype) of those images, from the reference backend."""
    return model_truth(make_model(case), make_images(case)[rows].to(case.torch_dtype))


def on_cpp(case: Case) -> tuple[pvt_fast.PVT_V2, Tensor]:
    model, images = make_model(case).to(case.torch_dtype), make_images(case).to(case.torch_dtype)
    model.backend = "cpp"
    return model, images


def pvt_fast_cpp(case: Case) -> Ready:
    model, images = on_cpp(case)
    return Ready(lambda: model(images))


def pvt_fast_compiled(case: Case) -> Ready:
    """Ours under torch.compile: its call is one op (see `pvt_fast.backend.registered`)."""
    model, images = on_cpp(case)
    compiled = torch.compile(model, fullgraph=True)
    return Ready(lambda: compiled(images))


def timm_model(case: Case) -> nn.Module:
    """timm's model with our weights."""
    let_torchvision_be_imported()
    import timm

    model = timm.create_model(case.model).eval()
    model.load_state_dict({_timm_key(key): value for key, value in make_model(case).state_dict().items()})
    return model


def _timm_key(key: str) -> str:
    key = key.replace("patch_embed1", "patch_embed").replace("dwconv.dwconv", "dwconv")
    key = re.sub(r"^patch_embed(\d)", lambda m: f"stages.{int(m[1]) - 1}.downsample", key)
    return re.sub(r"^(block|norm)(\d)", lambda m: f"stages.{int(m[2]) - 1}.{m[1].replace('block', 'blocks')}", key)


def timm_eager(case: Case) -> Ready:
    model = timm_model(case).to(case.torch_dtype).to(memory_format=torch.channels_last)
    images = make_images(case).to(case.torch_dtype).to(memory_format=torch.channels_last)
    return Ready(lambda: model(images))


def torch_compile(case: Case) -> Ready:
    return compile_frozen(timm_model(case), case)


def compile_frozen(model: nn.Module, case: Case) -> Ready:
    """The model under torch.compile with its weights as constants, in the case's dtype."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    compiled, images = torch.compile(model.to(case.torch_dtype)), make_images(case).to(case.torch_dtype)
    return Ready(lambda: compiled(images))


def onnxruntime(case: Case) -> Ready:
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
    return Ready(lambda: torch.from_numpy(session.run(None, feed)[0]))


def openvino(case: Case) -> Ready:
    """Asked for latency; of a larger batch also for throughput, and what is faster in a short trial counts."""
    calls = {"latency": _openvino_latency(case)}
    if case.batch > 1:
        calls["throughput"] = _openvino_throughput(case)
    hint = min(calls, key=lambda hint: min(burst(calls[hint], 0)))
    return Ready(calls[hint], f"asked for {hint}")


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


CONTENDERS: dict[str, Callable[[Case], Ready]] = {
    "pvt_fast": pvt_fast_cpp,
    "pvt_fast_compiled": pvt_fast_compiled,
    "timm": timm_eager,
    "compile": torch_compile,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
