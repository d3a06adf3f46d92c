"""A disk that is soon full, for tests of what is said then, and of what is left behind."""

from __future__ import annotations

from pathlib import Path

# As the root of a namespace of its own, which nobody needs to be root for; the mount goes when the command ends.
_MOUNT = 'mount -t tmpfs -o "size=$1" none "$0" && shift && exec "$@"'


def on_small_disk(folder: Path, *command: str, size: str = "1m") -> list[str]:
    """The command that runs `command` where `folder` is an empty disk of `size`, which it alone sees.

    What it leaves on the disk is gone at its end: let the command itself look.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        _MOUNT,
        str(folder),
        size,
        *command,
    ]
