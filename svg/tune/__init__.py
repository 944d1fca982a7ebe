"""`svg tune`: budgets of their own for every layer and head, found by measuring and verified on videos."""
