"""What turns gradients into steps: row selection, the Grass fold and refresh, schedules. Tensors in, tensors out."""
