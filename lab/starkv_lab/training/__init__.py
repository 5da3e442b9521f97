"""How the shipped agent was trained, and how it is graded."""
