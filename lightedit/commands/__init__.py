"""The commands of `lightedit`, each a typed function in a file of its own."""
