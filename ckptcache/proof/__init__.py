"""Proving that a training resumes exactly: what its sessions record, what two records say, and the runs."""
