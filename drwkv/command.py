"""How every command ends: what a user can mend is one line on stderr and exit code 2, Ctrl-C one and 130.

Neither is a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(arguments)` and exit: with what it returns (None is 0), with 2 for a ValueError or an OSError, or
    with 130 when it is interrupted.

    Under a launcher every rank says its line, those beyond rank 0 with their number.
    """
    try:
        code = main(sys.argv[1:])
    except (ValueError, OSError) as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"error{f' (rank {rank})' if rank else ''}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on", file=sys.stderr)
        code = 130  # 128 + SIGINT, as shells have it
    sys.exit(code)
