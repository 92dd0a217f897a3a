"""Pure decisions about capacity. Empty until the elasticity issue: no ray, torch, clock or chance."""
