"""What the loop plays: tasks as they are drawn, engines and judges, new weights for them, and what was lost."""
