"""Read image files: decode them, read their headers and metadata, and open zip and tar archives.
Every other part of the project uses this package.

Main entries: `imaging.decode.prepare()` and `decode()`, `imaging.zip.members()`,
`imaging.tar.members()`.
"""
