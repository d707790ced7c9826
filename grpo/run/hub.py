"""Uploads an export to the Hugging Face hub. The folder on this machine stays as it is, whatever happens."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from grpo.config import ConfigError
from grpo.run.model_card import HUB_ID

REASONS = {
    401: "the token is not valid: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: it needs the role 'write', and its owner the right to publish for {owner}",
    404: "there is no user or organisation {owner} that this token can see: check the spelling",
}


def check_push(repo_id: str) -> None:
    """Raises ConfigError for a name or a login that no upload can have, before anything is written."""
    if not HUB_ID.fullmatch(repo_id):
        raise ConfigError(f"--push {repo_id}: expected ORGANISATION/NAME or USER/NAME")
    if get_token() is None:
        raise ConfigError(f"--push {repo_id}: there is no token: log in with `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Uploads a folder as a model repository, made if there is none. Returns its address.

    Raises ConfigError saying what the hub answered, and how to upload the folder later.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ConfigError(f"--push {repo_id} --private: that repository exists and is public; nothing was uploaded. Make it "
                              f"private in its settings, or choose another name. {_later(folder, repo_id)}")
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload of a GRPO export").repo_url)
    except HfHubHTTPError as error:
        reason = REASONS.get(error.response.status_code, "").format(owner=repo_id.partition("/")[0])
        answer = str(error.server_message or error).strip().splitlines()[0]
        raise ConfigError(f"--push {repo_id}: the hub answered {error.response.status_code}"
                          f"{': ' + reason if reason else ''} ({answer}). {_later(folder, repo_id)}") from error
    except (HFValidationError, HTTPError, OSError) as error:
        raise ConfigError(f"--push {repo_id}: the hub could not be reached ({error}). {_later(folder, repo_id)}") from error


def _later(folder: Path, repo_id: str) -> str:
    return f"The export is complete in {folder}; upload it later with: hf upload {repo_id} {folder}"
