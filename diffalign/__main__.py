"""`python -m diffalign` and `accelerate launch -m diffalign`: the command line."""

from diffalign.cli.main import main

if __name__ == "__main__":
    main()
