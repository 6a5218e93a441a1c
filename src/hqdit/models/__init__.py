"""What each architecture looks like, and where the bundled models lie."""
