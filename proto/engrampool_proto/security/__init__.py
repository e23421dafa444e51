"""What both sides need to trust each other: files of certificates and keys, read again when they change."""
