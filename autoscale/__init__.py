"""Pure decisions about capacity; empty until elasticity comes. No ray, torch, clock or chance."""
