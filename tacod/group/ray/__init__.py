"""A group's ranks on the hosts of a Ray cluster.

The supervisor (`launcher`) starts one process that is the cluster's client (`bridge`). That has an actor on each host
(`host`), which forks the host's ranks as the supervisor does on one machine. Packets go from the supervisor to the
bridge by a socket and from there by the actors' methods, tensors by Ray's object store. Only bridge and actors import
Ray.
"""
