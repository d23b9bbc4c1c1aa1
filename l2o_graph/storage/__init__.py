"""Files and folders: whole or not at all, one writer at a time, checked when read."""
