"""``python -m faltung`` is the ``faltung`` command."""

from .cli import main

main()
