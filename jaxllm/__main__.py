"""`python -m jaxllm VERB …` is the same as `jaxllm VERB …`."""

from jaxllm.cli import entry_point

if __name__ == "__main__":
    entry_point()
