"""`python -m jobsys` is the command `jobsys`."""

from jobsys.cli import main

if __name__ == "__main__":
    main()
