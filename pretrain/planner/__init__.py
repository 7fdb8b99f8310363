"""Memory planning without memory."""
