"""Every kernel compilation of the published networks on a chip, with no GPU.

The launches are those that the backend itself makes: the models run on meta tensors and the launches are recorded, so
block sizes, argument types and alignment hints are what the launcher would use on such a device.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import itertools
import json
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.runtime.jit import KernelInterface

import pvt_fast
from pvt_fast.kernels import BACKEND
from pvt_fast.kernels.chip import Chip
from pvt_fast.kernels.launch import Launch, recorded
from pvt_fast.kernels.mlp import forward as mlp
from pvt_fast.testing import run_stages

KIB = 1024
# Target and shared memory that one block may use there (CUDA programming guide, table of compute capabilities; the
# 64 KiB of LDS of a CDNA3 compute unit).
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 163 * KIB, 108),  # A100
        Chip("sm_89", 99 * KIB, 128),  # RTX 4090
        Chip("sm_90", 227 * KIB, 132),  # H100, H200
        Chip("sm_100", 227 * KIB, 148),  # B200
        Chip("gfx942", 64 * KIB, 304),  # MI300X
    )
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPE_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
# b1, b3 and b4 have b2's widths (test_gates.py checks that they compile nothing else), b5 differs in the MLP.
VARIANTS = ("pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b5")
# 49 and 256 keys: one key block, and a loop over key blocks
IMAGE_SIZES = (224, 512)


class Compilation(NamedTuple):
    """One kernel as the launcher would specialise it on a chip."""

    chip: Chip
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]  # places of the arguments that are multiples of 16
    options: dict[str, int]

    def key(self) -> str:
        """Digest of all that the machine code depends on, the same on every machine."""
        inputs = (triton.__version__, self.chip.arch, source_digest(self.kernel), *self[2:])
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


@cache
def source_digest(function: Any) -> str:
    """Of the code of a jitted function and of every one that it calls, without comments and docstrings.

    Not Triton's own `cache_key`, which counts line numbers in: there an added line makes every kernel below it new, and
    so does a move to another file. Not a digest of files either: then a change to one kernel would make all new.
    """
    text = textwrap.dedent(inspect.getsource(function.fn))
    [code] = ast.parse(text).body
    assert isinstance(code, ast.FunctionDef)
    first = code.body[0]
    docstring = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(code) is not None else ()
    # ast.unparse would be shorter, but writes code in other ways in other versions of Python
    tokens = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL)
        and token.start[0] >= code.lineno  # decorators say what is specialised, which the signature shows
        and not (token.start[0] in docstring and token.type in (tokenize.STRING, tokenize.NEWLINE))
    ]
    names = [node for part in code.body for node in ast.walk(part) if isinstance(node, ast.Name)]
    local = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(function.arg_names)
    total = hashlib.sha256("\0".join(tokens).encode())
    for name in sorted({node.id for node in names} - local):
        total.update(f"{name}={_meaning(name, function.fn.__globals__)}".encode())
    return total.hexdigest()


def _meaning(name: str, scope: dict[str, Any]) -> str:
    """What a global name stands for; "" for Python's and Triton's own, which Triton's version tells."""
    value = scope.get(name)
    if isinstance(value, KernelInterface):
        return source_digest(value)
    if isinstance(value, triton.language.constexpr):
        return repr(value.value)
    if value is None or (isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "triton"):
        return ""
    raise TypeError(f"gates: {name} in a kernel must be a jitted function, a constexpr or triton's, got {value!r}")


def compilation(launch: Launch, chip: Chip) -> Compilation:
    """Types, constants and alignment hints that Triton's launcher derives from these arguments."""
    kernel, _, args, keywords = launch
    options = {name: keywords[name] for name in ("num_warps", "num_stages", "maxnreg") if name in keywords}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in keywords.items() if name not in options}
    signature, constants, aligned = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values.pop(parameter.name)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPE_NAMES[value.dtype]
            aligned.append(place)  # torch allocates at multiples of 64 bytes or more
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                aligned.append(place)
        else:
            signature[name] = "fp32"
    assert not values, f"{kernel.__name__}: arguments without a parameter: {sorted(values)}"
    return Compilation(chip, kernel, signature, constants, tuple(aligned), options)


def compilations(
    variants: Sequence[str],
    dtype: torch.dtype,
    chip: Chip,
    batches: tuple[int, ...] = (8,),
    sizes: tuple[int, ...] = IMAGE_SIZES,
    whole: bool = False,
) -> list[Compilation]:
    """What the backend would compile for these models on that chip, each once.

    Two blocks of each stage tell it, as the rest of a `whole` model is the same again (test_gates.py). In bf16 both
    with a hidden map in fp16, and as where the weights do not prove that it fits.
    """
    found: dict[str, Compilation] = {}
    for fits_half in {dtype == torch.bfloat16, False}:
        with mock.patch.object(mlp, "_fits_half", lambda *_, fits=fits_half: fits):
            for made in _compilations(variants, dtype, chip, batches, sizes, whole):
                found.setdefault(made.key(), made)
    return list(found.values())


@cache
def _model(name: str, dtype: torch.dtype, whole: bool) -> pvt_fast.PVT_V2:
    with torch.device("meta"):
        return pvt_fast.create_model(name, **({} if whole else {"depths": (2, 2, 2, 2)})).eval().to(dtype)


def _compilations(
    variants: Sequence[str],
    dtype: torch.dtype,
    chip: Chip,
    batches: tuple[int, ...],
    sizes: tuple[int, ...],
    whole: bool,
) -> Iterator[Compilation]:
    for name in variants:
        model = _model(name, dtype, whole)
        with torch.device("meta"):
            for batch, size in itertools.product(batches, sizes):
                ahead: list[Launch] = []
                with torch.no_grad(), recorded(chip, ahead) as launches:
                    tokens = run_stages(model, torch.empty(batch, 3, size, size, dtype=dtype), "triton")
                    BACKEND.head(tokens, None)
                yield from (compilation(launch, chip) for launch in launches + ahead)
