"""What an application installs to say which of its agents asks. Importing it imports no other package."""
