"""Why a model or data set could not be fetched from the Hugging Face Hub, and the command that fetches it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_YES = ("1", "ON", "YES", "TRUE")
_NO_CONNECTION = ("Offline", "LocalEntryNotFound", "ConnectError", "ConnectionError", "Timeout", "MaxRetryError")


def is_hub_id(name: str) -> bool:
    """Whether a name may be a Hub id: two words with a slash, and no folder of that name on this machine."""
    owner, _, _ = name.partition("/")
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(owner).is_dir()


def why_not_fetched(name: str, error: BaseException, kind: Literal["model", "dataset"] = "model") -> str:
    """Why a Hub id could not be read (offline, gated, missing, or the text of `error`), and the command to fetch it.

    It continues a sentence: "X is not a folder on this machine, and …".
    """
    data = kind == "dataset"
    command = f"hf download {name}{' --repo-type dataset --local-dir DIR' if data else ''}"
    then = "give DIR as the path" if data else "use the same HF_HOME, or give the path of a local copy"
    chain = _chain(error)
    kinds = {cls.__name__ for each in chain for cls in type(each).__mro__}
    offline = [f"{key}={os.environ[key]}" for key in _OFFLINE if os.environ.get(key, "").upper() in _YES]
    if "GatedRepoError" in kinds:
        return f"it is gated on the Hugging Face Hub: accept its licence at huggingface.co/{name}, then `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"the Hugging Face Hub has no public {kind} of this name: check the spelling, or `hf auth login` for a "
            "private one"
        )
    if "RevisionNotFoundError" in kinds:
        return "the Hugging Face Hub has no such revision of it: check model.revision"
    if offline or any(part in one for part in _NO_CONNECTION for one in kinds):
        why = f"this machine is offline ({', '.join(offline)})" if offline else "the Hub cannot be reached from here"
        return (
            f"it is not in the local cache of the Hugging Face Hub, and {why}, so it cannot be fetched. Check the "
            f"spelling; then run `{command}` where there is a connection (without {_OFFLINE[0]}), and {then}"
        )
    text = " ".join(str(error).split())[:300]
    return (
        f"it could not be read from the Hugging Face Hub ({type(error).__name__}: {text}). Check the name; "
        f"`{command}` fetches it, and `hf auth login` is for gated and private ones"
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and those that led to it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
