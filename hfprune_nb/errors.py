"""The one exception that a user is meant to read."""

import os
import traceback


class UserError(ValueError):
    """Bad input, told in one sentence that names the parameter and the remedy; the command line prints it and exits non-zero.

    Notebooks show the sentence alone, or with the environment variable HFPRUNE_TRACEBACK all of the traceback.
    """

    def _render_traceback_(self) -> list[str]:
        # IPython shows this instead of a screenful of frames.
        if os.environ.get("HFPRUNE_TRACEBACK"):
            return traceback.format_exception(self)
        return [f"{type(self).__name__}: {self}"]
