"""Repositories of the Hugging Face hub from a local cache, laid out as the hub lays it out; no test uses a network."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from peers import logits_of, ours, peer, randomised, transformers_config
from safetensors.torch import save_file
from torch import nn
from transformers import PvtV2ForImageClassification

import pvt_fast
from pvt_fast import PVT_V2, export_weights, load_weights, variants
from pvt_fast.config import VARIANTS
from pvt_fast.testing import assert_parity

ROOT = Path(__file__).parents[2]
TIMM_CONFIG = {"architecture": "pvt_v2_b0", "num_classes": 1000, "pretrained_cfg": {"tag": "in1k"}}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache in force, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, repository: str, write: Callable[[Path], None], revision: str = "main") -> None:
    """Store what `write` puts into a directory as a snapshot: blobs by hash, links to them, a ref to the commit."""
    root = cache / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    snapshot, fresh = root / "snapshots" / commit, cache / "fresh"
    for directory in (snapshot, root / "blobs", root / "refs", fresh):
        directory.mkdir(parents=True, exist_ok=True)
    write(fresh)
    (root / "refs" / revision).write_text(commit)
    for file in fresh.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    shutil.rmtree(fresh)


def timm_files(model: nn.Module, config: bool = True) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
        if config:
            (directory / "config.json").write_text(json.dumps(TIMM_CONFIG))

    return write


def pickled(state: dict) -> Callable[[Path], None]:
    return lambda directory: torch.save(state, directory / "pytorch_model.bin")


@pytest.fixture(scope="module")
def timm_b0() -> nn.Module:
    return randomised(timm.create_model("pvt_v2_b0")).eval()


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


# -- published weights -----------------------------------------------------------------------------------------------


def test_pretrained_takes_timms_weights(cache, timm_b0):
    put(cache, "timm/pvt_v2_b0.in1k", timm_files(timm_b0))
    model = pvt_fast.pvt_v2_b0(pretrained=True).eval()
    assert same(export_weights(model, "timm"), timm_b0.state_dict())
    assert model.norm_eps() == {"block": 1e-6, "patch_embed": 1e-5, "reduction": 1e-5}
    image = torch.randn(1, 3, 64, 64)
    same_dtype, truth = logits_of(timm_b0, image), logits_of(timm_b0.double(), image.double())
    timm_b0.float()
    with torch.no_grad():
        assert_parity(model(image), truth, same_dtype)


@pytest.mark.parametrize("config", [True, False], ids=["config", "weights alone"])
def test_weights_alone_are_enough(cache, timm_b0, config):
    put(cache, "timm/pvt_v2_b0.in1k", timm_files(timm_b0, config))
    assert load_weights(pvt_fast.pvt_v2_b0(), "timm/pvt_v2_b0.in1k").layout == "timm"


def test_pytorch_model_bin_where_there_is_no_safetensors(cache, timm_b0):
    put(cache, "timm/pvt_v2_b0.in1k", pickled(timm_b0.state_dict()))
    model = pvt_fast.create_model("pvt_v2_b0", pretrained=True)
    assert same(export_weights(model, "timm"), timm_b0.state_dict())


def transformers_model(name: str, eps: float = 1e-6) -> nn.Module:
    config = transformers_config(VARIANTS[name], num_labels=1000, layer_norm_eps=eps)
    return randomised(PvtV2ForImageClassification(config)).eval()


@pytest.mark.parametrize(
    ("name", "repository"), [("pvt_v2_b0", "OpenGVLab/pvt_v2_b0"), ("pvt_v2_b2_li", "OpenGVLab/pvt_v2_b2_linear")]
)
def test_pretrained_takes_a_repository_of_transformers(cache, name, repository):
    source = transformers_model(name)
    put(cache, repository, source.save_pretrained)
    model = pvt_fast.create_model(name, pretrained=repository).eval()
    assert same(export_weights(model, "transformers"), source.state_dict())
    assert set(model.norm_eps().values()) == {1e-6}
    image = torch.randn(1, 3, 45, 64)
    same_dtype, truth = logits_of(source, image), logits_of(source.double(), image.double())
    with torch.no_grad():
        assert_parity(model(image), truth, same_dtype)


def test_revisions(cache):
    for revision, eps in (("main", 1e-6), ("v2", 2e-5)):
        put(cache, "OpenGVLab/pvt_v2_b0", transformers_model("pvt_v2_b0", eps).save_pretrained, revision)
    for source, eps in (("OpenGVLab/pvt_v2_b0", 1e-6), ("OpenGVLab/pvt_v2_b0@v2", 2e-5)):
        assert load_weights(pvt_fast.pvt_v2_b0(), source).norm_eps["patch_embed"] == eps


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_names_its_repository(monkeypatch, name):
    asked = []
    report = load_weights(ours(), ours().state_dict())

    def load(model, source):
        asked.append(source)
        return report

    monkeypatch.setattr(variants, "load_weights", load)
    with torch.device("meta"):
        getattr(pvt_fast, name)(pretrained=True)
        getattr(pvt_fast, name)(pretrained="weights.pth")
        getattr(pvt_fast, name)()
    assert asked == [f"timm/{name}.in1k", "weights.pth"]


def test_another_head_and_other_channels(cache, timm_b0, caplog):
    put(cache, "timm/pvt_v2_b0.in1k", timm_files(timm_b0))
    with caplog.at_level(logging.WARNING, "pvt_fast"):
        model = pvt_fast.pvt_v2_b0(num_classes=10, in_channels=1, pretrained=True)
    assert caplog.messages == ["pvt_v2_b0: the head for 10 classes is newly initialised, not pretrained"]
    assert torch.equal(
        model.patch_embed1.proj.weight, timm_b0.state_dict()["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    )
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.norm4.weight, timm_b0.state_dict()["stages.3.norm.weight"])
    caplog.clear()
    pvt_fast.pvt_v2_b0(num_classes=0, pretrained=True)
    pvt_fast.pvt_v2_b0(pretrained=True)
    assert caplog.messages == []


def test_another_architecture_is_refused(cache, timm_b0):
    put(cache, "timm/pvt_v2_b0.in1k", timm_files(timm_b0))
    with pytest.raises(ValueError, match=r"load_weights: source \(timm layout\) must have the model's"):
        pvt_fast.pvt_v2_b0(pretrained=True, linear=True)


class _Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_malicious_repository_is_refused(cache, tmp_path):
    put(cache, "someone/pvt", pickled({"patch_embed1.proj.weight": _Payload(tmp_path / "trace")}))
    with pytest.raises(ValueError, match="checkpoint of tensors only"):
        load_weights(ours(), "someone/pvt")
    assert not (tmp_path / "trace").exists()


# -- without a network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda source: load_weights(ours(), source), PVT_V2.from_pretrained])
def test_what_is_not_in_the_cache(cache, call):
    with pytest.raises(OSError, match="someone/pvt must be in the cache") as info:
        call("someone/pvt")
    assert str(cache) in str(info.value)
    assert "when HF_HUB_OFFLINE is set, and it is not; fetch it where there is a network (hf download" in str(
        info.value
    )


def test_a_revision_that_is_not_in_the_cache(cache, timm_b0):
    put(cache, "timm/pvt_v2_b0.in1k", timm_files(timm_b0))
    with pytest.raises(OSError, match=r"timm/pvt_v2_b0\.in1k@other must be in the cache"):
        load_weights(pvt_fast.pvt_v2_b0(), "timm/pvt_v2_b0.in1k@other")


UNREACHABLE = """
import time
time.sleep = lambda seconds: None  # huggingface_hub waits between its attempts
import pvt_fast
try:
    pvt_fast.pvt_v2_b0(pretrained=True)
except OSError as error:
    print(error)
"""


def test_in_a_process_whose_hub_does_not_answer(tmp_path):
    """The variables of huggingface_hub are respected; port 9 of this machine answers nothing."""
    variables = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | variables
    run = subprocess.run(
        [sys.executable, "-c", UNREACHABLE], env=environment, capture_output=True, text=True, check=True
    )
    (line,) = run.stdout.splitlines()
    assert line.startswith(f"load_weights: timm/pvt_v2_b0.in1k must be in the cache {tmp_path} when the hub cannot be")


def test_a_missing_repository_is_no_network_error(monkeypatch):
    def missing(*_, **__):
        response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
        raise huggingface_hub.errors.RepositoryNotFoundError("404: no such repository", response=response)

    monkeypatch.setattr("pvt_fast.checkpoints.hub.hf_hub_download", missing)
    with pytest.raises(ValueError, match=r"source must be a repository with weights, got 'someone/pvt' \(404: no such"):
        load_weights(ours(), "someone/pvt")


# -- save_pretrained and from_pretrained -----------------------------------------------------------------------------


def saved_model(**overrides) -> PVT_V2:
    norm_layer = partial(nn.LayerNorm, eps=1e-4)
    model = randomised(ours(norm_layer=norm_layer, drop_path_rate=0.1, in_channels=1, **overrides))
    model.set_norm_eps(patch_embed=1e-3, reduction=1e-2)
    return model.eval()


@pytest.mark.parametrize("overrides", [{}, {"linear": True}, {"num_classes": 0}], ids=["sr", "linear", "headless"])
@torch.no_grad()
def test_a_saved_model_comes_back_whole(tmp_path, overrides):
    model = saved_model(**overrides)
    model.save_pretrained(tmp_path)
    again = PVT_V2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.norm_eps() == model.norm_eps() == {"block": 1e-4, "patch_embed": 1e-3, "reduction": 1e-2}
    assert same(again.state_dict(), model.state_dict())
    assert not again.training
    image = torch.randn(2, 1, 64, 64)
    assert torch.equal(again(image), model(image))
    assert load_weights(ours(in_channels=1, **overrides), tmp_path).norm_eps == model.norm_eps()


def test_the_files_are_the_hubs(tmp_path):
    model = saved_model()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["embed_dims"] == list(model.config.embed_dims)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("pvt_fast", "image-classification")
    assert "pvt_v2" in card.data.tags


def test_what_is_saved_is_the_model_as_it_is_now(tmp_path):
    """Not the arguments it was made with."""
    model = ours(img_size=(64, 96), num_classes=5).bfloat16()
    model.reset_classifier(3)
    model.save_pretrained(tmp_path)
    again = PVT_V2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.head.weight.dtype == torch.bfloat16
    assert same(again.state_dict(), model.state_dict())


def test_arguments_replace_those_of_the_configuration(tmp_path):
    model = saved_model()
    model.save_pretrained(tmp_path)
    again = PVT_V2.from_pretrained(tmp_path, num_classes=2, in_channels=1, drop_path_rate=0.0)
    assert (again.config.num_classes, again.config.drop_path_rate) == (2, 0.0)
    assert torch.equal(again.norm4.weight, model.norm4.weight)
    with pytest.raises(ValueError, match=r"load_weights: source .* must have the model's"):
        PVT_V2.from_pretrained(tmp_path, depths=(2, 2, 2, 2))
    lenient = PVT_V2.from_pretrained(tmp_path, depths=(2, 2, 2, 2), strict=False)
    assert torch.equal(lenient.block1[0].norm1.weight, model.block1[0].norm1.weight)


def test_uneven_epsilons_cannot_be_saved(tmp_path):
    model = saved_model()
    model.norm1.eps = 0.5
    with pytest.raises(ValueError, match="one epsilon for its block norms, got"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_what_is_pushed_comes_back_from_the_cache(cache, monkeypatch):
    model = saved_model()

    def upload(self, *, repo_id, folder_path, **_):
        put(cache, repo_id, lambda directory: shutil.copytree(folder_path, directory, dirs_exist_ok=True))
        return "url"

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    model.push_to_hub("someone/pvt")
    again = PVT_V2.from_pretrained("someone/pvt")
    assert again.config == model.config
    assert same(again.state_dict(), model.state_dict())
    assert load_weights(ours(in_channels=1), "someone/pvt").norm_eps == model.norm_eps()


def test_other_libraries_repositories_point_to_load_weights(cache, timm_b0, tmp_path):
    put(cache, "timm/pvt_v2_b0.in1k", timm_files(timm_b0))
    put(cache, "someone/bare", timm_files(timm_b0, config=False))
    peer("transformers").save_pretrained(tmp_path / "hf")
    advice = r"load into a model made here: pvt_fast\.load_weights\(pvt_fast\.pvt_v2_b0\(\), "
    for source, kind in (
        ("timm/pvt_v2_b0.in1k", r"a config\.json of another library \(pvt_v2_b0\)"),
        (str(tmp_path / "hf"), r"a config\.json of another library \(pvt_v2\)"),
    ):
        with pytest.raises(ValueError, match=f"written by save_pretrained, got one with {kind}; .*{advice}'{source}'"):
            PVT_V2.from_pretrained(source)


def test_a_directory_without_weights(tmp_path):
    saved_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold model\.safetensors or pytorch_model\.bin, got directory"):
        PVT_V2.from_pretrained(tmp_path)


# -- damaged and hostile directories ---------------------------------------------------------------------------------

JSON_THAT_IS_NO_OBJECT = {
    "empty": b"",
    "cut": b'{"norm_eps": {',
    "a list": b"[1, 2]",
    "null": b"null",
    "deep": b'{"a":' * 100_000,
    "binary": b"\xff\xfe\x00",
    "long": b" " * 2**20 + b"{}",
    "many digits": b'{"depths": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("text", JSON_THAT_IS_NO_OBJECT.values(), ids=JSON_THAT_IS_NO_OBJECT)
def test_a_config_that_is_no_object_is_refused(text, tmp_path):
    saved_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    for call in (PVT_V2.from_pretrained, lambda source: load_weights(ours(in_channels=1), source)):
        with pytest.raises(ValueError, match=r"^(from_pretrained|load_weights): \S*config\.json must be a JSON object"):
            call(tmp_path)


# More than any machine has: what is built first, and compared then, ends the process or never ends.
TOO_LARGE = {
    "depths": [10**9, 1, 1, 1],
    "num_classes": 10**9,
    "in_channels": 10**8,
    "embed_dims": [10**7, 10**7, 10**7, 10**7],
    "mlp_ratios": [10**9, 1, 1, 1],
    "num_stages": 10**9,
    "patch_size": 10**6 + 1,
}


@pytest.mark.parametrize("field", TOO_LARGE)
def test_a_config_of_another_model_is_refused_before_memory_is_taken(field, tmp_path):
    saved_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "img_size": 10**7, field: TOO_LARGE[field]}))
    with pytest.raises(ValueError, match=r"^from_pretrained: the weights' description must be that of a PVT_V2"):
        PVT_V2.from_pretrained(tmp_path)
    if field == "depths":
        with pytest.raises(ValueError, match="depths must be at most 1000, got 1000000000"):
            PVT_V2.from_pretrained(tmp_path, strict=False)


def test_a_default_device_or_dtype_does_not_reach_what_is_loaded(tmp_path):
    model = saved_model()
    model.norm1.double()
    with torch.device("meta"):
        model.save_pretrained(tmp_path)
        again = PVT_V2.from_pretrained(tmp_path)
    assert same(again.state_dict(), model.state_dict())
    assert {value.dtype for value in again.norm1.parameters()} == {torch.float64}


@pytest.mark.parametrize("norms", [torch.float32, torch.float64])
def test_mixed_dtypes_come_back(norms, tmp_path):
    model = saved_model().bfloat16()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.to(norms)
    model.head.half()
    model.save_pretrained(tmp_path)
    again = PVT_V2.from_pretrained(tmp_path)
    assert same(again.state_dict(), model.state_dict())
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    bad = saved_model()
    bad.set_norm_eps(block=0.0)
    meta = saved_model().to("meta")
    for model, message in ((bad, "norm_eps of block must be a finite"), (meta, "got one on the meta device")):
        with pytest.raises(ValueError, match=f"^save_pretrained: .*{message}"):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_views_are_saved_as_what_they_show(tmp_path):
    model = saved_model()
    model.norm1.weight = nn.Parameter(torch._neg_view(torch.rand(8)))
    model.norm2.weight = nn.Parameter(torch.rand(32)[::2])
    model.save_pretrained(tmp_path)
    assert same(PVT_V2.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_list_of_shards_is_not_followed(tmp_path):
    saved_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "elsewhere.safetensors")
    weight_map = dict.fromkeys(saved_model().state_dict(), "../elsewhere.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for call in (PVT_V2.from_pretrained, lambda source: load_weights(ours(in_channels=1), source)):
        with pytest.raises(ValueError, match=r"must hold model\.safetensors or pytorch_model\.bin, got directory"):
            call(tmp_path)


def test_a_hub_that_refuses_is_an_error_of_one_line(monkeypatch):
    def refuse(*_, **__):
        response = type("Response", (), {"headers": {}, "request": None, "status_code": 503})()
        raise huggingface_hub.errors.HfHubHTTPError("503\nService Unavailable", response=response)

    monkeypatch.setattr("pvt_fast.checkpoints.hub.hf_hub_download", refuse)
    for call in (PVT_V2.from_pretrained, lambda source: load_weights(ours(), source)):
        with pytest.raises(OSError, match=r"someone/pvt must be given out by the hub, got 503 Service Unavailable"):
            call("someone/pvt")
