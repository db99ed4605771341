"""The command `pvt-fast`: doctor, classify, bench. What users can cause ends in one line on stderr, not in a traceback.

Exit status: 0; 1 for a failure (an answer outside the parity rule, no memory, a full disk); 2 for arguments, files and
settings that cannot be used; 130 for Ctrl-C, 141 where nobody reads the output to its end.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import platform
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__, create_model, list_models
from ..arguments import shown
from ..backend.dispatch import ORDER, BackendUnavailable
from ..checkpoints.files import load_state
from ..checkpoints.fitting import assign
from ..checkpoints.key_maps import to_official
from ..checkpoints.replacing import replacing
from ..images.preprocess import Preprocess, read_image
from ..model import PVT_V2
from ..model_file import build_model, has_config
from . import bench, doctor
from .interrupt import INTERRUPTED

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEFAULT_TOPK = 5
# Images that are read and go through the model at once: more would only take memory.
_CLASSIFY_BATCH = 16
_MOST = 10**9
# More would gain nothing, and OpenMP ends the process where the system refuses them.
_THREADS_PER_CPU = 8
# What a file of labels may have, in bytes: a device gives as many as one reads.
_MAX_LABELS = 2**26


class BadArgument(Exception):
    """An argument that the command cannot use; the message is one line."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Called where BrokenPipeError is handled: it is for `main` to end the command, not for the console."""
        raise


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line without the usage, exit status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status as above. Bad arguments raise SystemExit with it, as argparse does."""
    command = "pvt-fast"
    try:
        with _output():
            args = _parser().parse_args(argv)
            command = f"pvt-fast {args.command}"
            args.run(args, bench.console(_Console))
    except (BadArgument, BackendUnavailable) as error:
        return _fail(2, f"{command}: error: {error}")
    except bench.ParityError as error:
        return _fail(1, f"{command}: parity failed, nothing was timed: {error}")
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # of a program that calls this function; `_command` ends the command
        return INTERRUPTED
    except OSError as error:
        return _fail(1, f"{command}: error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not _is_exhaustion(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]  # of torch more lines are its own frames
        return _fail(1, f"{command}: error: out of memory ({reason[0]})")
    return 0


def _fail(status: int, message: str) -> int:
    with suppress(OSError, AttributeError):  # there may be no room for this either, or no stderr
        sys.stderr.write(" ".join(message.split()) + "\n")
    return status


def _is_exhaustion(error: Exception) -> bool:
    """Does the machine lack memory or threads? torch says so in a RuntimeError of many kinds."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "out of memory", "can't start new thread"))


@contextmanager
def _output() -> Iterator[None]:
    """Within the block stdout shows as escapes what its encoding lacks; then all is written, or OSError raised."""
    stream = sys.stdout
    if stream is None:
        raise OSError(errno.EBADF, "standard output is closed")
    errors = stream.errors
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            stream.flush()
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
    except OSError:
        _abandon(stream)
        raise


def _abandon(stream: IO[str]) -> None:
    """Else Python would try at exit to write what could not be written, and tell of it."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pvt-fast", description="Pyramid Vision Transformer v2 on fused kernels.")
    parser.add_argument("--version", action="version", version=f"pvt-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    command = commands.add_parser("doctor", help="versions, processor, GPUs, and what each backend can do here")
    command.set_defaults(run=lambda args, console: console.print(doctor.report()))

    command = commands.add_parser("classify", help="the likeliest classes of images")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    command.add_argument("--model", choices=list_models(), help="not needed for weights that describe their model")
    command.add_argument("--weights", type=Path, required=True, help=".safetensors, .pth, .pt or .bin, of any library")
    command.add_argument("--labels", type=Path, help="names of the classes: one a line, or a JSON list")
    command.add_argument("--topk", type=_positive, help=f"classes to show (default: {_DEFAULT_TOPK})")
    command.add_argument("--backend", choices=("auto", *ORDER), default="auto")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_classify)

    command = commands.add_parser("bench", help="time a model with random weights on every backend, in turns")
    command.add_argument("--model", choices=list_models(), required=True)
    command.add_argument("--batch", type=_positive, default=1, help="images a call")
    command.add_argument("--size", type=_positive, default=224, help="height and width of the images in pixels")
    command.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    command.add_argument("--backend", action="append", choices=tuple(ORDER), help="repeatable; default: all that can")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: all that there are")
    command.add_argument("--threads", type=_threads, help="CPU threads (default: torch's)")
    command.add_argument("--rounds", type=_positive, default=20, help="timed calls of each backend")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    command.set_defaults(run=_bench)
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {shown(text)}")
    if len(text) > len(str(_MOST)) or int(text) > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}, got {shown(text)}")
    return int(text)


def _threads(text: str) -> int:
    threads, maximum = _positive(text), _THREADS_PER_CPU * (os.cpu_count() or 1)
    if threads > maximum:
        raise argparse.ArgumentTypeError(f"must be at most {_THREADS_PER_CPU} a processor, {maximum}, got {threads}")
    return threads


@contextmanager
def _user_input() -> Iterator[None]:
    """Turns what the package and the system say about the user's arguments and files into `BadArgument`."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise BadArgument(str(error)) from error


def _classify(args: argparse.Namespace, console: Console) -> None:
    with _user_input():
        model, preprocess = _load(args.model, args.weights)
        classes = model.config.num_classes
        labels = _read_labels(args.labels, classes) if args.labels else [str(index) for index in range(classes)]
        topk = min(_DEFAULT_TOPK, classes) if args.topk is None else args.topk
        if topk > classes:
            raise ValueError(f"classify: --topk must be at most the model's {classes} classes, got {topk}")
    model.backend = args.backend
    model.to("cpu" if args.backend == "cpp" else bench.devices()[-1], _DTYPES[args.dtype])
    top = _logits(model, preprocess, args.images).cpu().double().softmax(dim=1).topk(topk)
    answers = [
        {
            "image": str(path),
            "top": [
                {"index": index, "label": labels[index], "probability": probability}
                for index, probability in zip(indices, probabilities, strict=True)
            ],
        }
        for path, indices, probabilities in zip(args.images, top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    if args.json:
        print(json.dumps(answers, indent=2))
    else:
        console.print(_answer_table(answers))


def _logits(model: PVT_V2, preprocess: Preprocess, paths: Sequence[Path]) -> torch.Tensor:
    """(number of paths, num_classes)."""
    like, logits = next(model.parameters()), []
    for first in range(0, len(paths), _CLASSIFY_BATCH):
        with _user_input(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of images that can be read all the same
            images = [preprocess(read_image(path)) for path in paths[first : first + _CLASSIFY_BATCH]]
        with torch.inference_mode():
            logits.append(model(torch.stack(images).to(like)))
    joined = torch.cat(logits)
    for path, finite in zip(paths, joined.isfinite().all(dim=1).tolist(), strict=True):
        if not finite:
            raise BadArgument(f"classify: --weights must give finite logits in this dtype, got others for {path}")
    return joined


def _load(name: str | None, path: Path) -> tuple[PVT_V2, Preprocess]:
    """The model in evaluation mode and its preprocessing; the file's own description goes before `name`."""
    state, metadata = load_state(path)
    if has_config(metadata):
        if name is not None:
            raise ValueError(f"classify: --model must be left out for weights that describe their model, got {name}")
        model, preprocess = build_model(state, metadata)
    elif name is None:
        raise ValueError(f"classify: --model must be given for weights that do not describe it, such as {path}")
    else:
        model, preprocess = create_model(name, num_classes=_classes(state)), Preprocess()
        assign(model, state)
    if not model.config.num_classes:
        raise ValueError(f"classify: --weights must include a head, got {path} without classes")
    return model.eval(), preprocess


def _classes(state: dict[str, torch.Tensor]) -> int:
    """Classes of the head; 0 without one."""
    head = to_official(state).state.get("head.weight")
    return head.shape[0] if head is not None and head.dim() == 2 and head.numel() else 0


def _read_labels(path: Path, classes: int) -> list[str]:
    with path.open("rb") as file:
        content = file.read(_MAX_LABELS + 1)
    if len(content) > _MAX_LABELS:
        raise ValueError(f"classify: --labels must have at most {_MAX_LABELS} bytes, got more in {path}")
    try:
        text = content.decode("utf-8-sig")
        labels = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"classify: --labels must be UTF-8 lines or a JSON list, got {path} ({error})") from error
    if len(labels) != classes or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"classify: --labels must name the model's {classes} classes, got {len(labels)} in {path}")
    return labels


def _lines(text: str) -> list[str]:
    """Without empty ones at the end; what else breaks lines for Python may be part of a name."""
    named = text.rstrip("\r\n")
    return [line.removesuffix("\r") for line in named.split("\n")] if named else []


def _answer_table(answers: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for answer in answers:
        for place, entry in enumerate(answer["top"]):
            table.add_row(
                "" if place else escape(answer["image"]), escape(entry["label"]), f"{entry['probability']:.2%}"
            )
        table.add_section()
    return table


def _bench(args: argparse.Namespace, console: Console) -> None:
    torch.manual_seed(0)  # the same weights, and so the same errors, in every run
    with _user_input():
        model = create_model(args.model, img_size=args.size)
        _check_fits(args.batch, args.size)
        if args.json:
            _check_writable(args.json)
    if args.device == "cuda" and "cuda" not in bench.devices():
        raise BadArgument("bench: --device must be one of this machine's, got cuda, and torch finds no GPU")
    dtype = _DTYPES[args.dtype]
    contenders = [
        bench.Contender(backend, dtype, device)
        for device in ([args.device] if args.device else bench.devices())
        for backend in sorted(dict.fromkeys(args.backend or ORDER), key=list(ORDER).index, reverse=True)
    ]
    images = torch.randn(args.batch, 3, args.size, args.size)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        comparison = bench.compare(model, images, contenders, args.rounds)
        used_threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    refused = comparison.refused()
    if args.backend and refused:
        raise BadArgument("; ".join(refused.values()))

    title = f"{args.model} (random weights), batch {args.batch}, {args.size} px, CPU threads: {used_threads}"
    console.print(bench.timing_table(title, comparison))
    for reason in refused.values():
        console.print(reason, highlight=False, markup=False, soft_wrap=True)
    if args.json:
        settings = {"model": args.model, "batch": args.batch, "size": args.size, "threads": used_threads}
        with replacing("bench", args.json) as (unfinished,):
            unfinished.write_text(json.dumps(_figures(settings, comparison), indent=2) + "\n")


def _check_fits(batch: int, size: int) -> None:
    """Refuse images that alone take more than the machine's memory; less than all of it may be free."""
    needed = batch * 3 * size**2 * torch.float32.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"bench: --batch and --size must make images that fit into {memory / 2**30:.1f} GiB of memory, "
            f"got {batch} of {size} px, {needed / 2**30:.1f} GiB"
        )


def _check_writable(path: Path) -> None:
    """Known before anything is timed."""
    if not path.parent.is_dir():
        raise ValueError(f"bench: --json must lie in an existing folder, got {path}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"bench: --json must be a file that can be written, got {path}")


def _figures(settings: dict[str, Any], comparison: bench.Comparison) -> dict[str, Any]:
    """The comparison with what is needed to read it later; times in milliseconds a batch."""
    return {
        **settings,
        "versions": {"pvt_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "cpu": doctor.cpu_name(),
        "results": [
            {
                **result.contender._asdict(),
                "dtype": bench.dtype_name(result.contender.dtype),
                "median_ms": result.spread.ms,
                "p10_ms": result.spread.ms_10,
                "p90_ms": result.spread.ms_90,
                "images_per_s": result.images_per_s,
                "speedup": comparison.speedup(result),
                "samples_ms": [seconds * 1e3 for seconds in result.seconds],
            }
            for result in comparison.results
        ],
        "not_runnable": comparison.refused(),
    }
