"""C2PA: read the signed manifest of an image, and fetch the list of trusted signers. Main entries:
`signatures.read_manifest()` and `trust_list.fetch_trust_list()`.
"""
