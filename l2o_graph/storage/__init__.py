"""Files and folders: atomic writes, one writer per folder, and checks on reading."""
