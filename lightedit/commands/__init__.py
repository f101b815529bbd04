"""The commands of `lightedit`: one typed function a file."""
