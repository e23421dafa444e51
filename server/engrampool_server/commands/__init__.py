"""What is typed: the subcommands of `engrampool` that the server brings."""
