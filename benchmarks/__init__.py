"""Side-by-side measurements, each a module that prints a table, or JSON."""
