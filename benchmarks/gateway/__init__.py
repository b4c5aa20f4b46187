"""Gateways side by side: speed, streams, memory, disconnects; and the placement of requests."""
