"""``python -m ffsplit``."""

from __future__ import annotations

from ffsplit.cli.main import main

if __name__ == "__main__":
    main()
