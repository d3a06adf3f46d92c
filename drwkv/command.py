"""How every command ends: what a user can mend is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(arguments)` and exit: with what it returns (None is 0), or with 2 for a ValueError or an OSError.

    Under a launcher every rank says its line, those beyond rank 0 with their number.
    """
    try:
        code = main(sys.argv[1:])
    except (ValueError, OSError) as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"error{f' (rank {rank})' if rank else ''}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code)
