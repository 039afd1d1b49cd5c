"""Models of the Hugging Face hub: `org/name` where no such directory is here. `HF_ENDPOINT` and `HF_TOKEN` are honoured."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowseg_jax.checkpoints.model_card import ModelCard
from flowseg_jax.checkpoints.stored_config import read_model_config
from flowseg_jax.errors import UserError, brief

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
FILES = ["config.json", "tokenizer/*", "params/*"]  # of a model directory; the hub's `*` goes into folders


def is_repo_id(name: str | os.PathLike[str]) -> bool:
    """Whether it can only be a model of the hub: `org/name`, and no folder `org` is here that a typing error might mean."""
    text = os.fspath(name)
    return bool(_REPO.fullmatch(text)) and not os.path.exists(text.partition("/")[0])


def download(repo_id: str, revision: str | None = None) -> Path:
    """The model's files in the hub's cache on this machine, fetched where they are missing.

    Raises:
        UserError: there is no such model, or the hub cannot be reached and the cache lacks it.
    """
    with _one_line(f"{repo_id}: no such directory here, and it cannot be had from"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES))


def upload(directory: Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads a model directory with a README.md made of its card; the address of the model.

    Raises:
        UserError: no model directory, or the hub does not take it.
    """
    usage = f'import flowseg_jax\n\nsegmentor = flowseg_jax.load("{repo_id}")'
    return _upload(directory, directory, repo_id, "flowseg_jax", usage, FILES, private)


def upload_export(exported: Path, model: str | os.PathLike[str], repo_id: str) -> str:
    """Uploads what `flowseg export --format=hf` made of a model directory; otherwise as `upload`."""
    usage = f'from transformers import AutoModel\n\nsam = AutoModel.from_pretrained("{repo_id}", subfolder="sam")'
    return _upload(exported, model, repo_id, "transformers", usage, None, False)


def _upload(
    directory: Path,
    model: str | os.PathLike[str],
    repo_id: str,
    library: str,
    usage: str,
    patterns: list[str] | None,
    private: bool,
) -> str:
    """Uploads the files of a directory, and a README.md of the model that they are made of."""
    card = ModelCard.of_model(read_model_config(model)["extra"], model)
    head = f"---\nlibrary_name: {library}\npipeline_tag: image-segmentation\n---"
    readme = "\n\n".join([head, f"# {repo_id}", *card.lines(), f"```python\n{usage}\n```\n"])
    with _one_line(f"{directory} cannot be uploaded as {repo_id} to"):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_file(path_or_fileobj=readme.encode(), path_in_repo="README.md", repo_id=repo_id)
        return str(api.upload_folder(repo_id=repo_id, folder_path=os.fspath(directory), allow_patterns=patterns))


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever the hub's client raises becomes one line."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        yield
    except Exception as error:  # its own types, those of its HTTP client, OSError
        raise UserError(f"{what} {endpoint}: {_reason(error)}") from None


def _reason(error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"not allowed ({status}); log in by `hf auth login`, or set HF_TOKEN"
    if status == 404:
        return "there is no such model, or it is private and HF_TOKEN is not set"
    if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"):
        return "the hub is not reached, and no copy is here; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    return brief(error)
