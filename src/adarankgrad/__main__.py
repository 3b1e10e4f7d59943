"""``python -m adarankgrad``: the same as the ``adarankgrad`` command."""

from adarankgrad.cli.main import main

if __name__ == "__main__":
    main()
