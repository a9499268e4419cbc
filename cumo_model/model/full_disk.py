"""Recognises errors of a full disk. This module needs no torch."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch report it only in the message
NO_ROOM_WORDS = (
    "No space left",
    "File too large",
    "Disk quota exceeded",
    "os error 28",
    "os error 27",
    "os error 122",
    "PytorchStreamWriter",
    "unexpected pos",
)


def is_no_room(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full, or a file too large for its file system."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_ROOM
    is_of_writer = isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"
    return is_of_writer and any(word in str(error) for word in NO_ROOM_WORDS)
