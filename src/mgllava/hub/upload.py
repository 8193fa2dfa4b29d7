"""Upload of a model folder to the Hub, with a tag that examples can name."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

import mgllava
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.sources import one_line
from mgllava.processing.box_detector_files_mgllava import BUNDLE_FOLDER, PARTS

_HUB_FOLDERS = ("modeling", "processing", "ram_plus")


def _own_names() -> list[str]:
    """Return patterns for the code and the weights that an export may hold."""
    # Left over from an earlier upload, they would be loaded. A `*` would match folders too, and a user's files there.
    package = Path(mgllava.__file__).parent
    code = [path.name for folder in _HUB_FOLDERS for path in (package / folder).glob("*.py")]
    number = "[0-9]" * 5
    weights = [
        "model.safetensors",
        "model.safetensors.index.json",
        f"model-{number}-of-{number}.safetensors",
    ]
    folders = ["", *(f"{BUNDLE_FOLDER}/{part}/" for part in PARTS)]
    names = sorted({*code, *weights} - {"__init__.py"})
    return [folder + name for folder in folders for name in names]


def check_destination(repo_id: str, tag: str, private: bool) -> None:
    """Refuse what [`upload_repository`] could not do, before anything is written."""
    api = HfApi()
    try:
        is_private = api.repo_info(repo_id).private
        tags = {ref.name for ref in api.list_repo_refs(repo_id).tags}
    except RepositoryNotFoundError:
        return
    except Exception as error:  # those of the HTTP library have other names in each version of huggingface_hub
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

    The repository is created if there is none. Files with the names of this package's code and of model weights that
    the folder lacks are deleted, since they would be loaded; all other files there stay, a `handler.py` or adapters
    for example.

    Args:
        folder (`str` or `Path`): What [`export_repository`] wrote.
        repo_id (`str`): `ORGANIZATION/NAME`.
        tag (`str`): Name of the tag.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.

    Returns:
        `str`: Where to see it.

    Raises:
        ConversionError: If the repository has this tag, is public and should not be, or the upload fails.
    """
    check_destination(repo_id, tag, private)
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=f"Export {tag}", delete_patterns=_own_names()
        )
        api.create_tag(url.repo_id, tag=tag, revision=commit.oid)
    except Exception as error:  # those of the HTTP library have other names in each version of huggingface_hub
        raise ConversionError(
            f"`push`: {folder} is complete, but could not be uploaded to {repo_id} ({one_line(error)})."
        ) from error
    return str(url)


__all__ = ["check_destination", "upload_repository"]
