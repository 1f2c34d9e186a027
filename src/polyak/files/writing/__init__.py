"""Writers of checkpoints: room for every tensor first, then its bytes in any order."""
