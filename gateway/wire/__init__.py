"""HTTP/1.1 as bytes: heads, bodies, the client to clients and the connections to engines (RFC 9112)."""
