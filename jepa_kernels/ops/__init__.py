"""One folder for each op; CONTRIBUTING.md says what its files hold."""
