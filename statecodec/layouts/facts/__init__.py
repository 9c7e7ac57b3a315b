"""Roles and names of tensors, for layouts whose files do not say them."""
