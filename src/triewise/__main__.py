"""``python -m triewise``."""

from triewise.cli import main

main()
