"""How every command ends: what a user can mend is one line on stderr and exit code 2, Ctrl-C one and 130.

Neither is a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

MISTAKE = 2  # exit code of what the user can mend


class Ended(Exception):
    """An end that is told in one line, without a traceback, and has an exit code of its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(arguments)` and exit: with what it returns (None is 0), with 2 for a ValueError or an OSError, with
    an Ended's own code, or with 130 when it is interrupted.

    Under a launcher every rank says its line, those beyond rank 0 with their number.
    """
    try:
        code = main(sys.argv[1:])
    except (ValueError, OSError, Ended) as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"error{f' (rank {rank})' if rank else ''}: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code if isinstance(error, Ended) else MISTAKE
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on", file=sys.stderr)
        code = 130  # 128 + SIGINT, as shells have it
    sys.exit(code)
