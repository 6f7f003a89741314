"""Helper package of the SPEED study: the work behind the notebooks.

Each module serves one stage or one service; the notebooks tell the story and call them.
"""

__version__ = "0.1.0"
