"""`python -m mgllava`: the command line."""

from mgllava.cli import main

main()
