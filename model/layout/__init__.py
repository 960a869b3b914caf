"""Layouts of the JSON files that training and evaluation write, one description per field."""
