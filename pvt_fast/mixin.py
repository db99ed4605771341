"""`save_pretrained`, `from_pretrained`, `push_to_hub` for PVT_V2, in the conventions of the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_file

from .arguments import flag, instance
from .checkpoint import load_state
from .description import NORM_EPS, describe, settle, take_dtypes, tensors
from .hub import CONFIG_FILE, WEIGHT_FILES, clear_errors, fetch
from .weights import assign

if TYPE_CHECKING:
    from .model import PVT_V2


class HubMixin(
    PyTorchModelHubMixin,
    library_name="pvt_fast",
    paper_url="https://arxiv.org/abs/2106.13797",
    pipeline_tag="image-classification",
    tags=["pvt_v2"],
):
    """A directory or repository holds config.json, the arguments of `PVT_V2` and the norms' epsilons, and
    model.safetensors, the parameters under official names.
    """

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the model into a directory, made where there is none: config.json, model.safetensors, README.md.

        A linear put at `head` is kept with its number of classes, with or without bias. `options` are those of
        huggingface_hub's `ModelHubMixin.save_pretrained`. Raises ValueError, before anything is written, for what
        `from_pretrained` would not bring back: any other head, adapters, parametrizations, quantised or replaced
        modules, norms of one kind with several epsilons.
        """
        instance("save_pretrained: save_directory", save_directory, (str, os.PathLike), "a path")
        self._described("save_pretrained")
        return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """`save_pretrained` to the repository "org/name", by huggingface_hub's `ModelHubMixin.push_to_hub`."""
        instance("push_to_hub: repo_id", repo_id, str, 'a str "org/name"')
        self._described("push_to_hub")
        return super().push_to_hub(repo_id, **options)

    def _described(self, op: str) -> dict[str, Any]:
        return describe(op, cast("PVT_V2", self), cast("type[PVT_V2]", type(self)))

    def _save_pretrained(self, save_directory: Path) -> None:
        model = cast("PVT_V2", self)
        described = self._described("save_pretrained")
        config = {**described.pop("config"), **described}
        save_file(tensors(model), save_directory / WEIGHT_FILES[0], metadata={"format": "pt"})
        (save_directory / CONFIG_FILE).write_text(json.dumps(config, sort_keys=True, indent=2))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """The model, in evaluation mode, of a directory or repository that `save_pretrained` or `push_to_hub` wrote.

        `options`: revision, cache_dir, force_download, local_files_only, token, map_location, strict (True unless
        given), and arguments of `PVT_V2` that replace those of config.json: another num_classes or in_channels is
        met as in `load_weights`. Each parameter has the dtype that it has in the file.

        Raises ValueError for another library's repository: those load with `load_weights` into a model made here.
        Raises OSError where the files are not in the cache and there is no network.
        """
        kinds = (str, os.PathLike)
        instance(
            "from_pretrained: pretrained_model_name_or_path", pretrained_model_name_or_path, kinds, "a path or name"
        )
        flag("from_pretrained: strict", options.get("strict", True))
        with clear_errors("from_pretrained", str(pretrained_model_name_or_path)):
            return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str = "cpu",
        strict: bool = True,
        config: dict | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **arguments: Any,
    ) -> Any:
        if config is None or NORM_EPS not in config:
            raise ValueError(_foreign(model_id, config))
        if Path(model_id).is_dir():
            path = next((Path(model_id, name) for name in WEIGHT_FILES if Path(model_id, name).is_file()), None)
            if path is None:
                raise ValueError(f"from_pretrained: {model_id} must hold {' or '.join(WEIGHT_FILES)}, got neither")
        else:
            path = fetch(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        state, _ = load_state(path)
        model = cast("PVT_V2", cls(**arguments))
        settle(model, config)
        model.to(next(iter(state.values())).dtype)
        take_dtypes(model, state)
        assign(model, state, config[NORM_EPS], strict=strict)
        return model.to(map_location).eval()


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
