"""``python -m trierec``."""

from trierec.cli import main

main()
