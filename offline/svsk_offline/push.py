# SPDX-License-Identifier: Apache-2.0
"""A checkpoint to the hub, after a check that it is whole."""

from collections.abc import Callable
from pathlib import Path

from svsk_kernels.errors import SvskError, one_line

__all__ = ["check_repository", "push"]


def check_repository(repository: str) -> None:
    """Refuse a name that no repository of the hub can have.

    Raises:
        SvskError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise SvskError(
            f"{repository}: expected a name on the hub, such as me/qwen3-4b-svsk."
        ) from error


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    message: str = "SVSK checkpoint",
    trust_remote_code: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """Validate a checkpoint and upload its folder; the repository is made if there is none.

    Args:
        folder: the checkpoint.
        repository: ``owner/name`` on the hub.
        private: of a repository that is made.
        message: of the commit.
        trust_remote_code: validate with Python files of the folder.
        endpoint: of the hub; None for that of ``HF_ENDPOINT``, or huggingface.co.
        token: None for the one that ``hf auth login`` keeps.
        note: told what validation could not check.

    Returns:
        Address of the commit.

    Raises:
        SvskError: the checkpoint has a problem, the hub cannot be reached, or refuses.
    """
    check_repository(repository)
    from svsk_offline.storage.inspection import validate_against_architecture

    problems = validate_against_architecture(folder, trust_remote_code=trust_remote_code, note=note)
    if problems:
        more = f" And {len(problems) - 1} more: `svsk validate {folder}`." if problems[1:] else ""
        raise SvskError(f"{folder}: is not whole, so it is not uploaded. {problems[0]}{more}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # True: without a token the hub would be asked all the same, and only say no.
    api = HfApi(endpoint=endpoint, token=True if token is None else token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[".*", "*.tmp"],
        )
    except LocalTokenNotFoundError as error:
        raise SvskError(f"{repository}: nobody is logged in. Run `hf auth login`.") from error
    except (HfHubHTTPError, OSError) as error:
        raise SvskError(
            f"{repository}: the hub did not take it ({one_line(error)[:300]}). Is the name right,"
            " and may the token of `hf auth login` write there?"
        ) from error
    return str(commit.commit_url)
