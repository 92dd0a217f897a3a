"""Pure decisions: when experts move, when a pool grows. No ray, torch, clock or chance."""
