"""``python -m lit_methods`` is the ``lit-methods`` command."""

from lit_methods.cli import main

if __name__ == "__main__":
    main()
