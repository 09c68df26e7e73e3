"""Live training objects, captured and restored; knows nothing of files."""
