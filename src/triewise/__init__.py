"""Recommend by writing the title of the next item along the catalogue's prefix tree.

``triewise.load("runs/x")`` gives a trained recommender, ``triewise.train(recipe, out)`` trains one; more is behind the
doors of the wings: ``triewise.tokens``, ``triewise.training``, ``triewise.decoding`` and so on. Importing this package
loads neither torch nor transformers.
"""

import logging

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
__version__ = "0.1.0"

# transformers imports bitsandbytes wherever it is installed, and that speaks up at import and at every forward.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
