"""Units of memory."""

# Bytes of a MiB, the unit of everything that is reported.
MIB = 2**20
