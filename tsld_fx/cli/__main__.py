"""`python -m tsld_fx.cli`."""

from tsld_fx.cli.main import main

if __name__ == "__main__":
    main()
