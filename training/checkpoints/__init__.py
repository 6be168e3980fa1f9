"""Checkpoints: all that a run needs to resume as if it had never stopped, written by Orbax.

``reading`` finds and loads them, ``saving`` writes them during a run.
"""

from training.checkpoints.reading import load

__all__ = ["load"]
