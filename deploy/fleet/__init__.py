"""Which variants to serve where: predictions from measured speeds, and the choice among layouts."""
