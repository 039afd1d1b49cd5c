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
    card = ModelCard.of_model(read_model_config(directory)["extra"], directory)
    readme = "\n\n".join(
        ["---\nlibrary_name: flowseg_jax\npipeline_tag: image-segmentation\n---", f"# {repo_id}", *card.lines()]
    )
    readme += f'\n\n```python\nimport flowseg_jax\n\nsegmentor = flowseg_jax.load("{repo_id}")\n```\n'
    with _one_line(f"{directory} cannot be uploaded as {repo_id} to"):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_file(path_or_fileobj=readme.encode(), path_in_repo="README.md", repo_id=repo_id)
        return str(api.upload_folder(repo_id=repo_id, folder_path=os.fspath(directory), allow_patterns=FILES))


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
