"""Features of a frozen backbone: computed once, stored on disk and used in training instead of
images.
"""
