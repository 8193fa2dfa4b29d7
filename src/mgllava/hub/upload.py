"""Upload of a model folder to the Hub, with a tag that examples can name."""

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from transformers.utils import logging

from mgllava.model_files.errors import ConversionError, one_line
from mgllava.model_files.staging import CODE_NAMES
from mgllava.processing.box_detector_files_mgllava import BUNDLE_FOLDER, PARTS

logger = logging.get_logger(__name__)

# Code and weights that an export writes, at the top and in the parts of the box detector.
_OWN_PATHS = re.compile(
    rf"({BUNDLE_FOLDER}/({'|'.join(PARTS)})/)?"
    rf"({CODE_NAMES.pattern}|model(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index\.json)"
)


def stale_files(uploaded: Iterable[str], folder: Path) -> list[str]:
    """List code and weights of earlier exports among the files on the Hub that the folder does not have."""
    return sorted(path for path in uploaded if _OWN_PATHS.fullmatch(path) and not (folder / path).is_file())


def check_destination(repo_id: str, tag: str, private: bool) -> None:
    """Check that [`upload_repository`] can upload there, before anything is written."""
    api = HfApi()
    try:
        is_private = api.repo_info(repo_id).private
        tags = {ref.name for ref in api.list_repo_refs(repo_id).tags}
    except RepositoryNotFoundError:
        return
    except Exception as error:  # the errors of the HTTP library differ between versions of huggingface_hub
        raise ConversionError(
            f"`push`: the Hub cannot be asked about {repo_id} ({one_line(error)}). Check the name, the connection and "
            "the login, or leave `push` out and upload the folder later."
        ) from error
    if tag in tags:
        raise ConversionError(
            f"`tag`: {repo_id} has a tag {tag}, which users may have pinned. Pass another one, such as {tag}-2."
        )
    if private and not is_private:
        raise ConversionError(f"`private`: {repo_id} exists and is public. Make it private first, or leave it out.")


def upload_repository(folder: str | Path, repo_id: str, tag: str, *, private: bool = False) -> str:
    """Upload a folder in one commit, and tag it.

    The repository is created if it does not exist. Code of saved models (`*_mgllava.py`, `*_ram_plus.py`,
    `*_common.py`) and model weights that the folder lacks are deleted there, with a warning that names them. All other
    files stay, for example a `handler.py` or adapters.

    Args:
        folder (`str` or `Path`): Model folder that [`export_repository`] wrote.
        repo_id (`str`): `ORGANIZATION/NAME`.
        tag (`str`): Name of the tag.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.

    Returns:
        `str`: URL of the repository.

    Raises:
        ConversionError: If the repository has this tag, is public although `private` is set, or the upload fails.
    """
    check_destination(repo_id, tag, private)
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        stale = stale_files(api.list_repo_files(url.repo_id), Path(folder))
        commit = api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=f"Export {tag}", delete_patterns=stale
        )
        api.create_tag(url.repo_id, tag=tag, revision=commit.oid)
    except Exception as error:  # the errors of the HTTP library differ between versions of huggingface_hub
        raise ConversionError(
            f"`push`: {folder} is complete, but could not be uploaded to {repo_id} ({one_line(error)})."
        ) from error
    if stale:
        logger.warning(f"Deleted from {url.repo_id}, because the new export does not have them: {', '.join(stale)}.")
    return str(url)


__all__ = ["check_destination", "upload_repository"]
