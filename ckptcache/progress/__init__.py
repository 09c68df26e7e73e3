"""Training that lives in a repository: git keeps the record, a cache keeps the files, this brings them together."""
