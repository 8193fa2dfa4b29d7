"""From a folder to a repository on the Hub, with a tag that examples can name."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from mgllava.conversion.errors import ConversionError

# Left over from an earlier upload, these would be loaded, or be taken for what is loaded.
_STALE = ["*.py", "*.safetensors", "*.safetensors.index.json"]


def check_destination(repo_id: str, tag: str, private: bool) -> None:
    """Refuse, before anything is written, what [`upload_repository`] could not do.

    Args:
        repo_id (`str`): `ORGANISATION/NAME`.
        tag (`str`): The tag.
        private (`bool`): Whether the repository is to be private.

    Raises:
        ConversionError: If the repository has this tag, or is public and should not be.
    """
    api = HfApi()
    try:
        is_private = api.repo_info(repo_id).private
        tags = {ref.name for ref in api.list_repo_refs(repo_id).tags}
    except RepositoryNotFoundError:
        return
    if tag in tags:
        raise ConversionError(
            f"`tag`: {repo_id} has a tag {tag}, which users may have pinned. Pass another one, such as {tag}-2."
        )
    if private and not is_private:
        raise ConversionError(f"`private`: {repo_id} exists and is public. Make it private first, or leave it out.")


def upload_repository(folder: str | Path, repo_id: str, tag: str, *, private: bool = False) -> str:
    """Upload a folder in one commit, and tag it.

    The repository is created if there is none. Code and weights of an earlier upload that the folder lacks go; all
    other files there stay.

    Args:
        folder (`str` or `Path`): What [`export_repository`] wrote.
        repo_id (`str`): `ORGANISATION/NAME`.
        tag (`str`): Name of the tag.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.

    Returns:
        `str`: Where to see it.

    Raises:
        ConversionError: If the repository has this tag, or is public and should not be.
    """
    check_destination(repo_id, tag, private)
    api = HfApi()
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    commit = api.upload_folder(
        repo_id=url.repo_id, folder_path=folder, commit_message=f"Export {tag}", delete_patterns=_STALE
    )
    api.create_tag(url.repo_id, tag=tag, revision=commit.oid)
    return str(url)


__all__ = ["check_destination", "upload_repository"]
