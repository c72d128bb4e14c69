"""How a command ends: a user's mistake is one line that says what to do, a fault of ours a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from llmvis.schema import UserError


def entry(main: Callable[[], None]) -> None:
    """Runs a command's `main`; exit status 1 for a mistake that can be explained, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped; run the same command again and it goes on", file=sys.stderr)
        raise SystemExit(130) from None
