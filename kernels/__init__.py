"""Tensors in, tensors out: linears, expert FFN, paged attention, sampling, and their slow twins."""
