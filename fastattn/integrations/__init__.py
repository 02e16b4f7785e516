"""fastattn inside of other libraries: one module for each of them, which needs that library to be imported."""
