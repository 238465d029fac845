"""`python -m circuitpress` is the command `circuitpress`."""

from .cli import main

if __name__ == "__main__":
    main()
