"""`python -m pytgi`: the command `pytgi` without an installed script."""

from pytgi.commands import main

if __name__ == "__main__":
    main()
