"""``python -m fastcm``."""

from fastcm.cli import main

main()
