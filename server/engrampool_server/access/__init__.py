"""Who may call a server: certificates and keys, callers and their roles, and what each of them may take."""
