"""Files: whole or absent, with checksums."""
