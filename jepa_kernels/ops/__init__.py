"""One folder per op: see CONTRIBUTING.md for what each file of a room holds."""
