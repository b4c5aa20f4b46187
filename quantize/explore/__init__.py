"""What precision does to one model, looked at from inside: simulated, to understand it. Accepts nothing."""
