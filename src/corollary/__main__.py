"""``python -m corollary``: the command line."""

from corollary.cli.main import main

if __name__ == "__main__":
    main()
