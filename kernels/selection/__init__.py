"""Which key blocks a query block sees: by probability mass, by prediction, by probing."""
