"""Models of others on CPUs, before and after pvt_fast.accelerate_: each in a process of its own, in turns.

    python benchmarks/accelerated.py --models segformer_b0,segformer_b2,pvt_v2_b2,timm_pvt_v2_b2 --size 224,512
    python benchmarks/accelerated.py --peers own,compile --threads 2 --out results/accelerate

`pvt_fast` is the accelerated model, `own` the same model as it comes, `compile` that one under torch.compile with
freezing. Answers are held against the unpatched model in float64 before a clock starts. See `cpu.py` for the rest.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pvt_fast
from pvt_fast.testing import model_truth

from .. import report
from ..case import Case
from ..models import make_images
from ..torchvision_ops import let_torchvision_be_imported
from .contenders import Built, compile_frozen
from .models import compete, numbers, require_known, row, words


def segformer(depths: list[int], widths: list[int], decoder: int) -> nn.Module:
    """transformers' SegFormer for 150 classes (ADE20k), as published."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(depths=depths, hidden_sizes=widths, decoder_hidden_size=decoder, num_labels=150)
    return SegformerForSemanticSegmentation(config)


def transformers_pvt_v2(depths: list[int], widths: list[int]) -> nn.Module:
    from transformers import PvtV2Config, PvtV2ForImageClassification

    return PvtV2ForImageClassification(PvtV2Config(depths=depths, hidden_sizes=widths, num_labels=1000))


def timm_pvt_v2(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


WIDE = [64, 128, 320, 512]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "segformer_b0": lambda: segformer([2, 2, 2, 2], [32, 64, 160, 256], 256),
    "segformer_b2": lambda: segformer([3, 4, 6, 3], WIDE, 768),
    "transformers_pvt_v2_b0": lambda: transformers_pvt_v2([2, 2, 2, 2], [32, 64, 160, 256]),
    "transformers_pvt_v2_b2": lambda: transformers_pvt_v2([3, 4, 6, 3], WIDE),
    "timm_pvt_v2_b0": lambda: timm_pvt_v2("pvt_v2_b0"),
    "timm_pvt_v2_b2": lambda: timm_pvt_v2("pvt_v2_b2"),
}


class Logits(nn.Module):
    """A model whose answer is a tensor, whatever the model wraps it in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return output if isinstance(output, Tensor) else output.logits


def make_model(case: Case) -> nn.Module:
    """The case's model with weights drawn from a fixed seed, rounded to the case's dtype, in float32."""
    let_torchvision_be_imported()  # which timm and transformers do
    torch.manual_seed(0)
    model = MODELS[case.model]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if parameter.eq(1).all() else 0.0, 0.1)
    return Logits(model.to(case.torch_dtype).float())


def truth(case: Case) -> tuple[Tensor, Tensor, float]:
    """(answer in float64, the unpatched model's in the case's dtype, GFLOP of a call)."""
    model, images = make_model(case), make_images(case)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(images)
    return *model_truth(model, images.to(case.torch_dtype)), counter.get_total_flops() / 1e9


def accelerated(case: Case) -> Built:
    model, images = make_model(case).to(case.torch_dtype), make_images(case).to(case.torch_dtype)
    done = pvt_fast.accelerate_(model, backend="cpp", strict=True)
    return Built(lambda: model(images), f"{len(done.accelerated)} blocks accelerated")


def own(case: Case) -> Built:
    model, images = make_model(case).to(case.torch_dtype), make_images(case).to(case.torch_dtype)
    return Built(lambda: model(images))


def torch_compile(case: Case) -> Built:
    return compile_frozen(make_model(case), case)


CONTENDERS = {report.OURS: accelerated, "own": own, "compile": torch_compile}


def compare(case: Case, options: argparse.Namespace, progress: Progress) -> report.Row:
    """Time one case; its row of the report."""
    exact, plain, gflop = truth(case)
    builds = {name: CONTENDERS[name] for name in (report.OURS, *options.peers)}
    bound, cells = compete(builds, case, (exact, plain), options, progress)
    package = "timm" if case.model.startswith("timm") else "transformers"
    return row(case, options.threads, ("torch", package), gflop, {}, bound, cells)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=words, default=list(MODELS), help="comma-separated")
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--size", type=numbers, default=[224], help="image side in pixels")
    parser.add_argument("--dtype", type=words, default=list(report.DTYPES))
    parser.add_argument("--peers", type=words, default=["own"], help="of own, compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.25, help="per contender and round")
    parser.add_argument("--out", type=Path, help="folder that cpu.json, cpu.md and cpu.png are made or merged in")
    options = parser.parse_args()
    require_known(
        parser,
        ("--models", options.models, MODELS),
        ("--dtype", options.dtype, report.DTYPES),
        ("--peers", options.peers, [name for name in CONTENDERS if name != report.OURS]),
    )
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    cases = [Case(*chosen) for chosen in itertools.product(options.models, options.batch, options.size, options.dtype)]
    rows: list[report.Row] = []
    with Progress(console=Console(stderr=True)) as progress:
        for case in progress.track(cases, description="cases"):
            rows.append(compare(case, options, progress))
            if options.out:
                report.save(report.merge(report.load(options.out), rows), options.out)
    print(report.markdown(rows))
