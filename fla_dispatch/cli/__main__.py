"""`python -m fla_dispatch.cli`: the command line where the package is not installed."""

from . import main

main()
