"""Pure decisions over records, each answered with its reason; no disk, no torch."""
