"""How a command ends: a user's mistake is one line that says what to do, a fault of ours a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from llmvis.schema import UserError, printable


def entry(main: Callable[[], None]) -> None:
    """Runs a command's `main`; exit status 1 for a mistake that can be explained, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:  # the reader of a pipe has gone, as in `| head`
        sys.stderr.close()
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print("stopped; a job goes on when the same command is run again", file=sys.stderr)
        raise SystemExit(130) from None
