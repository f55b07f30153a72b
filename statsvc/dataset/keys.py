"""WebDataset's rule for names: the key is everything up to the first dot of the file name, the rest its extension."""

import hashlib
import re

META_NAME = re.compile(r"__[^/]*__(?:/|$)")  # the names webdataset keeps for itself


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a file; None for a file that belongs to no sample.

    The same as webdataset.tariterators.base_plus_ext, odd names included, but in linear time: its regular expression
    takes minutes for a name of a megabyte, which any tar may hold. It also imports torch.
    """
    dot = name.find(".", name.rfind("/") + 1)
    if dot < 1 or META_NAME.match(name):
        return None
    other_dot = name.rfind(".", 0, dot)
    if other_dot >= 0:  # it must be left behind by a slash, before which webdataset accepts no newline
        slash = name.find("/", other_dot + 1, dot - 1)
        if slash < 0 or "\n" in name[:slash]:
            return None
    return name[:dot], name[dot + 1 :]


def key_hash(key: str) -> bytes:
    """blake2b-128 of a WebDataset key's bytes as they stand in the tar, also where those are not UTF-8."""
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
