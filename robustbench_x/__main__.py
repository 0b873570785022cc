"""`python -m robustbench_x` is `rbx`."""

from robustbench_x.cli import main

if __name__ == "__main__":
    main()
