"""Seeds for independent random streams, made from names."""

import hashlib


def derived_seed(*parts: object) -> int:
    """A 32-bit seed that depends on every part, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
