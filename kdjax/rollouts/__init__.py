"""What the student writes in an engine of its own, and how its weights reach that engine; a teacher that follows it."""
