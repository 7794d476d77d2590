"""Clients: sockets, sessions, verbs, uploads, and what the supervisor holds for them."""
