"""The explorer: a dense model and pruned ones, asked the same thing side by side, by a prompt and a slider."""

from hfprune_nb.explore.panel import Panel
from hfprune_nb.explore.session import Answer, Session

__all__ = ["Answer", "Panel", "Session"]
