"""LEAD: a small retriever that learned how a large one reads."""
