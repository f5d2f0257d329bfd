"""How a model attends to the contexts of a step."""
