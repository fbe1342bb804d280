"""`python -m server.launcher`: the console script text-generation-launcher without an installed script."""

from server.launcher.main import main

if __name__ == "__main__":
    main()
