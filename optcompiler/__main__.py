"""`python -m optcompiler`: the command line."""

from optcompiler.cli import main

if __name__ == "__main__":
    main(prog_name="python -m optcompiler")
