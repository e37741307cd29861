"""Putting an adapter on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of httpx or httpx2, depending on its version
    OfflineModeIsEnabled,
)

from anyrank.errors import AnyrankError, ConfigError

__all__ = ["push"]


def push(folder: Path, repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload an adapter with its card to the Hugging Face hub, into a new repository or one that is there.

    Args:
        folder: a finished run, whose `adapter/` is meant, or a PEFT directory that anyrank wrote.
        repo: name on the hub, such as `user/tickets`.
        private: of a repository that is made.
        token: of the hub; by default that of `hf auth login` or of `HF_TOKEN`.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: no adapter in the folder, no token, or no name that a repository can have.
        AnyrankError: the hub cannot be reached, or refuses.
    """
    adapter = _adapter(folder)
    if not (token or get_token()):
        raise ConfigError(
            "there is no token for the Hugging Face hub. Log in with `hf auth login`, or set HF_TOKEN to one that may "
            "write."
        )
    api = HfApi(token=token, library_name="anyrank")
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=adapter, commit_message="Upload an adapter with anyrank")
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no name for a repository, such as user/tickets: {error}") from error
    except HfHubHTTPError as error:
        raise AnyrankError(f"{api.endpoint} refused {repo}: {_reason(error)}") from error
    except OfflineModeIsEnabled as error:
        raise AnyrankError("HF_HUB_OFFLINE is set, so that nothing is uploaded. Unset it and try again.") from error
    except (
        HTTPError,
        ConnectionError,
        RuntimeError,
    ) as error:  # the last by uploads of large files, whatever went wrong
        reason = str(error).rstrip(".")
        raise AnyrankError(
            f"the upload to {api.endpoint} failed: {reason}. Check the network and try again."
        ) from error
    return str(made)


def _adapter(folder: Path) -> Path:
    """The PEFT directory that a folder is or has."""
    for path in (folder / "adapter", folder):
        if any((path / name).is_file() for name in ("adapter_config.json", "mixture.json")):
            return path
    if (folder / "clients").is_dir():
        raise ConfigError(f"{folder} has no global adapter: name that of one client, in {folder / 'clients'}.")
    if (folder / "run.json").exists():
        raise ConfigError(f"{folder} has no adapter yet: finish it with `anyrank run --resume {folder}`.")
    raise ConfigError(f"{folder} holds no adapter: expected a finished run, or what `anyrank export` writes.")


def _reason(error: HfHubHTTPError) -> str:
    reasons = {
        401: "the token is not valid. Log in again with `hf auth login`, or set HF_TOKEN",
        403: "the token may not write there. Use one with write access, or a name of your own",
    }
    found = reasons.get(error.response.status_code)
    return f"{found or error.server_message or str(error).splitlines()[0]} (status {error.response.status_code})."
