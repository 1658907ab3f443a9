"""`python -m opensora_fast` is the same as `opensora-fast`."""

from opensora_fast.cli import main

if __name__ == "__main__":
    main()
