"""Image files: formats decoded, JPEG headers read, archives opened. Every other part uses it."""
