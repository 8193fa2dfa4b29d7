"""Run the program `mgllava` by `python -m mgllava`."""

from mgllava.cli import main

main()
