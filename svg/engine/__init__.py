"""What every method runs on: layout, plan, state, records, guard. Knows no method by name."""
