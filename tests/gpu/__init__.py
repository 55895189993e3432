"""What needs a GPU: ``tests/gpu/check.sh`` runs all of it, and measures."""
