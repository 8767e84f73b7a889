"""Program → the lowered form that code generators print."""
