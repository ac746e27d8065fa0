"""`python -m jaxllm VERB …` is the same as `jaxllm VERB …`."""

import sys

from jaxllm.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
