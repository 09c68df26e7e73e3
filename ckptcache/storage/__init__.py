"""Bytes on disk; knows nothing of scores or of training."""
