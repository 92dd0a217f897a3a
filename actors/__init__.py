"""The processes: pure state machines and their Ray shells, model surgery, weights, KV blocks."""
