"""Names on the Hugging Face hub: told from paths, and asked for once, within seconds.

What loads models and datasets asks a hub that does not answer again and again, for a minute.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from adarankgrad.train.errors import UserError
from adarankgrad.train.presets import first_line

_LONGEST_WAIT_S = 5.0
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

_NOTHING_HERE = {"model": "no folder here", "dataset": "no file here"}


def is_hub_name(name: str) -> bool:
    """Whether a name that is nothing here may be one on the hub.

    It is not where it can only be a path, or its first part is a folder here, or the one that the
    documentation puts models in: nobody means a stranger's model by a mistyped path.
    """
    if not _NAME.fullmatch(name):
        return False
    owner, slash, _ = name.partition("/")
    return not slash or not (owner == "models" or Path(owner).is_dir())


@cache
def ask_for_model(name: str) -> bool:
    """Ask the hub whether it has a model.

    Returns:
        True, or False where the hub cannot be reached and a copy in its cache must do.

    Raises:
        UserError: There is neither.
    """
    from huggingface_hub import try_to_load_from_cache

    has_copy = isinstance(try_to_load_from_cache(name, "config.json"), str)
    return _ask("model", name, "config.json", has_copy=has_copy)


@cache
def ask_for_dataset(name: str) -> bool:
    """Ask the hub whether it has a dataset, as `ask_for_model` does."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, own_name = name.split("/")
    copy = Path(config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(own_name)]))
    return _ask("dataset", name, "README.md", has_copy=copy.is_dir())


def _ask(kind: str, name: str, file: str, *, has_copy: bool) -> bool:
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        # Without retries, unlike what downloads the file.
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=_LONGEST_WAIT_S)
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{kind} {name!r} is {_NOTHING_HERE[kind]}, and the hub has none of that name that you "
            "may read: check it; if it is private or gated, log in with hf auth login."
        ) from error
    except (errors.EntryNotFoundError, errors.HfHubHTTPError):
        pass  # it answered; what is wrong, if anything, is told by what downloads
    except Exception as error:  # of whichever HTTP client the hub's package uses
        if has_copy:
            return False
        raise UserError(
            f"{kind} {name!r} is {_NOTHING_HERE[kind]}, and the hub cannot be asked for it "
            f"({first_line(error).rstrip('.')}): check the path, or the network."
        ) from error
    return True
