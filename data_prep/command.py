"""How every command of data_prep ends: what a user can mend is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run `main(arguments)` and exit: 0 when it returns, 2 with one line for a ValueError or an OSError."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
