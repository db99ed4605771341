"""Files of Hugging Face repositories: from the cache, or from the hub, or an error that says what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What a repository keeps its weights in, the better first: safetensors holds no code.
WEIGHT_FILES = (constants.SAFETENSORS_SINGLE_FILE, constants.PYTORCH_WEIGHTS_NAME)
CONFIG_FILE = constants.CONFIG_NAME


@contextmanager
def clear_errors(op: str, repository: str) -> Iterator[None]:
    """Errors of huggingface_hub as one sentence: OSError where only a network is missing, ValueError otherwise."""
    try:
        yield
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise OSError(
            f"{op}: {repository} must be in the cache {constants.HF_HUB_CACHE} when {why}, and it is not; "
            f"fetch it where there is a network (hf download {repository.partition('@')[0]}), or give a local file"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{op}: source must be a repository with weights, got {repository!r} ({reason})") from error
    except HfHubHTTPError as error:
        raise OSError(f"{op}: {repository} must be given out by the hub, got {' '.join(str(error).split())}") from error


def locate(op: str, source: str, **options) -> tuple[Path, Path | None]:
    """(weights, config.json where there is one) of a directory, or of a repository, with the options of `fetch`."""
    folder = Path(source)
    if folder.is_dir():
        files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
        if not files:
            raise ValueError(
                f"{op}: source must hold {' or '.join(WEIGHT_FILES)}, got directory {source!r} with neither"
            )
        return files[0], folder / CONFIG_FILE
    with clear_errors(op, source):
        weights = fetch(source, **options)
        config = weights.with_name(CONFIG_FILE)
        if not config.is_file():
            try:
                config = fetch(source, (CONFIG_FILE,), **options)
            except EntryNotFoundError:  # not every repository has one, nor every cache: timm fetches weights alone
                return weights, None
    return weights, config


def fetch(repository: str, names: Sequence[str] = WEIGHT_FILES, **options) -> Path:
    """The first of the files `names` that the repository "org/name" or "org/name@revision" has.

    `options` are those of `huggingface_hub.hf_hub_download`; the environment (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE)
    is respected. Raises what huggingface_hub raises.
    """
    repository, _, revision = repository.partition("@")
    if revision:
        options["revision"] = revision
    *others, last = names
    for name in others:
        try:
            return Path(hf_hub_download(repository, name, **options))
        except LocalEntryNotFoundError:  # no network, which is not waited for again, and not in the cache
            options["local_files_only"] = True
        except EntryNotFoundError:
            pass
    return Path(hf_hub_download(repository, last, **options))
