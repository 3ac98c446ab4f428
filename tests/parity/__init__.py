"""Numbers computed with the authors' code: they must come out."""
