"""Editors that write no weight: a small module behind one place acts on the prompts that they were taught."""
