"""`python -m vidbatch`: the command line."""

from vidbatch.cli import main

main()
