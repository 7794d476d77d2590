"""The ranks from outside: processes, shared memory, restarts."""
