"""Pictures as files."""


def size(png):
    """Width and height, which follow the signature and the name of the first chunk."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
