"""Every argument of the public API refuses what it cannot use: by name, with the value, and before any change."""

import json
import math
import re
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import pvt_fast
from pvt_fast.config import PVTConfig
from pvt_fast.images.preprocess import Preprocess, read_image
from pvt_fast.model_file import load_model, save_model

SMALL = {
    "img_size": 32,
    "num_classes": 10,
    "embed_dims": (16, 32),
    "num_heads": (1, 2),
    "mlp_ratios": (4, 4),
    "depths": (1, 1),
    "sr_ratios": (2, 1),
    "num_stages": 2,
}


@pytest.fixture(scope="module")
def model():
    return pvt_fast.PVT_V2(**SMALL).eval()


IMAGE = torch.zeros(1, 3, 32, 32)
MAP = torch.zeros(1, 32, 4, 4)


def use_backend(model, /, **arguments):
    with pvt_fast.use_backend(**arguments):
        pass


def accelerated(model, /, **arguments):
    with pvt_fast.accelerated(**{"model": model, **arguments}):
        pass


# What is called, with the shared model and the one bad argument.
CALLS = {
    "PVT_V2": lambda model, /, **bad: pvt_fast.PVT_V2(**{**SMALL, **bad}),
    "pvt_v2_b0": lambda model, /, **bad: pvt_fast.pvt_v2_b0(**bad),
    "create_model": lambda model, /, **bad: pvt_fast.create_model(**{"name": "pvt_v2_b0", **bad}),
    "use_backend": use_backend,
    "backend": lambda model, /, **bad: setattr(model, *bad.popitem()),
    "forward": lambda model, /, **bad: model(**bad),
    "forward_features": lambda model, /, **bad: model.forward_features(**bad),
    "forward_head": lambda model, /, **bad: model.forward_head(**{"x": MAP, **bad}),
    "forward_intermediates": lambda model, /, **bad: model.forward_intermediates(**{"image": IMAGE, **bad}),
    "set_norm_eps": lambda model, /, **bad: model.set_norm_eps(**bad),
    "set_grad_checkpointing": lambda model, /, **bad: model.set_grad_checkpointing(**bad),
    "set_input_size": lambda model, /, **bad: model.set_input_size(**bad),
    "reset_classifier": lambda model, /, **bad: model.reset_classifier(**{"num_classes": 0, **bad}),
    "group_matcher": lambda model, /, **bad: model.group_matcher(**bad),
    "prune_intermediate_layers": lambda model, /, **bad: model.prune_intermediate_layers(**bad),
    "capture": lambda model, /, **bad: model.capture(**bad),
    "accelerate_": lambda model, /, **bad: pvt_fast.accelerate_(**{"model": model, **bad}),
    "accelerated": accelerated,
    "restore_": lambda model, /, **bad: pvt_fast.restore_(**bad),
    "explain": lambda model, /, **bad: pvt_fast.explain(**bad),
    "refresh": lambda model, /, **bad: pvt_fast.refresh(**bad),
    "load_weights": lambda model, /, **bad: pvt_fast.load_weights(**{"model": model, "source": {}, **bad}),
    "export_weights": lambda model, /, **bad: pvt_fast.export_weights(**{"model": model, **bad}),
    "save_pretrained": lambda model, /, **bad: model.save_pretrained(**{"save_directory": "/absent/folder", **bad}),
    "push_to_hub": lambda model, /, **bad: model.push_to_hub(**bad),
    "from_pretrained": lambda model, /, **bad: pvt_fast.PVT_V2.from_pretrained(
        **{"pretrained_model_name_or_path": "absent", **bad}
    ),
    "save_model": lambda model, /, **bad: save_model(
        **{"model": model, "path": "x", "preprocess": Preprocess(), **bad}
    ),
    "load_model": lambda model, /, **bad: load_model(**bad),
    "Preprocess": lambda model, /, **bad: Preprocess(**bad),
    "Preprocess()": lambda model, /, **bad: Preprocess(size=8)(**bad),
    "read_image": lambda model, /, **bad: read_image(**bad),
}

# (value, what the message shows of it), by what they are not.
NOT_A_NUMBER = [
    (True, "True"),
    ("3", "'3'"),
    (b"3", "b'3'"),
    (np.int64(3), "3"),
    (np.float32(0.5), "0.5"),
    (np.array([3]), "array([3])"),
    (torch.tensor(3), "tensor(3)"),
    (1j, "1j"),
    (math.nan, "nan"),
    (-math.inf, "-inf"),
]
NOT_AN_INT = [*NOT_A_NUMBER, (None, "None"), (3.0, "3.0"), ([3], "[3]"), (10**20, "1" + "0" * 20), (-1, "-1")]
NOT_A_RATE = [
    *NOT_A_NUMBER,
    (None, "None"),
    (1.0, "1.0"),
    (-0.25, "-0.25"),
    ([0.1, 0.2], "[0.1, 0.2]"),
    (10**5000, "bits"),
]
NOT_A_BOOL = [
    (1, "1"),
    (0, "0"),
    ("False", "'False'"),
    (None, "None"),
    (np.True_, "True"),
    (torch.tensor(True), "tensor(True)"),
    ([], "[]"),
]
NOT_A_SEQUENCE = [
    (16, "16"),
    (None, "None"),
    ("16", "'16'"),
    (b"\x10\x20", "b'\\x10 '"),
    ({16, 32}, "{"),
    ((dim for dim in (16, 32)), "<generator object"),
    (np.array([16, 32]), "array([16, 32])"),
    (torch.tensor([16, 32]), "tensor([16, 32])"),
    ({16: 1, 32: 2}, "{16: 1, 32: 2}"),
    (range(10**20), "range(0, 1"),
    ((16,), "got 1: (16,)"),
    ([], "got 0: []"),
    (range(10**9), "got 1000000000: range(0, 1000000000)"),
]
NOT_AN_IMAGE_SIZE = [
    *((value, text) for value, text in NOT_AN_INT if value != [3]),
    ((32, 32, 3), "(32, 32, 3)"),
    ((32,), "(32,)"),
    ((32, 32.0), "32.0"),
    ((32, True), "True"),
    ((32, 0), "0"),
    ("32x32", "'32x32'"),
]
NOT_INDICES = [
    (True, "True"),
    (0, "0"),
    (5, "5"),
    ([], "none"),
    ([0.5], "0.5"),
    ([True], "True"),
    ([2], "2"),
    ([-3], "-3"),
    (["0"], "'0'"),
    ("01", "'01'"),
    (0.5, "0.5"),
    (np.array([0, 1]), "array([0, 1])"),
    (torch.tensor([0]), "tensor([0])"),
    ([torch.tensor(0)], "tensor(0)"),
    ({0, 1}, "{0, 1}"),
    ((index for index in (0, 1)), "<generator object"),
]
NOT_A_MODEL = [(None, "None"), ("model", "'model'"), (nn.Linear, "Linear"), ({}, "{}")]
NOT_A_PATH = [(None, "None"), (3, "3"), ([], "[]")]
NOT_A_FILE = [*NOT_A_PATH, ("", "''"), ("a\0b", "'a\\x00b'"), (b"model", "b'model'")]
NOT_A_BACKEND = [
    ("gpu", "'gpu'"),
    ("", "''"),
    (None, "None"),
    (3, "3"),
    (["cpp"], "['cpp']"),
    (np.array(["cpp"]), "array(['cpp']"),
    ("x" * 10**6, "'xxx"),
]
NOT_AN_EPSILON = [*NOT_A_NUMBER, (-1e-5, "-1e-05"), ("1e-5", "'1e-5'"), ([1e-5], "[1e-05]")]
NOT_A_TENSOR = [(None, "None"), (np.zeros((1, 3, 8, 8)), "array("), ([[0.0]], "[[0.0]]"), ("photo.jpg", "'photo.jpg'")]


class OwnForward(nn.LayerNorm):
    def forward(self, x):
        return x


NOT_A_NORM = [
    (None, "None"),
    ("LayerNorm", "'LayerNorm'"),
    (nn.LayerNorm(16), "LayerNorm((16,)"),
    (nn.BatchNorm2d, "BatchNorm2d(16"),
    (lambda: nn.LayerNorm(16), "<lambda>"),
    (lambda dim: None, "None"),
    (lambda dim: nn.LayerNorm(8), "LayerNorm((8,)"),
    (lambda dim: nn.LayerNorm((1, dim)), "LayerNorm((1, 16)"),
    (partial(nn.LayerNorm, elementwise_affine=False), "elementwise_affine=False"),
    (partial(nn.LayerNorm, bias=False), "LayerNorm((16,)"),
    (OwnForward, "OwnForward((16,)"),
    (partial(nn.LayerNorm, eps=math.nan), "nan"),
    (partial(nn.LayerNorm, eps="1e-5"), "'1e-5'"),
]

# (call, argument, bad values)
TABLE = [
    *(("PVT_V2", name, NOT_AN_INT) for name in ("patch_size", "in_channels", "num_classes", "num_stages")),
    *(("PVT_V2", name, NOT_A_RATE) for name in ("drop_rate", "attn_drop_rate", "drop_path_rate")),
    *(("PVT_V2", name, NOT_A_BOOL) for name in ("qkv_bias", "linear")),
    *(("PVT_V2", name, NOT_A_SEQUENCE) for name in ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios")),
    *(
        ("PVT_V2", name, [((1, value), text) for value, text in NOT_AN_INT])
        for name in ("embed_dims", "num_heads", "depths", "sr_ratios")
    ),
    (
        "PVT_V2",
        "mlp_ratios",
        [((4, value), text) for value, text in (*NOT_A_NUMBER, (0, "0"), (-1.5, "-1.5"), (1e300, "1e+300"))],
    ),
    ("PVT_V2", "img_size", NOT_AN_IMAGE_SIZE),
    ("PVT_V2", "qk_scale", [*NOT_A_NUMBER, ([0.1], "[0.1]"), (10**400, "1000")]),
    ("PVT_V2", "norm_layer", NOT_A_NORM),
    # what is of the right type, and no model: more than memory is there for
    ("PVT_V2", "depths", [((1, 10**9), "1000000000"), ((1001, 1), "1001")]),
    ("PVT_V2", "embed_dims", [((2**20, 2**20), "parameters, got")]),
    ("PVT_V2", "num_classes", [(2**31 - 1, "parameters, got")]),
    ("PVT_V2", "patch_size", [(2**25 + 1, "parameters, got")]),
    ("PVT_V2", "mlp_ratios", [((2**30, 1), "parameters, got")]),
    ("create_model", "name", [("resnet50", "'resnet50'"), (None, "None"), (["pvt_v2_b0"], "['pvt_v2_b0']"), (0, "0")]),
    ("create_model", "pretrained", [(None, "None"), (1, "1"), (b"timm", "b'timm'"), (["timm"], "['timm']")]),
    ("pvt_v2_b0", "pretrained", [(None, "None"), (0.5, "0.5")]),
    ("pvt_v2_b0", "depths", [((2, 2), "(2, 2)")]),
    ("pvt_v2_b0", "banana", [(1, "banana")]),
    ("pvt_v2_b0", "img_size", [("224", "'224'"), (0, "0")]),
    ("use_backend", "name", NOT_A_BACKEND),
    ("backend", "backend", NOT_A_BACKEND),
    ("forward", "image", [*NOT_A_TENSOR, (torch.zeros(3, 32, 32), "(3, 32, 32)"), (torch.zeros(1, 3, 2, 2), "2x2")]),
    ("forward", "image", [(torch.zeros(1, 3, 32, 32, dtype=dtype), str(dtype)) for dtype in (torch.int64, torch.bool)]),
    ("forward_features", "image", NOT_A_TENSOR),
    ("forward_head", "x", [*NOT_A_TENSOR, (torch.zeros(1, 16, 32), "(1, 16, 32)")]),
    ("forward_head", "pre_logits", NOT_A_BOOL),
    ("forward_intermediates", "image", NOT_A_TENSOR),
    ("forward_intermediates", "indices", NOT_INDICES),
    *(("forward_intermediates", name, NOT_A_BOOL) for name in ("norm", "stop_early", "intermediates_only")),
    (
        "forward_intermediates",
        "output_fmt",
        [("NHWC", "'NHWC'"), (None, "None"), (np.array(["NLC"]), "array"), (1, "1")],
    ),
    *(("set_norm_eps", name, NOT_AN_EPSILON) for name in ("block", "patch_embed", "reduction")),
    ("set_grad_checkpointing", "enable", NOT_A_BOOL),
    ("set_input_size", "img_size", NOT_AN_IMAGE_SIZE),
    ("reset_classifier", "num_classes", [*NOT_AN_INT, (2**31 - 1, "parameters, got")]),
    ("reset_classifier", "global_pool", [("max", "'max'"), (False, "False"), (0, "0"), (["avg"], "['avg']")]),
    ("group_matcher", "coarse", NOT_A_BOOL),
    ("prune_intermediate_layers", "indices", NOT_INDICES),
    *(("prune_intermediate_layers", name, NOT_A_BOOL) for name in ("prune_norm", "prune_head")),
    ("capture", "example", [*NOT_A_TENSOR, (IMAGE, "cpu")]),
    *((call, "model", NOT_A_MODEL) for call in ("accelerate_", "accelerated", "restore_", "explain", "refresh")),
    ("accelerate_", "backend", NOT_A_BACKEND),
    *(("accelerate_", name, NOT_A_BOOL) for name in ("attention", "mlp", "strict")),
    ("accelerate_", "filter_fn", [("blocks", "'blocks'"), (True, "True")]),
    *((call, "model", [*NOT_A_MODEL, (nn.Linear(2, 2), "Linear(")]) for call in ("load_weights", "export_weights")),
    ("load_weights", "source", [*NOT_A_PATH, (True, "True"), ({"a": 1}, "'a'")]),
    ("load_weights", "strict", NOT_A_BOOL),
    ("export_weights", "layout", [("keras", "'keras'"), (None, "None"), (["timm"], "['timm']")]),
    ("save_pretrained", "save_directory", NOT_A_FILE),
    ("save_pretrained", "push_to_hub", NOT_A_BOOL),
    ("save_pretrained", "repo_id", [(3, "3"), (b"org/name", "b'org/name'")]),
    ("save_pretrained", "model_card_kwargs", [("x", "'x'"), ([], "[]")]),
    ("save_pretrained", "safe_serialization", [(False, "safe_serialization")]),
    ("push_to_hub", "repo_id", NOT_A_PATH),
    ("from_pretrained", "pretrained_model_name_or_path", NOT_A_FILE),
    ("from_pretrained", "map_location", [("nonsense", "'nonsense'"), (5, "5"), ("cuda:77", "'cuda:77'"), ([], "[]")]),
    ("from_pretrained", "revision", [(5, "5"), (b"main", "b'main'")]),
    ("from_pretrained", "cache_dir", [(5, "5"), ("", "''")]),
    ("from_pretrained", "token", [(5.5, "5.5")]),
    *(("from_pretrained", name, NOT_A_BOOL) for name in ("force_download", "local_files_only")),
    ("from_pretrained", "strict", NOT_A_BOOL),
    ("save_model", "model", NOT_A_MODEL),
    ("save_model", "path", NOT_A_FILE),
    ("save_model", "preprocess", [(None, "None"), ({}, "{}")]),
    ("load_model", "path", NOT_A_FILE),
    ("Preprocess", "size", [*NOT_AN_INT, (0, "0"), (4000, "4000")]),
    ("Preprocess", "crop", [*NOT_A_NUMBER, (0, "0"), (1.5, "1.5"), (None, "None"), (1e-300, "1e-300")]),
    ("Preprocess", "interpolation", [("nearest", "'nearest'"), (3, "3"), (None, "None"), (["bicubic"], "['bicubic']")]),
    *(("Preprocess", name, [(0.5, "0.5"), ("rgb", "'rgb'"), (None, "None"), ((), "0")]) for name in ("mean", "std")),
    *(("Preprocess", name, [((0.5, value, 0.5), text) for value, text in NOT_A_NUMBER]) for name in ("mean", "std")),
    ("Preprocess", "std", [((1, 0, 1), "(1, 0, 1)"), ((1, 1e-30, 1), "1e-30"), ((1, 1, 1, 1), "(1, 1, 1, 1)")]),
    ("Preprocess()", "image", [*NOT_A_TENSOR, (torch.zeros(3, 8, 8), "tensor("), (Image.new("RGB", (0, 8)), "0x8")]),
    ("read_image", "path", NOT_A_FILE),
]
ROWS = [(call, name, value, text) for call, name, bad in TABLE for value, text in bad]


def state_of(model):
    """All that a refused call may not have changed."""
    parts = (model.config, model.norm_eps(), model.backend, model.global_pool, model._checkpointing, model.num_features)
    return parts, [type(module) for module in model.modules()], list(model.state_dict())


def test_the_table_is_as_long_as_it_is_to_be():
    assert len(ROWS) >= 200
    assert {call for call, *_ in ROWS} == set(CALLS)


IDS = [re.sub(r"\W+", "_", f"{call}-{name}-{text}")[:50] for call, name, _, text in ROWS]


@pytest.mark.parametrize(("call", "name", "value", "text"), ROWS, ids=IDS)
def test_a_bad_argument_is_named_with_its_value(model, call, name, value, text):
    before = state_of(model)
    with pytest.raises((TypeError, ValueError)) as caught:
        CALLS[call](model, **{name: value})
    message = str(caught.value)
    assert type(caught.value) in (TypeError, ValueError)
    assert name in message
    assert text in message
    assert "\n" not in message
    assert len(message) < 500
    assert state_of(model) == before


# -- what is drawn ----------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 10**20, -(10**20), 10**400, True, False]),
    st.floats(),
    st.floats(0, 1),
)
SCALARS = st.one_of(
    NUMBERS,
    st.none(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.complex_numbers(),
    NUMBERS.filter(lambda value: abs(value) < 2**63).map(np.asarray),
    st.integers(-3, 40).map(np.int64),
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.integers(-3, 40).map(torch.tensor),
    st.sampled_from(
        [int, float, len, object(), nn.LayerNorm, nn.LayerNorm(16), torch.zeros(2), np.zeros(3), range(2), ...]
    ),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.tuples(SCALARS, SCALARS),
    st.tuples(st.integers(1, 40), SCALARS),
    st.lists(st.integers(-1, 40), max_size=3).map(iter),
    st.lists(st.integers(-1, 40), max_size=3).map(set),
    st.lists(st.lists(SCALARS, max_size=2), max_size=2),
    st.dictionaries(st.integers(0, 3), SCALARS, max_size=2),
)
DRAWN = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def answer_or_refusal(names, call):
    """What the call answers, or None where it refuses one of the arguments by name."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError) or not any(name in str(error) for name in names):
            raise AssertionError(f"refused without the name: {error!r}") from error
        return None


@DRAWN
@given(st.sampled_from([*PVTConfig.__dataclass_fields__, "norm_layer"]), VALUES)
def test_any_argument_of_the_model_works_or_is_refused(name, value):
    with torch.device("meta"):
        model = answer_or_refusal([name, "image"], lambda: pvt_fast.PVT_V2(**{**SMALL, name: value}))
    if model is None:
        return
    config = model.config
    assert json.loads(json.dumps(asdict(config)))  # all of it is plain Python
    height, width = config.img_hw
    if max(height, width) < 1000:
        logits = model(torch.empty(1, config.in_channels, height, width, device="meta"))
        assert logits.shape == (1, config.num_classes or config.embed_dims[-1])


@DRAWN
@given(st.sampled_from([*Preprocess.__dataclass_fields__]), VALUES)
def test_any_field_of_the_preprocessing_works_or_is_refused(name, value):
    preprocess = answer_or_refusal(
        [name], lambda: Preprocess(**{"size": 8, "mean": (0.5,), "std": (0.5,), name: value})
    )
    if preprocess is not None:
        assert json.loads(json.dumps(asdict(preprocess)))
        pixels = preprocess(Image.new("L", (5, 9), 200))
        assert pixels.shape == (preprocess.in_channels, preprocess.size, preprocess.size)
        assert pixels.isfinite().all()


@DRAWN
@given(st.sampled_from(["block", "patch_embed", "reduction"]), VALUES)
def test_any_epsilon_works_or_is_refused(model, name, value):
    before = model.norm_eps()
    answer_or_refusal([name], lambda: model.set_norm_eps(**{name: value}))
    after = model.norm_eps()
    assert after == before or (type(after[name]) is float and math.isfinite(after[name]) and after[name] >= 0)
    model.set_norm_eps(**before)


@DRAWN
@given(VALUES)
def test_any_indices_work_or_are_refused(model, value):
    maps = answer_or_refusal(["indices"], lambda: model.forward_intermediates(IMAGE, value, intermediates_only=True))
    assert maps is None or 1 <= len(maps) <= 2
