"""`save_pretrained`, `from_pretrained`, `push_to_hub` for PVT_V2, in the conventions of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin

from ..arguments import flag, instance, pathname, shown
from .description import NORM_EPS, config_text, describe, in_folder, tensors, write_tensors
from .files import load_state, reason
from .hub import CONFIG_FILE, WEIGHT_FILES, locate
from .rebuild import rebuilt, split
from .replacing import replacing

_CARD = "README.md"

if TYPE_CHECKING:
    from ..model import PVT_V2


class HubMixin(
    PyTorchModelHubMixin,
    library_name="pvt_fast",
    paper_url="https://arxiv.org/abs/2106.13797",
    pipeline_tag="image-classification",
    tags=["pvt_v2"],
):
    """A directory or repository holds config.json, the arguments of `PVT_V2` and the norms' epsilons, and
    model.safetensors, the parameters under official names, which carries what config.json says.
    """

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Write the model into a directory, made where there is none: config.json, model.safetensors, README.md.

        A linear put at `head` is kept with its number of classes, with or without bias. Whatever ends this call, a
        killed process and a full disk included, the directory loads as the model that it held or as this one; a
        README.md that is there stays.

        push_to_hub: afterwards push to `repo_id`, unless given the directory's name; `options` are those of
            `push_to_hub`. model_card_kwargs: what fills README.md, see huggingface_hub's `ModelCard.from_template`.

        Raises ValueError, before anything is written, for what `from_pretrained` would not bring back: any other head,
        adapters, parametrizations, quantised or replaced modules, norms of one kind with several epsilons. Raises
        OSError where the directory cannot be written.
        """
        folder = Path(pathname("save_pretrained: save_directory", save_directory))
        instance("save_pretrained: repo_id", repo_id, (str, NoneType), 'a str "org/name", or None')
        instance("save_pretrained: model_card_kwargs", model_card_kwargs, (dict, NoneType), "a dict or None")
        flag("save_pretrained: push_to_hub", push_to_hub)
        unused = [name for name, value in options.items() if value is not None]
        if unused and not push_to_hub:
            raise TypeError(f"save_pretrained: push_to_hub must be True for its options, got {', '.join(unused)}")
        described = self._described("save_pretrained")
        has_card = (folder / _CARD).exists()
        card = "" if has_card else str(self.generate_model_card(**(model_card_kwargs or {})))
        state = tensors(cast("PVT_V2", self))
        text = config_text("save_pretrained", described, state)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing("save_pretrained", folder / WEIGHT_FILES[0], folder / CONFIG_FILE) as (weights, config):
            write_tensors("save_pretrained", state, weights, {CONFIG_FILE: text})
            config.write_text(text, encoding="utf-8")
        if not has_card:
            with replacing("save_pretrained", folder / _CARD) as (readme,):
                readme.write_text(card, encoding="utf-8")
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """`save_pretrained` to the repository "org/name", by huggingface_hub's `ModelHubMixin.push_to_hub`."""
        instance("push_to_hub: repo_id", repo_id, str, 'a str "org/name"')
        self._described("push_to_hub")
        return super().push_to_hub(repo_id, **options)

    def _described(self, op: str) -> dict[str, Any]:
        return describe(op, cast("PVT_V2", self), cast("type[PVT_V2]", type(self)))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **arguments: Any,
    ) -> Any:
        """The model, in evaluation mode, of a directory or repository that `save_pretrained` or `push_to_hub` wrote.

        `arguments` are those of `PVT_V2` that replace the ones of config.json: another num_classes or in_channels is
        met as in `load_weights`. strict: raise where config.json does not describe the weights; else memory is taken
        for whatever it describes. Each parameter has the dtype that it has in the file. What is needed of the hub is
        taken from its cache or downloaded; revision, cache_dir, force_download, local_files_only and token are those
        of `huggingface_hub.hf_hub_download`.

        Raises ValueError for another library's repository: those load with `load_weights` into a model made here; and
        for damaged files. Raises OSError where the files are not in the cache and there is no network.
        """
        source = pathname(
            "from_pretrained: pretrained_model_name_or_path", pretrained_model_name_or_path, "a path or name"
        )
        flag("from_pretrained: strict", strict)
        flag("from_pretrained: force_download", force_download)
        flag("from_pretrained: local_files_only", local_files_only)
        instance("from_pretrained: revision", revision, (str, NoneType), "a str or None")
        if cache_dir is not None:
            pathname("from_pretrained: cache_dir", cache_dir)
        instance("from_pretrained: token", token, (str, bool, NoneType), "a str, a bool or None")
        device = _device(map_location)
        weights, config = locate(
            "from_pretrained",
            source,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        state, metadata = load_state(weights)
        flat = in_folder("from_pretrained", metadata, config)
        if flat is None or NORM_EPS not in flat:
            raise ValueError(_foreign(source, flat))
        kind = cast("type[PVT_V2]", cls)
        return rebuilt("from_pretrained", kind, split(flat), state, arguments, strict).to(device)


def _device(map_location: Any) -> torch.device:
    """The device of that name, on which memory can be had."""
    try:
        device = torch.device(map_location)
        torch.empty(0, device=device)
    except Exception as error:  # also AssertionError, of a torch without CUDA
        got = f"{shown(map_location)} ({reason(error)})"
        raise ValueError(f"from_pretrained: map_location must be a device of this machine, got {got}") from error
    return device


def _foreign(repository: str, config: dict | None) -> str:
    """What to say about a repository that is not of `save_pretrained`."""
    kind = "no config.json"
    if config is not None:
        kind = "a config.json of another library"
        kind += f" ({config.get('architecture') or config.get('model_type') or 'unknown model'})"
    return (
        f"from_pretrained: {repository!r} must be a directory or repository written by save_pretrained, got one with "
        f"{kind}; weights of timm or transformers load into a model made here: "
        f"pvt_fast.load_weights(pvt_fast.pvt_v2_b0(), {repository!r})"
    )
