"""One rank of a job without numbers, counted; ``python -m megaplug.runtime.rehearsal`` runs it."""
