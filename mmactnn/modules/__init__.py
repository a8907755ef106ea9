"""Generic machinery for ``nn.Module``: names, class swaps, observers."""
