"""Features of a frozen backbone: computed once, kept on disk, read in place of pixels."""
