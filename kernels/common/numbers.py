"""Numbers that several kernels and specifications share."""

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
