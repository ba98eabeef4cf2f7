"""What the repository runs on itself; it knows the members only by their folders, commands and files."""
