"""Which stages a document goes through, in which order."""


def per_document(cfg) -> list:
    """Returns the stages that look at one document, built for this process."""
    return []


def signer(cfg):
    """Returns what makes a document's signature for deduplication; None without it."""
    return
