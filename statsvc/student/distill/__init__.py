"""The reference trainer: `statsvc distill`."""
