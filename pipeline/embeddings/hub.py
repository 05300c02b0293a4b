"""Check whether a model hub offers the files of a model, before its client downloads them."""

from pipeline import storage

CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of weights in a repository, as open_clip looks for them."""
_HUB_ANSWER_S = 5.0


def is_offered(name: str, repository: str, files: tuple[str, ...], copy: str = "the file", *,
               flag: str = "--embed.pretrained /path/to/weights") -> bool:
    """Whether a file of a repository is in the cache of the hub's client; False if the hub offers one of them.

    ValueError that tells a hub without these weights from one that does not answer. Without this check the client of
    the hub retries each file for a minute. Its hint says what to copy to a machine without network (`copy`), and the
    flag that names it.
    """
    import huggingface_hub
    from huggingface_hub import errors
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str) for file in files):
        return True
    for file in files:
        try:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, file), timeout=_HUB_ANSWER_S)
            return False
        except errors.EntryNotFoundError:
            continue
        except errors.RepositoryNotFoundError:  # also one that needs a login
            raise ValueError(f"the weights of {name} do not exist: the hub has no {repository} that this user may "
                             f"read\nhint: hf auth login, or {flag}") from None
        except Exception as error:  # what the hub's client raises has no common type
            reason = storage.first_line(error)
            raise ValueError(f"the weights of {name} are not on this machine, and the hub cannot be reached: {reason}"
                             f"\nhint: on a machine without network, copy {copy} here: {flag}") from None
    raise ValueError(f"the weights of {name} do not exist: {repository} has none of {', '.join(files)}\n"
                     f"hint: {flag}")
